"""`sense-engram eval`: how well a model predicts a text, with its memory and without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.output import LOADING, progress_to
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import open_trained
from sense_v2.hf.data.held_out import read_blocks, settings_of
from sense_v2.hf.insight.evaluation import Evaluation, evaluate
from sense_v2.hf.memory import attached_memory, memory_of
from sense_v2.report import wording

WITH, WITHOUT = "with_memory", "without_memory"


def run_eval(
    folder: str | Path,
    *,
    corpus: Sequence[str | Path] | None = None,
    text_column: str = "text",
    sequences: int | None = None,
    sequence_length: int | None = None,
    all_files: bool = False,
    without_memory: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Perplexity and bits per byte of the model in `folder`; returns one dictionary that JSON can hold.

    Reads the files of the corpus that `train` holds out, or all of them (of a corpus that is read while it is trained
    on, a part); `sequences` and `sequence_length` are by default those that the model was trained with. Nothing in
    `folder` changes.

    Raises `CommandError`, and what loading the model and reading the corpus raise.
    """
    started = time.perf_counter()
    folder = Path(folder)
    LOADING.say(f"loading {folder}")
    model, tokenizer = open_trained(folder, device=device, dtype=dtype)
    blocks = read_blocks(
        folder,
        model,
        tokenizer,
        corpus=corpus,
        text_column=text_column,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        progress=progress_to(echo),
    )
    blocks_BT = blocks.token_ids_BT
    has_memory = attached_memory(model) is not None
    echo(f"corpus  {blocks.line()}")
    echo(f"model   {folder}{'' if has_memory else ', which has no memory'}")

    def measure(label: str) -> Evaluation:
        with progress_to(echo)(label, blocks_BT.numel(), unit="tokens") as advance:
            return evaluate(model, blocks_BT, tokenizer=tokenizer, advance=advance)

    found, reading = {}, []
    if has_memory:
        found[WITH] = measure("with memory")
        reading = [storage.stats().summary() for storage in memory_of(model).storages]
        if without_memory:
            detach_engram(model)
    if without_memory or not has_memory:
        found[WITHOUT] = measure("without memory")
    result = {
        "model": str(folder),
        "corpus": blocks.description(),
        "sequences": len(blocks_BT),
        "sequence_length": blocks_BT.shape[1],
        "tokens": blocks_BT.numel(),
        **{
            quantity: {name: getattr(one, quantity) for name, one in found.items()}
            for quantity in ("loss", "perplexity", "bits_per_byte")
        },
        "reading": reading,
        "seconds": time.perf_counter() - started,
    }
    for line in (*_table(result, list(found)), *(f"reading        {wording.reading(one)}" for one in reading)):
        echo(line)
    if len(found) == 2:
        echo(f"without memory: {wording.taken_off(not settings_of(folder).trains_beside_memory)}")
    return result


def _table(result: dict[str, Any], names: list[str]) -> list[str]:
    rows = [["", *(name.replace("_", " ") for name in names)]]
    rows.append(["perplexity", *(wording.perplexity(result["perplexity"][name]) for name in names)])
    rows.append(["bits per byte", *(wording.decimals(result["bits_per_byte"][name]) for name in names)])
    return ["  ".join([f"{row[0]:<13}", *(f"{cell:>14}" for cell in row[1:])]) for row in rows]
