"""Files of text -> token ids -> batches, the same ones in the same order from the same seed.

    paths ──read_corpus──▶ training and held-out texts ──encode──▶ one stream of token ids ──Batches──▶ token_ids_BT

Whole files are held out, never parts of one: a model that has seen the first half of a file knows much of the rest.
Which ones, and the order of all, is decided by a file's name below the folder that was given, so that two machines
agree and a new file moves none of the others. (Two copies of a text under different names can stand on both sides.)
Text comes as UTF-8; a file that isn't is left out and counted, and a corpus of nothing but such files is an error.

B batch, T sequence.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A file of this share of control characters is no text, even where its bytes are valid UTF-8.
MAX_CONTROL_SHARE = 0.05
# Their number is looked for in this much of a file.
SAMPLE_CHARACTERS = 1 << 16


@dataclass
class Corpus:
    """Texts, apart: what is trained on, and whole files that are held out."""

    name: str
    train_texts: list[str]
    held_out_texts: list[str]
    files_left_out: int = 0
    """Files that weren't UTF-8 text."""
    documents: Any = None
    """Where the text to train on is read from while it is trained on (a `datasets.IterableDataset`), of which
    `train_texts` are then the beginning only; None where they are all of it."""
    text_column: str = "text"
    """What the documents call their text."""

    @property
    def num_files(self) -> int | None:
        """How many files are trained on; None where it isn't known, of a corpus that is read while it trains."""
        return len(self.train_texts) if self.documents is None else None

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train_texts)

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out_texts)


def standard_library() -> list[Path]:
    """The Python standard library's source files, a corpus that every machine has. Its own tests are left out:
    not every distribution ships them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))


def read_corpus(
    paths: Sequence[str | Path] | None,
    *,
    held_out_fraction: float = 0.1,
    max_bytes: int | None = None,
) -> Corpus:
    """Reads files, and all files below folders; None is the Python standard library.

    Names that begin with a dot and `__pycache__` are left out below a folder, linked folders are followed, and a file
    that is met twice counts once. `held_out_fraction` is the chance of each file, so the share of the bytes comes
    near it where files are many; at least one file is held out, and at least one trained on. Of a single file the
    end is held out, from a line's border on where there is one nearby.

    With `max_bytes`, files are taken in an order that their names decide until that many bytes of text are read; the
    file that goes beyond is cut there.

    Raises `FileNotFoundError` for a path that isn't there, `ValueError` for a corpus without text or with too little
    to hold any out, `OSError` for a file or folder that can't be read.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction = {held_out_fraction}: must be above 0 and below 1")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes = {max_bytes}: must be at least 1, or None for all")
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        name_of = {file: file.relative_to(root).as_posix() for file in standard_library()}
        name = "Python standard library"
    else:
        roots = [Path(path) for path in paths]
        name_of = find_files(roots)
        name = ", ".join(root.resolve().name or str(root) for root in roots)

    files = in_order(name_of)
    texts: list[tuple[float, str]] = []  # what decides between the parts, and the text
    left_out: list[Path] = []
    num_read, num_empty, room = 0, 0, max_bytes
    for file in files:
        if room is not None and room <= 0:
            break
        num_read += 1
        text = read_text(file, room)
        if text is None:
            left_out.append(file)
        elif not text.strip():
            num_empty += 1
        else:
            texts.append((share_of(name_of[file]), text))
            room = None if room is None else room - len(text.encode())
    warn_of_left_out(left_out, num_read)
    if not texts:
        raise ValueError(
            f"the corpus {name or 'of no paths'} has no text: {num_read} files, {len(left_out)} not UTF-8 text, "
            f"{num_empty} empty. Name files, or folders with files, of UTF-8 text"
        )
    if len(texts) == 1:
        train_text, held_out_text = _cut_end(texts[0][1], held_out_fraction, name)
        return Corpus(name, [train_text], [held_out_text], len(left_out))
    threshold = held_out_threshold([share for share, _ in texts], held_out_fraction)
    if threshold <= min(share for share, _ in texts):
        # All files have one name, so the order decides.
        all_texts = [text for _, text in texts]
        return Corpus(name, all_texts[1:], all_texts[:1], len(left_out))
    train_texts = [text for share, text in texts if share >= threshold]
    held_out_texts = [text for share, text in texts if share < threshold]
    return Corpus(name, train_texts, held_out_texts, len(left_out))


def in_order(name_of: dict[Path, str]) -> list[Path]:
    """Sort files as their names decide, or of two with one name (below different folders) their paths."""
    return sorted(name_of, key=lambda file: (share_of("order of " + name_of[file]), str(file)))


def warn_of_left_out(files: Sequence[Path], num_read: int) -> None:
    """Warn where files were left out, in the caller's caller."""
    if files:
        warnings.warn(
            f"{len(files)} of {num_read} files are not UTF-8 text and are left out, {files[0]} first",
            UserWarning,
            stacklevel=3,
        )


def held_out_threshold(shares: Sequence[float], fraction: float) -> float:
    """Return below which share something is held out: at least the smallest of these is, and the largest isn't."""
    return min(max(fraction, float(np.nextafter(min(shares), 1))), max(shares))


def find_files(roots: Sequence[Path]) -> dict[Path, str]:
    """The files to read, each once, and the name that decides about it."""
    names: dict[Path, tuple[str, Path]] = {}
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder; a corpus is files or folders of text")
        found = _walk(root) if root.is_dir() else [(root.name, root)]
        for name, file in found:
            real = file.resolve()
            # Through a link, or below two of the folders, a file has several names. Which one counts mustn't depend
            # on the order in which they are met.
            names[real] = min(names.get(real, (name, file)), (name, file))
    return {file: name for name, file in names.values()}


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Files below `root` and their names relative to it. Linked folders come last, and no folder twice: links can
    lead in circles, and a folder's own name is better than a link's."""

    def refuse(error: OSError) -> None:
        raise error

    entered: set[str] = set()
    starts = [str(root)]
    for start in starts:  # grows while it is read
        for folder, inner, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(folder)
            if real in entered:
                inner.clear()
                continue
            entered.add(real)
            inner[:] = sorted(name for name in inner if not _is_left_out(name))
            starts += [path for name in inner if os.path.islink(path := os.path.join(folder, name))]
            for name in sorted(files):
                file = Path(folder, name)
                if not _is_left_out(name) and file.is_file():
                    yield file.relative_to(root).as_posix(), file


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def share_of(name: str) -> float:
    """A number from 0 to 1 that a file's name decides, the same on every machine."""
    # A name needn't be UTF-8; fsencode gives the bytes that the disk has.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def read_text(path: Path, max_bytes: int | None) -> str | None:
    """The file's text, at most `max_bytes` of it, or None where it isn't UTF-8 text. A byte order mark is no text."""
    with open(path, "rb") as file:
        raw = file.read(-1 if max_bytes is None else max_bytes)
        was_cut = max_bytes is not None and bool(file.read(1))
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        # A cut through a character leaves the end of it away; anything else isn't UTF-8.
        if not (was_cut and error.reason == "unexpected end of data"):
            return None
        text = raw[: error.start].decode("utf-8")
    if "\0" in text:
        return None
    sample = text[:SAMPLE_CHARACTERS]
    control = sum(sample.count(chr(code)) for code in range(32) if chr(code) not in "\t\n\r\f")
    return None if control > MAX_CONTROL_SHARE * len(sample) else text


def _cut_end(text: str, fraction: float, name: str) -> tuple[str, str]:
    """(what is trained on, the end that is held out): cut at the line's border nearest to that fraction, unless it
    would make the end less than half or more than one and a half times as long."""
    wanted = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    reach = (len(text) - wanted) // 2
    borders = [text.rfind("\n", max(wanted - reach, 0), wanted) + 1, text.find("\n", wanted, wanted + reach) + 1]
    for cut in [*sorted(filter(None, borders), key=lambda border: abs(border - wanted)), wanted]:
        if text[:cut].strip() and text[cut:].strip():
            return text[:cut], text[cut:]
    raise ValueError(
        f"the corpus {name} is one file of {len(text)} characters, and the last {fraction:.0%} of it can't be held "
        "out: one of the parts would be empty. Add text"
    )


def encode(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    separator_id: int | None,
    batch: int = 256,
    advance: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """All texts as one int32 stream of token ids, `separator_id` after each. `tokenizer`: a `tokenizers.Tokenizer`
    or a transformers tokenizer. `advance` is told the characters of every `batch` texts once they are done.

    No token is added, padded or truncated, whatever the tokenizer is set to. A text that holds a special token's
    spelling gives that token, as everywhere in transformers: corpora separate their documents so.
    """
    pieces: list[np.ndarray] = []
    tail = [] if separator_id is None else [separator_id]
    for start in range(0, len(texts), batch):
        chunk = list(texts[start : start + batch])
        if hasattr(tokenizer, "encode_batch"):
            with _whole_texts(tokenizer):
                ids = [encoding.ids for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False)]
        else:
            ids = tokenizer(chunk, add_special_tokens=False, padding=False, truncation=False, verbose=False)[
                "input_ids"
            ]
        pieces += [np.array(list(one) + tail, dtype=np.int32) for one in ids]
        if advance is not None:
            advance(sum(map(len, chunk)))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


@contextmanager
def _whole_texts(tokenizer: Any) -> Iterator[None]:
    """While it lasts, a `tokenizers.Tokenizer` neither pads nor truncates, as many a tokenizer.json tells it to."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        yield
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)


class Batches:
    """Blocks of `sequence_length` tokens of a stream, shuffled anew each epoch: iterating yields token_ids_BT (int64)
    without end, the same ones from the same seed. What is left at the stream's end is no block; a batch can hold the
    last blocks of one epoch and the first of the next.

    Raises `ValueError` where the stream holds less than one block.

    >>> batches = Batches(np.arange(10), batch_size=2, sequence_length=4, seed=0)
    >>> next(iter(batches)).shape, batches.sample(1)
    (torch.Size([2, 4]), tensor([[0, 1, 2, 3]]))
    """

    def __init__(self, token_ids: np.ndarray, *, batch_size: int, sequence_length: int, seed: int) -> None:
        self.num_blocks = len(token_ids) // sequence_length
        if self.num_blocks == 0:
            raise ValueError(
                f"the text has {len(token_ids)} tokens, less than one sequence of {sequence_length}; take more text "
                "or a shorter sequence_length"
            )
        self.blocks = token_ids[: self.num_blocks * sequence_length].reshape(self.num_blocks, sequence_length)
        self.batch_size = batch_size
        self.seed = seed
        self._start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for chosen in itertools.islice(self._order(), self._start, None):
            yield torch.from_numpy(self.blocks[chosen].astype(np.int64))

    def _order(self) -> Iterator[np.ndarray]:
        """The blocks of each batch."""
        queue = np.empty(0, dtype=np.int64)
        epoch = 0
        while True:
            while len(queue) < self.batch_size:
                shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks)
                queue = np.concatenate([queue, shuffled])
                epoch += 1
            chosen, queue = queue[: self.batch_size], queue[self.batch_size :]
            yield chosen

    @cached_property
    def _text(self) -> dict[str, Any]:
        """What identifies the blocks."""
        return {"blocks": self.num_blocks, "sha256": hashlib.sha256(self.blocks.tobytes()).hexdigest()}

    def state_dict(self, num_batches: int) -> dict[str, Any]:
        """Return where they stand after the first `num_batches`, as JSON."""
        return {"num_batches": num_batches, "text": self._text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on there. Raises `ValueError` where they are of another text."""
        if state["text"] != self._text:
            raise ValueError(
                f"the text isn't the one that the run began with: it gives {self.num_blocks} sequences of other "
                f"tokens, then it was {state['text']['blocks']}"
            )
        self._start = state["num_batches"]

    def sample(self, count: int) -> torch.Tensor:
        """`count` blocks (all, where there are fewer), evenly spread over the stream and always the same: for
        evaluation."""
        chosen = np.linspace(0, self.num_blocks - 1, min(count, self.num_blocks)).astype(int)
        return torch.from_numpy(self.blocks[np.unique(chosen)].astype(np.int64))
