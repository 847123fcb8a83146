"""Files of text -> token ids -> batches, the same ones in the same order from the same seed.

    paths ──read_corpus──▶ training and held-out texts ──encode──▶ one stream of token ids ──Batches──▶ token_ids_BT

Whole files are held out, never parts of one: a model that has seen the first half of a file knows much of the rest.
Which ones depends on their names alone. Text comes as UTF-8; a file that isn't is left out and counted, and a corpus
of nothing but such files is an error.
"""

from __future__ import annotations

import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A file of this share of control characters is no text, even where its bytes are valid UTF-8.
MAX_CONTROL_SHARE = 0.05


@dataclass
class Corpus:
    """Texts, apart: what is trained on, and whole files that are held out."""

    name: str
    train_texts: list[str]
    held_out_texts: list[str]
    files_left_out: int = 0
    """Files that weren't UTF-8 text."""

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

    With `max_bytes`, files are taken in an order that their names decide until that many bytes are read.

    Raises `FileNotFoundError` for a path that isn't there, `ValueError` for a corpus without text, or with too few
    files to hold any out.
    """
    if paths is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files, roots = standard_library(), [root]
        name = "Python standard library"
    else:
        roots = [Path(path) for path in paths]
        files = []
        for path in roots:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or folder; --corpus takes files or folders of text")
            found = path.rglob("*") if path.is_dir() else [path]
            files += sorted(file for file in found if file.is_file() and not _is_hidden(file, path))
        name = ", ".join(path.resolve().name for path in roots)

    train_texts, held_out_texts, left_out, empty = [], [], [], 0
    num_bytes = 0
    if max_bytes is not None:
        files = sorted(files, key=lambda file: _share("order of " + _relative_name(file, roots)))
    for file in files:
        if max_bytes is not None and num_bytes >= max_bytes:
            break
        num_bytes += file.stat().st_size
        text = _read_text(file)
        if text is None:
            left_out.append(file)
        elif not text.strip():
            empty += 1
        elif _share(_relative_name(file, roots)) < held_out_fraction:
            held_out_texts.append(text)
        else:
            train_texts.append(text)
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(files)} files are not UTF-8 text and are left out, {left_out[0]} first",
            UserWarning,
            stacklevel=2,
        )
    if not train_texts and not held_out_texts:
        raise ValueError(
            f"the corpus {name} has no text: {len(files)} files, {len(left_out)} not UTF-8 text, {empty} empty"
        )
    if not held_out_texts and len(train_texts) > 1:
        held_out_texts.append(train_texts.pop())
    if not train_texts and len(held_out_texts) > 1:
        train_texts.append(held_out_texts.pop(0))
    if not held_out_texts or not train_texts:
        # One file: hold out its end, at a line's border.
        (text,) = train_texts or held_out_texts
        cut = text.find("\n", int(len(text) * (1 - held_out_fraction))) + 1 or int(
            len(text) * (1 - held_out_fraction)
        )
        train_texts, held_out_texts = [text[:cut]], [text[cut:]]
    return Corpus(name, train_texts, held_out_texts, len(left_out))


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(root).parts)


def _relative_name(file: Path, roots: list[Path]) -> str:
    for root in roots:
        if file.is_relative_to(root):
            return file.relative_to(root).as_posix() if file != root else file.name
    return file.name


def _share(name: str) -> float:
    """A number from 0 to 1 that a file's name decides, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read_text(path: Path) -> str | None:
    """The file's text, or None where it isn't UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    control = sum(text.count(chr(code)) for code in range(32) if chr(code) not in "\t\n\r\f")
    return None if control > MAX_CONTROL_SHARE * max(len(text), 1) or "\0" in text else text


def encode(texts: Sequence[str], tokenizer: Any, *, separator_id: int | None, batch: int = 256) -> np.ndarray:
    """All texts as one int32 stream of token ids, `separator_id` after each. `tokenizer`: a `tokenizers.Tokenizer`
    or a transformers tokenizer."""
    pieces: list[np.ndarray] = []
    tail = [] if separator_id is None else [separator_id]
    for start in range(0, len(texts), batch):
        chunk = list(texts[start : start + batch])
        if hasattr(tokenizer, "encode_batch"):
            ids = [encoding.ids for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False)]
        else:
            ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array(list(one) + tail, dtype=np.int32) for one in ids]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


class Batches:
    """Blocks of `sequence_length` tokens of a stream, shuffled anew each epoch: iterating yields token_ids_BT (int64)
    without end.

    Raises `ValueError` where the stream holds less than one block.
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

    def __iter__(self) -> Iterator[torch.Tensor]:
        queue: list[int] = []
        epoch = 0
        while True:
            while len(queue) < self.batch_size:
                queue += np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks).tolist()
                epoch += 1
            chosen, queue = queue[: self.batch_size], queue[self.batch_size :]
            yield torch.from_numpy(self.blocks[chosen].astype(np.int64))

    def sample(self, count: int) -> torch.Tensor:
        """`count` blocks, evenly spread over the stream and always the same: for evaluation."""
        chosen = np.linspace(0, self.num_blocks - 1, min(count, self.num_blocks)).astype(int)
        return torch.from_numpy(self.blocks[np.unique(chosen)].astype(np.int64))
