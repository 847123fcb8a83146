"""Corpora of any size, read as needed -> blocks of tokens, packed, shuffled, resumable.

    files or a hub name ──open_documents──▶ documents ──tokenizer──▶ one line of tokens, cut ──buffer──▶ blocks

Documents are those of files (sense_v2.hf.data.documents), or what `datasets` streams from the hub. They are put one
behind the other and cut into blocks of one length. `position_ids` begin anew with each document, so that
neither attention nor n-grams reach from one into the next.

Order: the files' from the seed (by `datasets`), then blocks are drawn at random from a buffer. All of it is decided
by the seed, and where it stands is a small state: the place among the documents, the buffer, the generator. Nothing
is read twice to go on in the middle.

T block length.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from sense_v2.core.errors import MissingPackageError, with_way_out
from sense_v2.engram.table.disk import new_file, write_at
from sense_v2.hf.data.corpus_files import find_corpus, warn_of_left_out
from sense_v2.hf.data.documents import Part, document_parts, streamed, text_of

# States are kept every so many blocks: a Trainer has read some batches ahead of the step that it saves.
BLOCKS_BETWEEN_STATES = 256
STATES_KEPT = 8
STREAM_FILE = "stream.safetensors"

HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")
"""user/dataset, or user/dataset:configuration."""

Source = str | Path | Sequence[str | Path]


def is_hub_dataset(paths: Sequence[str | Path]) -> bool:
    """Whether a corpus is the name of a dataset on the hub: no path, and in no folder that is there."""
    if len(paths) != 1 or not HUB_NAME.fullmatch(str(paths[0])):
        return False
    path = Path(paths[0])
    return not path.exists() and not path.parent.exists()


def sources(source: Source) -> list[str | Path]:
    """Return the paths, or the one name, that a corpus is."""
    return [source] if isinstance(source, (str, Path)) else list(source)


def hub_dataset(source: Source) -> tuple[str, dict[str, str]] | None:
    """Return (name, options) of a corpus on the hub, as `datasets.load_dataset` takes them; None for files."""
    paths = sources(source)
    is_word = len(paths) == 1 and isinstance(paths[0], str) and re.fullmatch(r"[\w-]+", paths[0])
    if not is_hub_dataset(paths) and not (is_word and not Path(paths[0]).exists()):
        return None
    name, _, configuration = str(paths[0]).partition(":")
    return name, {"name": configuration} if configuration else {}


def open_documents(source: Source, *, text_column: str = "text", split: str = "train", **options: Any) -> Any:
    """A `datasets.IterableDataset` of a corpus that is never loaded whole.

    `source`: files or folders (text, or JSON and Parquet with their text in `text_column`; Parquet of token ids), or
    the name of a dataset on the hub, for which `options` go to `datasets.load_dataset`. A text file is one document,
    or of several MiB: pieces of one MiB, cut where a line ends; bytes that aren't UTF-8 become U+FFFD. A document
    without text is "".

    Raises `ValueError` for text beside documents, a column that isn't there or isn't text, and folders without files,
    `MissingPackageError` without `datasets`.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "streaming a corpus needs the package datasets", 'pip install "sense-v2[stream]" installs it'
        ) from error
    hub = hub_dataset(source)
    if hub is not None:
        return datasets.load_dataset(hub[0], split=split, streaming=True, **hub[1], **options)
    return streamed(parts_of(source, text_column))


def parts_of(source: Source, text_column: str, *, tokens: bool = True) -> list[Part]:
    """Return the parts of a corpus's files, as `document_parts`, and warn of files that are none of its."""
    found = find_corpus(sources(source))
    parts = document_parts(found, text_column, tokens=tokens)
    if not parts:
        what = "".join(f"; {file} is {kind}" for file, kind in list(found.left_out.items())[:1])
        raise with_way_out(
            ValueError(f"a corpus is files of text, JSON lines or Parquet; {found.name} has none{what}"),
            "Name others, or folders with files",
        )
    warn_of_left_out(found.left_out, len(found.name_of), found.named)
    return parts


class ResumableStream(torch.utils.data.IterableDataset):
    """A dataset of blocks that knows where it stands. A state is JSON, but for NumPy arrays on its first level."""

    def state_dict(self, num_blocks: int) -> dict[str, Any]:
        """Return where the stream stood after its first `num_blocks` blocks, in what it is iterated now."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any], *, skipped_again: bool = False) -> None:
        """Let the next iteration go on from there.

        Args:
            state: What `state_dict` returned.
            skipped_again: Whether to first hand out as many blocks of zeros as were read before: a Trainer that
                resumes skips these unseen.

        Raises:
            ValueError: The state is of another stream.
        """
        raise NotImplementedError


class PackedStream(ResumableStream):
    """Blocks {input_ids, position_ids, labels}, each int64 [T], without end: after the last document the first comes
    again, in another order. What a Trainer takes as its train_dataset (with max_steps).

    `documents` is what `open_documents` gives, or any `datasets.IterableDataset`; `text_column` names its text, or
    `token_column` token ids that are there already. `separator_id` comes behind each document. `buffer_blocks` is
    how many blocks are drawn from; 1 keeps the documents' order.

    A label is the block's own token, and -100 at the beginning of a document: nothing foretells it.

    `state_dict(n)` is where the stream stands after its first n blocks. Not for a DataLoader with workers, which
    would read a copy each.

    Raises `ValueError` where a whole round of documents holds no block.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: Any = None,
        *,
        sequence_length: int,
        separator_id: int | None = None,
        text_column: str = "text",
        token_column: str | None = None,
        seed: int = 0,
        buffer_blocks: int = 1024,
    ) -> None:
        if (tokenizer is None) == (token_column is None):
            raise with_way_out(
                ValueError("PackedStream: nothing makes token ids"),
                "give a tokenizer, or the token_column that has token ids already",
            )
        if sequence_length < 2 or buffer_blocks < 1:
            raise ValueError(
                f"PackedStream: sequence_length = {sequence_length} must be at least 2, buffer_blocks = "
                f"{buffer_blocks} at least 1"
            )
        self.tokenizer, self.text_column, self.token_column = tokenizer, text_column, token_column
        self.separator_id, self.sequence_length = separator_id, sequence_length
        self.seed, self.buffer_blocks = seed, buffer_blocks
        # Shards (files) in another order each epoch; blocks are shuffled here, in a buffer whose state can be kept.
        self.documents = documents.shuffle(seed=seed, buffer_size=1) if buffer_blocks > 1 else documents
        self._start: dict[str, Any] | None = None
        self._states: list[dict[str, Any]] = []
        self._placeholders = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            raise with_way_out(
                ValueError("PackedStream: each worker would read all of it"), "use dataloader_num_workers=0"
            )
        placeholders, self._placeholders = self._placeholders, 0
        nothing = torch.zeros(self.sequence_length, dtype=torch.int64)
        for _ in range(placeholders):
            yield {"input_ids": nothing, "position_ids": nothing, "labels": nothing}
        state = self._start or self._first_state()
        blocks = self._blocks(copy.deepcopy(state))
        for _ in range(state["skip"]):
            next(blocks)
        yield from blocks

    def take(self, num_blocks: int) -> list[dict[str, torch.Tensor]]:
        """The first blocks, as a list: for evaluation, of a stream of its own."""
        blocks = iter(self)
        return [next(blocks) for _ in range(num_blocks)]

    # Where it stands.

    def state_dict(self, num_blocks: int) -> dict[str, Any]:
        known = [state for state in self._states if state["num_blocks"] <= num_blocks]
        state = copy.deepcopy(known[-1] if known else self._start or self._first_state())
        state["skip"] = num_blocks - state["num_blocks"]
        return state

    def load_state_dict(self, state: dict[str, Any], *, skipped_again: bool = False) -> None:
        own = self._description()
        for name, value in state["stream"].items():
            if own[name] != value:
                raise ValueError(f"this stream has {name} = {own[name]!r}, the one that was saved {value!r}")
        self._start, self._states = copy.deepcopy(state), []
        self._placeholders = state["num_blocks"] + state["skip"] if skipped_again else 0

    def _description(self) -> dict[str, Any]:
        return {
            "sequence_length": self.sequence_length,
            "separator_id": self.separator_id,
            "seed": self.seed,
            "buffer_blocks": self.buffer_blocks,
        }

    def _first_state(self) -> dict[str, Any]:
        return {
            "stream": self._description(),
            "num_blocks": 0,
            "skip": 0,
            "epoch": 0,
            "documents": None,
            "generator": np.random.default_rng(self.seed).bit_generator.state,
            "tail": np.empty((0, 2), dtype=np.int64),
            "buffer": np.empty((0, self.sequence_length, 2), dtype=np.int64),
        }

    # Documents to blocks.

    def _blocks(self, state: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
        """From `state` on. A token and its position go together: [..., 2]."""
        generator = np.random.default_rng()
        generator.bit_generator.state = state["generator"]
        tail, buffer = state["tail"], list(state["buffer"])
        num_blocks, epoch = state["num_blocks"], state["epoch"]
        next_state = num_blocks + BLOCKS_BETWEEN_STATES
        self._restore_documents(state["documents"], epoch)
        while True:
            before = num_blocks, len(buffer)
            for document in self.documents:
                tail = np.concatenate([tail, self._tokens(document)])
                while len(tail) >= self.sequence_length:
                    buffer.append(tail[: self.sequence_length])
                    tail = tail[self.sequence_length :]
                    if len(buffer) < self.buffer_blocks:
                        continue
                    chosen = int(generator.integers(len(buffer)))
                    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                    num_blocks += 1
                    yield self._block(buffer.pop())
                if num_blocks >= next_state:
                    next_state = num_blocks + BLOCKS_BETWEEN_STATES
                    self._keep(state, num_blocks, epoch, self.documents.state_dict(), generator, tail, buffer)
            if before == (num_blocks, len(buffer)):
                raise ValueError(
                    f"all documents together have {len(tail)} tokens, less than one block of {self.sequence_length}"
                )
            epoch += 1
            self._restore_documents(None, epoch)

    def _restore_documents(self, state: Any, epoch: int) -> None:
        self.documents.set_epoch(epoch)
        # A state of an earlier epoch would be gone on from.
        logger = logging.getLogger("datasets.iterable_dataset")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of a buffer of examples, which has none to lose here
        try:
            self.documents.load_state_dict(self._documents_start if state is None else state)
        finally:
            logger.setLevel(level)

    @property
    def _documents_start(self) -> Any:
        if not hasattr(self, "_fresh_documents"):
            self._fresh_documents = copy.deepcopy(self.documents.state_dict())
        return copy.deepcopy(self._fresh_documents)

    def _keep(
        self,
        first: dict[str, Any],
        num_blocks: int,
        epoch: int,
        documents: Any,
        generator: np.random.Generator,
        tail: np.ndarray[Any, Any],
        buffer: list[np.ndarray[Any, Any]],
    ) -> None:
        state = {
            **first,
            "num_blocks": num_blocks,
            "skip": 0,
            "epoch": epoch,
            "documents": copy.deepcopy(documents),
            "generator": copy.deepcopy(generator.bit_generator.state),
            "tail": tail.copy(),
            "buffer": np.array(buffer).reshape(-1, self.sequence_length, 2),
        }
        self._states = [*self._states[-STATES_KEPT + 1 :], state]

    def _tokens(self, document: dict[str, Any]) -> np.ndarray[Any, Any]:
        """Token ids and positions of a document, [its length, 2]."""
        if self.token_column is not None:
            ids = list(document[self.token_column])
        elif not (text := text_of(document, self.text_column)):
            ids = []
        elif hasattr(self.tokenizer, "encode_batch"):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if self.separator_id is None or not ids else [*ids, self.separator_id]
        return np.stack([np.array(ids, dtype=np.int64), np.arange(len(ids), dtype=np.int64)], axis=1)

    def _block(self, block_T2: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        input_ids, positions = torch.from_numpy(block_T2.copy()).unbind(1)
        # A document that began in an earlier block begins anew in this one.
        later = (positions == 0).cumsum(0) > 0
        position_ids = torch.where(later, positions, positions - positions[0])
        labels = input_ids.masked_fill(position_ids == 0, -100)
        return {"input_ids": input_ids.clone(), "position_ids": position_ids, "labels": labels}


class StreamBatches:
    """token_ids_BT of a stream's blocks, as `Batches` gives them of a text in memory: a document that begins inside
    of a block is behind its separator, no more."""

    def __init__(self, stream: PackedStream, *, batch_size: int) -> None:
        self.stream = stream
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        blocks = iter(self.stream)
        while True:
            yield torch.stack([next(blocks)["input_ids"] for _ in range(self.batch_size)])

    def state_dict(self, num_batches: int) -> dict[str, Any]:
        """Return where they stand after the first `num_batches`, as a `ResumableStream`'s."""
        return self.stream.state_dict(num_batches * self.batch_size)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on there. Raises `ValueError` where they are of another stream."""
        self.stream.load_state_dict(state)


def save_stream(state: dict[str, Any], folder: Path) -> None:
    """Writes a stream's state to `folder/stream.safetensors`."""
    arrays = {name: torch.from_numpy(value) for name, value in state.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in state.items() if name not in arrays}
    with new_file(folder / STREAM_FILE, replace=True) as fd:
        write_at(fd, to_safetensors(arrays, metadata={"state": json.dumps(rest)}), 0)


def load_stream(folder: Path) -> dict[str, Any]:
    """What `save_stream` wrote."""
    with safe_open(folder / STREAM_FILE, framework="np") as file:
        state = json.loads(file.metadata()["state"])
        return {**state, **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118  # no mapping
