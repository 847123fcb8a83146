"""A corpus -> files of token ids, and which rows it looks up, by many workers.

    documents ──Tokenize──▶ token ids of each ──CountRows──▶ partial counts ──merged──▶ RowCounts

A piece of work is a function from one Arrow table to another that knows nothing of who calls it: processes of one
machine, or a Ray cluster (sense_v2.hf.data.workers). A document is a sequence of its own, so it doesn't matter which
worker meets it, beside what: the merged counts are those of one process, exactly.

A document longer than `PIECE_TOKENS` is hashed in pieces that know the tokens before them, in bounded memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import compressed_pad_id
from sense_v2.engram.table.disk import write_file
from sense_v2.engram.table.format import Manifest
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.engram.upkeep.hot_rows import RowCounts
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.data.corpus_files import TOKENS_FILE
from sense_v2.hf.data.documents import TOKEN_COLUMN, text_of
from sense_v2.hf.data.workers import Processes, RayCluster, columns_of
from sense_v2.hf.saving.folder import CONFIG_FILE, MEMORY_FOLDER, memory_paths
from sense_v2.hf.saving.publishing import locked_folder

PIECE_TOKENS = 1 << 16
HELD_OUT_SHARE = 0.1


# The work: from one Arrow table to another.


@dataclass
class Tokenize:
    """{text} -> {input_ids}: the token ids (int32) of each document, `separator_id` behind them; none of an empty
    one."""

    tokenizer: Any
    """A `tokenizers.Tokenizer` or one of transformers; it travels to the workers."""
    separator_id: int | None = None
    text_column: str = "text"

    def __call__(self, documents: Any) -> Any:
        import pyarrow

        if self.text_column in documents.column_names:
            documents = documents.select([self.text_column])
        texts = [text_of(row, self.text_column) for row in documents.to_pylist()]
        ids = [encode([text] if text else [], self.tokenizer, separator_id=self.separator_id) for text in texts]
        return pyarrow.table({TOKEN_COLUMN: pyarrow.array(ids, type=pyarrow.list_(pyarrow.int32()))})


class CountRows:
    """{input_ids} -> {row_id, count, held_out}: each row that these documents look up, and how often.

    Held-out documents are counted apart; a document's tokens decide whether it is one. `folder` is that of a model
    with memory; a worker opens it once, when it first works.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._hash_rows: Callable[[np.ndarray[Any, Any]], Iterator[np.ndarray[Any, Any]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_hash_rows": None}

    def __call__(self, documents: Any) -> Any:
        import pyarrow

        if self._hash_rows is None:
            self._hash_rows = row_hasher(Path(self.folder))
        counted = RowCounts(), RowCounts()
        for token_ids in documents.column(TOKEN_COLUMN):
            token_ids_T = np.array(token_ids.values, dtype=np.int64)  # Arrow's own memory can't be written to
            counts = counted[is_held_out(token_ids_T)]
            for row_ids in self._hash_rows(token_ids_T):
                counts.add(row_ids)
        parts = [counts.hottest() for counts in counted]
        return pyarrow.table(
            {
                "row_id": np.concatenate([ids for ids, _ in parts]),
                "count": np.concatenate([numbers for _, numbers in parts]),
                "held_out": np.repeat([False, True], [len(ids) for ids, _ in parts]),
            }
        )


def is_held_out(token_ids_T: np.ndarray[Any, Any]) -> bool:
    """True for the tenth of all documents that a profile is judged by; the tokens decide, everywhere alike."""
    digest = hashlib.sha256(token_ids_T.astype("<i8").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def row_hasher(folder: Path) -> Callable[[np.ndarray[Any, Any]], Iterator[np.ndarray[Any, Any]]]:
    """Return a function: a document's token_ids_T -> the row ids of all memory layers, in pieces."""
    config, shadow_map, _ = read_memory(folder)
    hashers = memory_hashers(config, shadow_map)

    def hash_rows(token_ids_T: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        back = max(config.ngram_orders) - 1
        history_BP: torch.Tensor | None = None
        for at in range(0, len(token_ids_T), PIECE_TOKENS):
            compressed_BT = shadow_map(torch.from_numpy(token_ids_T[None, at : at + PIECE_TOKENS]))
            for hasher in hashers:
                yield hasher(compressed_BT, history=history_BP).numpy()
            history_BP = compressed_BT[:, -back:]

    return hash_rows


def read_memory(folder: Path) -> tuple[EngramConfig, EngramTokenizer, Manifest]:
    """Return a memory's settings, shadow map and manifest, without opening the table.

    Raises `FileNotFoundError` if the folder has no memory.
    """
    path = folder / MEMORY_FOLDER / CONFIG_FILE
    if not path.is_file():
        raise with_way_out(
            FileNotFoundError(f"{folder}: no model with memory there"),
            "name a folder that `sense-engram train` wrote",
        )
    table, map_path = memory_paths(folder)
    return EngramConfig.load(path), EngramTokenizer(map_path), read_manifest(TableFiles(table).manifest)


def memory_hashers(config: EngramConfig, shadow_map: EngramTokenizer) -> list[NgramHasher]:
    """One hasher a memory layer, in the order of `config.layer_indices`."""
    return [
        NgramHasher.from_config(
            config,
            layer_id=layer_id,
            compressed_vocab_size=shadow_map.compressed_vocab_size,
            pad_id=compressed_pad_id(config, shadow_map, None),
        )
        for layer_id in config.layer_indices
    ]


# All of a corpus.


@dataclass
class RowProfile:
    """Which rows a corpus looks up."""

    trained: RowCounts
    held_out: RowCounts
    """Of the documents that a hot set is judged by."""


def tokenize_corpus(
    source: str | Path | Sequence[str | Path],
    tokenizer: Any,
    output: str | Path,
    *,
    workers: Processes | RayCluster,
    separator_id: int | None = None,
    text_column: str = "text",
    split: str = "train",
) -> dict[str, Any]:
    """Write the token ids of each document to Parquet files, and tokens.json, which says what they are.

    `PackedStream(open_documents(output), token_column="input_ids")` trains on them.

    Args:
        source: What `open_documents` takes.
        tokenizer: A `tokenizers.Tokenizer`, or one of transformers.
        output: The new folder; nothing is left there if this fails.
        workers: Who works.
        separator_id: The token behind each document.
        text_column: Where documents have their text.
        split: Of a dataset.

    Returns:
        The content of tokens.json.

    Raises:
        FileExistsError: `output` is there already.
        CommandError: Another process is making it.
    """
    output = Path(output)
    work = [Tokenize(tokenizer, separator_id, text_column)]
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with locked_folder(unfinished):
        try:
            if output.exists():
                raise with_way_out(FileExistsError(f"{output} is there already"), "name a new folder, or remove it")
            for left in unfinished.iterdir():  # by a process that was killed
                left.unlink()
            workers.write(source, work, unfinished, text_column=text_column, split=split)
            documents, empty, tokens = _count_tokens(unfinished)
            description = {
                "format": "sense-engram tokens",
                "format_version": 1,
                "documents": documents,
                "empty_documents": empty,
                "tokens": tokens,
                "separator_id": separator_id,
                "tokenizer_sha256": tokenizer_digest(tokenizer),
            }
            write_file(unfinished / TOKENS_FILE, json.dumps(description, indent=2) + "\n")
            unfinished.rename(output)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return description


def profile_rows(
    source: str | Path | Sequence[str | Path],
    folder: str | Path,
    tokenizer: Any,
    *,
    workers: Processes | RayCluster,
    separator_id: int | None = None,
    text_column: str = "text",
    split: str = "train",
) -> RowProfile:
    """Count how often a corpus looks up each row of a model's table.

    Args:
        source: What `open_documents` takes, or what `tokenize_corpus` wrote.
        folder: The model's.
        tokenizer: The model's.
        workers: Who works.
        separator_id: The token behind each document.
        text_column: Where documents have their text.
        split: Of a dataset.

    Raises:
        ValueError: The tokens are another tokenizer's.
        FileNotFoundError: The model has no memory.
    """
    read_memory(Path(folder))  # what is wrong with it is said here, not by every worker
    work: list[Any] = [CountRows(folder)]
    if TOKEN_COLUMN in columns_of(source, text_column, split=split):
        _check_tokens(source, tokenizer)
    else:
        work.insert(0, Tokenize(tokenizer, separator_id, text_column))
    profile = RowProfile(RowCounts(), RowCounts())
    with workers.tables(source, work, text_column=text_column, split=split) as tables:
        for table in tables:
            ids, counts, held_out = (table.column(name).to_numpy() for name in ("row_id", "count", "held_out"))
            profile.trained.add_counted(ids[~held_out], counts[~held_out])
            profile.held_out.add_counted(ids[held_out], counts[held_out])
    return profile


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's ids: its tokenizer.json, or else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    whole = backend.to_str() if hasattr(backend, "to_str") else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _check_tokens(source: str | Path | Sequence[str | Path], tokenizer: Any) -> None:
    """Refuse tokens of another tokenizer, if the folder says whose they are."""
    for path in [source] if isinstance(source, (str, Path)) else source:
        described = Path(path) / TOKENS_FILE
        if not described.is_file():
            continue
        found = json.loads(described.read_text(encoding="utf-8")).get("tokenizer_sha256")
        if found != tokenizer_digest(tokenizer):
            raise with_way_out(
                ValueError(
                    f"{path} has the tokens of another tokenizer ({found}) than the model's "
                    f"({tokenizer_digest(tokenizer)})"
                ),
                "tokenize the corpus with the model's",
            )


def _count_tokens(folder: Path) -> tuple[int, int, int]:
    """Return the number of documents with tokens, of those without, and of tokens in a folder's Parquet files."""
    import pyarrow.compute
    import pyarrow.parquet

    documents = empty = tokens = 0
    for path in sorted(folder.glob("*.parquet")):
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[TOKEN_COLUMN]):
                lengths = pyarrow.compute.list_value_length(batch.column(0))
                with_tokens = pyarrow.compute.sum(pyarrow.compute.greater(lengths, 0)).as_py() or 0
                documents, empty = documents + with_tokens, empty + batch.num_rows - with_tokens
                tokens += pyarrow.compute.sum(lengths).as_py() or 0
    return documents, empty, tokens
