"""Files of text -> token ids -> batches, the same ones in the same order from the same seed.

    paths ──read_corpus──▶ training and held-out texts ──encode──▶ one stream of token ids ──Batches──▶ token_ids_BT

Whole files are held out, never parts of one: a model that has seen the first half of a file knows much of the rest.
Which ones, and the order of all, is decided by a file's name below the folder that was given, so that two machines
agree and a new file moves none of the others. (Two copies of a text under different names can stand on both sides.)
Of documents (rows of JSON or Parquet) their texts decide.

B batch, T sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.errors import are, number_of, with_way_out
from sense_v2.hf.data.corpus_files import (
    EMPTY,
    OTHER_ENCODING,
    TEXT,
    CorpusFiles,
    decoded,
    find_corpus,
    opened,
    warn_of_left_out,
)
from sense_v2.hf.data.documents import document_parts, read_parts, text_of


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
    unit: str = "files"
    """What the texts are: files, or documents."""
    is_cut: bool = False
    """It is one file, whose end is held out."""
    num_empty: int = 0
    """Documents without text, which were skipped, as far as they were read."""

    def line(self) -> str:
        """Say what it is, to a person."""
        held_out = len(self.held_out_texts)
        empty = (
            f"; {number_of(self.num_empty, 'document')} without text {are(self.num_empty)} skipped"
            if self.num_empty
            else ""
        )
        if self.documents is None:
            if self.is_cut:
                return f"{self.name}, one file, the end of it held out"
            files = number_of(len(self.train_texts), self.unit.removesuffix("s"))
            return f"{self.name}, {files}, and {held_out} held out{empty}"
        return f"{self.name}, read while it trains; {held_out} held-out texts to evaluate on{empty}"

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
    text_column: str = "text",
) -> Corpus:
    """Read files, and all files below folders; None is the Python standard library.

    `sense_v2.hf.data.corpus_files` says what kinds of files there are. `held_out_fraction` is the chance of each
    text file, or of each document, so the share of the bytes comes near it where they are many; at least one is held
    out, and at least one trained on. Of a single text file the end is held out, from a line's border on where there
    is one nearby.

    With `max_bytes`, files are taken in an order that their names decide until that many bytes of text are read; the
    file that goes beyond is cut there.

    Raises `FileNotFoundError` for a path that isn't there, `ValueError` for a corpus without text or with too little
    to hold any out, and for documents without text in `text_column`, `OSError` for what can't be read.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction = {held_out_fraction}: must be above 0 and below 1")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes = {max_bytes}: must be at least 1, or None for all")
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        name_of = {file: file.relative_to(root).as_posix() for file in standard_library()}
        found = CorpusFiles("Python standard library", name_of, dict.fromkeys(name_of, TEXT), set())
    else:
        found = find_corpus(paths)
    if found.documents:
        warn_of_left_out(found.left_out, len(found.name_of), found.named)
        rows = read_parts(document_parts(found, text_column))
        limit = float("inf") if max_bytes is None else max_bytes
        texts_of, _ = split_documents(
            (text_of(row, text_column) for row in rows),
            held_out_fraction,
            lambda *sizes: sum(sizes) >= limit,
            found.name,
        )
        return dataclasses.replace(texts_of, files_left_out=len(found.left_out))

    texts: list[tuple[float, str]] = []  # what decides between the parts, and the text
    left_out: dict[Path, str] = {}
    num_read, num_empty, room = 0, 0, max_bytes
    for file in in_order(found.name_of):
        if room is not None and room <= 0:
            break
        num_read += 1
        kind = found.kind_of[file]
        text = "" if kind == EMPTY else read_text(file, room) if kind == TEXT else None
        if text is None:
            left_out[file] = OTHER_ENCODING if kind == TEXT else kind
        elif not text.strip():
            num_empty += 1
        else:
            texts.append((share_of(found.name_of[file]), text))
            room = None if room is None else room - len(text.encode())
    if not texts:
        first = "".join(f"; {file} is {what}" for file, what in list(left_out.items())[:1])
        raise with_way_out(
            ValueError(
                f"the corpus {found.name or 'of no paths'} has no text: {number_of(num_read, 'file')}, "
                f"{len(left_out)} not UTF-8 text, {num_empty} empty"
            ),
            f"Name files, or folders with files, of UTF-8 text, JSON lines or Parquet{first}",
        )
    warn_of_left_out(left_out, num_read, found.named)
    if len(texts) == 1:
        train_text, held_out_text = _cut_end(texts[0][1], held_out_fraction, found.name)
        return Corpus(found.name, [train_text], [held_out_text], len(left_out), is_cut=True)
    threshold = held_out_threshold([share for share, _ in texts], held_out_fraction)
    if threshold <= min(share for share, _ in texts):
        # All files have one name, so the order decides.
        all_texts = [text for _, text in texts]
        return Corpus(found.name, all_texts[1:], all_texts[:1], len(left_out))
    train_texts = [text for share, text in texts if share >= threshold]
    held_out_texts = [text for share, text in texts if share < threshold]
    return Corpus(found.name, train_texts, held_out_texts, len(left_out))


def split_documents(
    texts: Iterable[str], fraction: float, is_enough: Callable[[int, int], bool], name: str
) -> tuple[Corpus, float]:
    """Hold documents out by a digest of their text: copies are on one side, and the same ones everywhere.

    Args:
        texts: Of the documents, "" for empty ones, which are skipped and counted.
        fraction: The chance of each.
        is_enough: Asked after each document with the bytes to train on and those held out; True ends the reading.
        name: The corpus's.

    Returns:
        The texts that were read, and the share below which a document is held out.

    Raises:
        ValueError: Fewer than two documents have text.
    """
    found: list[tuple[float, str]] = []
    num_empty, sizes = 0, [0, 0]
    for text in texts:
        if not text:
            num_empty += 1
            continue
        found.append((share_of(text), text))
        sizes[found[-1][0] < fraction] += len(text.encode())
        if is_enough(*sizes):
            break
    if len(found) < 2:
        without = f", and {num_empty} without text" if num_empty else ""
        raise with_way_out(
            ValueError(f"the corpus {name} has {len(found)} documents{without}"), "one is held out, so add text"
        )
    threshold = held_out_threshold([share for share, _ in found], fraction)
    training = [text for share, text in found if share >= threshold]
    held_out = [text for share, text in found if share < threshold]
    return Corpus(name, training, held_out, unit="documents", num_empty=num_empty), threshold


def in_order(name_of: dict[Path, str]) -> list[Path]:
    """Sort files as their names decide, or of two with one name (below different folders) their paths."""
    return sorted(name_of, key=lambda file: (share_of("order of " + name_of[file]), str(file)))


def held_out_threshold(shares: Sequence[float], fraction: float) -> float:
    """Return below which share something is held out: at least the smallest of these is, and the largest isn't."""
    return min(max(fraction, float(np.nextafter(min(shares), 1))), max(shares))


def share_of(name: str) -> float:
    """A number from 0 to 1 that a file's name decides, the same on every machine."""
    # A name needn't be UTF-8; fsencode gives the bytes that the disk has.
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def read_text(path: Path, max_bytes: int | None) -> str | None:
    """Return the file's text, at most `max_bytes` of it, or None where it isn't UTF-8 text."""
    with opened(path) as file:
        raw = file.read(-1 if max_bytes is None else max_bytes)
        return decoded(raw, max_bytes is None or not file.read(1))


def _cut_end(text: str, fraction: float, name: str) -> tuple[str, str]:
    """(what is trained on, the end that is held out): cut at the line's border nearest to that fraction, unless it
    would make the end less than half or more than one and a half times as long."""
    wanted = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    reach = (len(text) - wanted) // 2
    borders = [text.rfind("\n", max(wanted - reach, 0), wanted) + 1, text.find("\n", wanted, wanted + reach) + 1]
    for cut in [*sorted(filter(None, borders), key=lambda border: abs(border - wanted)), wanted]:
        if text[:cut].strip() and text[cut:].strip():
            return text[:cut], text[cut:]
    raise with_way_out(
        ValueError(
            f"the corpus {name} is one file of {len(text)} characters, and the last {fraction:.0%} of it can't be "
            "held out: one of the parts would be empty"
        ),
        "Add text",
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


def encode_with_ends(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    separator_id: int | None,
    batch: int = 256,
    advance: Callable[[int], Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `encode`, and how many characters there are up to each token's end, int64; a separator is one character,
    also where a tokenizer has none.

    Raises `ValueError` for a tokenizer that doesn't say where its tokens are.
    """
    backend: Any = tokenizer if hasattr(tokenizer, "encode_batch") else getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch"):
        raise with_way_out(
            ValueError(f"{type(tokenizer).__name__} doesn't say which characters a token spans"),
            "name a tokenizer that has a tokenizer.json",
        )
    ids, ends, before = [], [], 0
    for start in range(0, len(texts), batch):
        chunk = list(texts[start : start + batch])
        with _whole_texts(backend):
            encodings = backend.encode_batch(chunk, add_special_tokens=False)
        for text, encoding in zip(chunk, encodings, strict=True):
            tail = [] if separator_id is None else [separator_id]
            ids.append(np.array([*encoding.ids, *tail], dtype=np.int32))
            within = [end for _, end in encoding.offsets] + [len(text) + 1] * len(tail)
            ends.append(np.array(within, dtype=np.int64) + before)
            before += len(text) + 1
        if advance is not None:
            advance(sum(map(len, chunk)))
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty.astype(np.int32), *ids]), np.concatenate([empty, *ends])


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
            raise with_way_out(
                ValueError(f"the text has {len(token_ids)} tokens, less than one sequence of {sequence_length}"),
                "take more text or a shorter sequence_length",
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
