"""A saved model's memory -> a memory for another tokenizer: rows follow the text that they were trained on.

    model, tokenizer, corpus ──▶ the n-grams that both tokenizers cut alike ──▶ their rows, in a new table

Row ids are hashes of token ids, so a table means nothing to another tokenizer. But where both cut a text at the same
places, an n-gram of the one is an n-gram of the other, and its rows can be copied, head by head
(`sense_v2.engram.upkeep.carried_ngrams`). All other rows start as a new table's do. The new table has as many rows of
the same width; the fusion layers' weights don't depend on the tokenizer and are copied.

    output/engram/…           the memory: configuration, table, shadow map, fusion layers
    output/tokenizer.json, …  the tokenizer

There is no model in it: `from_pretrained(output, backbone=model)` attaches the memory to one with that tokenizer.
The folder gets its name when all of it is there. Optimizer state isn't carried over, and neither are the n-grams at a
sequence's beginning.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from sense_v2.core.config import ROW_DTYPES, EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.model import open_table
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.disk import copy_file, rename, sync, write_file
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.upkeep.carried_ngrams import CarriedNgrams, Tokens, carry_ngrams, rows_to_copy
from sense_v2.engram.variants import VARIANTS
from sense_v2.hf.backbones import saved_tokenizer, separator_id
from sense_v2.hf.data.corpus import encode_with_ends, read_corpus
from sense_v2.hf.data.preparing import memory_hashers
from sense_v2.hf.saving.backbone_facts import BACKBONE_FILE, read_facts, tokenizer_facts
from sense_v2.hf.saving.folder import (
    CONFIG_FILE,
    FUSION_FILE,
    MAP_FILE,
    MEMORY_FOLDER,
    OVERLAY_FILE,
    TABLE_FILE,
    check_folder,
    table_of,
)
from sense_v2.hf.saving.publishing import locked_folder

# Rows that are copied at a time.
PART_ROWS = 1 << 16
# What is known of the model, and holds whatever the tokenizer.
_KEPT_FACTS = ("model_type", "architecture", "hidden_size", "num_hidden_layers", "dtype", "weights", "sense_v2",
               "transformers")  # fmt: skip


@dataclass(frozen=True)
class ChangedTokenizer:
    """What was carried over."""

    path: Path
    """The new table."""
    tokenizer: str
    corpus: str
    new_tokens: int
    """Of the corpus."""
    old_tokens: int
    ngrams: list[CarriedNgrams]
    """One of each order."""
    carried_rows: int
    rows: int
    width: int
    dtype: str
    layers: list[int]
    """Those with fusion layers."""
    hidden_size: int
    """What the fusion layers' weights are for."""


def change_tokenizer(
    folder: str | Path,
    output: str | Path,
    tokenizer: Any,
    *,
    corpus: Sequence[str | Path],
    text_column: str = "text",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> ChangedTokenizer:
    """Make a memory for another tokenizer from a trained model's, with the rows of the n-grams that both have.

    Args:
        folder: The model's; it is only read.
        output: A new folder: all of it, or nothing.
        tokenizer: What `EngramTokenizerBuilder` takes; it has to say which characters its tokens span, as all those
            with a tokenizer.json do.
        corpus: Files or folders: the text whose n-grams are carried over. The part of it that training reads is read;
            the best is what the memory was trained on.
        text_column: Where documents have their text.
        dtype: Of the new rows, by default the old ones'.
        progress: Is told how many characters are tokenised, and how many rows are copied.

    Returns:
        How much was carried over.

    Raises:
        FileExistsError: `output` is there already.
        FileNotFoundError: The model has no memory, or a part of it is missing.
        ValueError: The tokenizer compresses to the model's own map, cuts nothing alike or gives no offsets, the
            variant has no shadow map, the model has an overlay, or rows of `dtype` can't be written to.
        CommandError: Another process is making `output`.
    """
    folder, output = Path(folder), Path(output)
    config, old_table, old_map = _read_source(folder, dtype)
    builder = EngramTokenizerBuilder(tokenizer, normalization=config.normalization)
    name = builder.tokenizer_name or type(tokenizer).__name__
    if builder.description().sha256 == old_map.sha256:
        raise ValueError(
            f"{name} has the shadow map that {folder} has already, so the table serves it as it is: attach the "
            "memory to a model with it, from_pretrained(folder, backbone=model)"
        )
    if not corpus:
        raise with_way_out(
            ValueError("without a corpus no n-grams are known to carry over"), "name text, best what was trained on"
        )
    if isinstance(tokenizer, str | Path):
        tokenizer, _ = load_tokenizer(str(tokenizer))
    text = read_corpus(corpus, text_column=text_column)
    unfinished = output.with_name(f".{output.name}.unfinished")
    memory = unfinished / MEMORY_FOLDER
    unfinished.mkdir(parents=True, exist_ok=True)
    with locked_folder(unfinished):
        try:
            if output.exists():
                raise with_way_out(FileExistsError(f"{output} is there already"), "name a new folder, or remove it")
            if memory.exists():  # of a process that was killed
                shutil.rmtree(memory)
            memory.mkdir()
            builder.build_mapping(memory / MAP_FILE)
            new_config = dataclasses.replace(
                config,
                tokenizer_name=builder.tokenizer_name,
                pad_token_id=None,
                dtype=dtype or config.dtype,
                storage_path=str(memory / TABLE_FILE),
                shadow_map_path=str(memory / MAP_FILE),
            )
            new_map = EngramTokenizer(memory / MAP_FILE)
            new = _tokens(text.train_texts, tokenizer, new_map, progress)
            old = _tokens(text.train_texts, saved_tokenizer(folder), old_map, progress)
            hashers = [memory_hashers(*of) for of in ((new_config, new_map), (config, old_map))]
            orders = sorted(set(config.ngram_orders))
            pads = {"new_pad_id": hashers[0][0].pad_id, "old_pad_id": hashers[1][0].pad_id}
            ngrams = carry_ngrams(new, old, orders, **pads)
            if not any(len(carried.counts_U) for carried in ngrams):
                raise ValueError(
                    f"{name} and the tokenizer of {folder} cut nothing of the corpus {text.name} alike, so there is "
                    "nothing to carry over; a new table serves as well (sense-engram create)"
                )
            parts = [rows_to_copy(carried, *layer) for carried in ngrams for layer in zip(*hashers, strict=True)]
            carried_rows = _copy_rows(
                np.concatenate([rows for rows, _ in parts]),
                np.concatenate([rows for _, rows in parts]),
                old_table,
                open_table(new_config, new_map),
                progress,
            )
            new_config = dataclasses.replace(new_config, storage_path=TABLE_FILE, shadow_map_path=MAP_FILE)
            write_file(memory / CONFIG_FILE, new_config.to_json())
            layers, hidden_size = _copy_fusion(folder / MEMORY_FOLDER, memory)
            _save_tokenizer(tokenizer, unfinished)
            facts = read_facts(folder / MEMORY_FOLDER / BACKBONE_FILE)
            kept = {key: facts[key] for key in _KEPT_FACTS if key in facts}
            write_file(
                memory / BACKBONE_FILE,
                json.dumps({**kept, **tokenizer_facts(tokenizer, unfinished)}, indent=2) + "\n",
            )
            for path in unfinished.rglob("*"):
                if path.is_file():
                    sync(path)
            rename(unfinished, output)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return ChangedTokenizer(
        path=output / MEMORY_FOLDER / TABLE_FILE,
        tokenizer=name,
        corpus=text.name,
        new_tokens=len(new.ends_T),
        old_tokens=len(old.ends_T),
        ngrams=ngrams,
        carried_rows=carried_rows,
        rows=old_table.num_embeddings,
        width=old_table.embedding_dim,
        dtype=new_config.dtype,
        layers=layers,
        hidden_size=hidden_size,
    )


def _read_source(folder: Path, dtype: str | None) -> tuple[EngramConfig, MMapEmbeddingStorage, EngramTokenizer]:
    """The model's configuration, table and shadow map, of which all can be carried over."""
    memory = folder / MEMORY_FOLDER
    if not memory.is_dir():
        raise with_way_out(
            FileNotFoundError(f"{folder}: no model with memory there"),
            "name the model's folder: a table alone doesn't know how its tokenizer cuts text",
        )
    check_folder(folder, needs_model=False)
    config = EngramConfig.load(memory / CONFIG_FILE)
    if not VARIANTS[config.variant].compresses:
        raise ValueError(
            f"{folder}: variant {config.variant!r} takes token ids as they are, without a shadow map, and its table "
            "is of one vocabulary; the variants with a map can change their tokenizer "
            f"({', '.join(name for name, rules in VARIANTS.items() if rules.compresses)})"
        )
    if (memory / OVERLAY_FILE).exists():
        raise with_way_out(
            ValueError(f"{folder} was saved with an overlay, whose rows would be left behind"),
            f"put it into the table first (sense-engram delta apply {memory / OVERLAY_FILE} {folder}), and remove it",
        )
    if (dtype or config.dtype) not in ROW_DTYPES:
        raise with_way_out(
            ValueError(f"rows of {dtype or config.dtype} can't be written to one by one"),
            f"name the new rows' dtype, one of {', '.join(ROW_DTYPES)}, and convert the new table afterwards",
        )
    paths: dict[str, Any] = {"storage_path": str(table_of(memory)), "shadow_map_path": str(memory / MAP_FILE)}
    config, shadow_map = dataclasses.replace(config, **paths), EngramTokenizer(memory / MAP_FILE)
    return config, open_table(config, shadow_map, mode="r"), shadow_map


def _tokens(texts: Sequence[str], tokenizer: Any, shadow_map: EngramTokenizer, progress: Progress) -> Tokens:
    with progress("tokenising", sum(map(len, texts)), unit="characters") as advance:
        ids_T, ends_T = encode_with_ends(texts, tokenizer, separator_id=separator_id(tokenizer), advance=advance)
    return Tokens(shadow_map(ids_T), ends_T)


def _copy_rows(
    new_R: np.ndarray[Any, Any],
    old_R: np.ndarray[Any, Any],
    old_table: MMapEmbeddingStorage,
    new_table: MMapEmbeddingStorage,
    progress: Progress,
) -> int:
    """Copy rows in the new table's order, commit them, and close both tables."""
    order_R = np.argsort(new_R)
    with progress("copying", len(new_R), unit="rows") as advance:
        for start in range(0, len(order_R), PART_ROWS):
            part = order_R[start : start + PART_ROWS]
            rows_UD = old_table(torch.from_numpy(old_R[part])).detach()
            new_table.write(torch.from_numpy(new_R[part]), rows_UD)
            advance(len(part))
    new_table.flush(step=0)
    new_table.close()
    old_table.close()
    return len(new_R)


def _copy_fusion(source: Path, target: Path) -> tuple[list[int], int]:
    """Copy the fusion layers' weights; return which layers there are, and the hidden size that they are for."""
    copy_file(source / FUSION_FILE, target / FUSION_FILE)
    with safe_open(source / FUSION_FILE, framework="pt") as file:
        names = list(file.keys())
        hidden_size = next(file.get_slice(name).get_shape()[0] for name in names if name.endswith("W_v.weight"))
    return sorted({int(name.partition(".")[0]) for name in names}), int(hidden_size)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
