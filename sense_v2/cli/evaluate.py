"""`sense-engram eval`: how well a trained model predicts a text, with its memory and with it taken off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.errors import CommandError
from sense_v2.cli.models import max_positions, open_corpus, open_trained, separator_id
from sense_v2.core.config import Config, TrainConfig
from sense_v2.hf.attach import attached_memory, detach_engram
from sense_v2.hf.corpus import Batches, encode
from sense_v2.hf.evaluation import evaluate
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
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Perplexity and bits per byte of the model in `folder`; returns one dictionary that JSON can hold.

    Reads the files of the corpus that `train` holds out, or all of them (of a corpus that is read while it is trained
    on, a part); `sequences` and `sequence_length` are by
    default those that the model was trained with. Nothing in `folder` changes.

    Raises `CommandError`, and what loading the model and reading the corpus raise.
    """
    started = time.perf_counter()
    folder = Path(folder)
    model, tokenizer = open_trained(folder)
    settings = _settings(folder)
    sequences = sequences or settings.eval_sequences
    limit = max_positions(model)
    length = sequence_length or min(settings.sequence_length, limit or settings.sequence_length)
    if limit is not None and length > limit:
        raise CommandError(
            f"--sequence-length {length}, but {folder} takes {limit} tokens at most", f"{limit}, or less"
        )
    text = open_corpus(corpus, settings, text_column=text_column)
    texts = [*text.train_texts, *text.held_out_texts] if all_files else text.held_out_texts
    token_ids = encode(texts, tokenizer, separator_id=separator_id(tokenizer))
    what = "text" if all_files else "held-out text"
    if len(token_ids) < length:
        raise CommandError(
            f"corpus {text.name}: the {what} has {len(token_ids)} tokens, less than one sequence of {length}",
            "more text, a shorter --sequence-length" + ("" if all_files else ", or --all-files"),
        )
    blocks_BT = Batches(token_ids, batch_size=1, sequence_length=length, seed=0).sample(sequences)

    found = {}
    has_memory = attached_memory(model) is not None
    if has_memory:
        found[WITH] = evaluate(model, blocks_BT, tokenizer=tokenizer)
        if without_memory:
            detach_engram(model)
    if without_memory or not has_memory:
        found[WITHOUT] = evaluate(model, blocks_BT, tokenizer=tokenizer)
    result = {
        "model": str(folder),
        "corpus": {"name": text.name, "files": len(texts), "held_out": not all_files, "tokens": len(token_ids)},
        "sequences": len(blocks_BT),
        "sequence_length": length,
        "tokens": blocks_BT.numel(),
        **{
            measure: {name: getattr(one, measure) for name, one in found.items()}
            for measure in ("loss", "perplexity", "bits_per_byte")
        },
        "seconds": time.perf_counter() - started,
    }
    echo(f"model   {folder}{'' if has_memory else ', which has no memory'}")
    files = f"{len(texts)} {'file' if len(texts) == 1 else 'files'}"
    echo(f"corpus  {text.name}, {what} of {files}; {len(blocks_BT)} sequences of {length} tokens")
    for line in _table(result, list(found)):
        echo(line)
    if len(found) == 2:
        echo(
            "without memory: this backbone, trained with its memory, after it was taken off; not one trained without"
        )
    return result


def _settings(folder: Path) -> TrainConfig:
    """Those that the model was trained with, where `train` has left them."""
    path = folder / "config.yaml"
    return Config.load(path).train if path.is_file() else TrainConfig()


def _table(result: dict[str, Any], names: list[str]) -> list[str]:
    rows = [["", *(name.replace("_", " ") for name in names)]]
    rows.append(["perplexity", *(wording.perplexity(result["perplexity"][name]) for name in names)])
    rows.append(["bits per byte", *(wording.decimals(result["bits_per_byte"][name]) for name in names)])
    return ["  ".join([f"{row[0]:<13}", *(f"{cell:>14}" for cell in row[1:])]) for row in rows]
