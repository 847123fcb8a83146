"""A memory that nothing was ever written to -> one that takes facts in rows alone

Facts that nobody needs, of invented people, are learned by fusion layers and rows together; then the rows are let go
of. What stays is fusion layers that carry what rows say to the model, and the table, which is the same bytes as
before. Biases stay as they are, so a row of zeros is still silent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import device_of, saved_tokenizer
from sense_v2.hf.facts.facts_file import Fact, read_facts
from sense_v2.hf.facts.made_up import made_up_facts
from sense_v2.hf.facts.teach_facts import Descent, refuse_other_tokenizer, schedule, shuffled
from sense_v2.hf.facts.wordings import questions_of, subject_rows
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay, overlay_of, remove_overlay
from sense_v2.hf.saving.backbone_facts import BACKBONE_FILE
from sense_v2.hf.saving.backbone_facts import read_facts as read_backbone_facts
from sense_v2.hf.saving.folder import MEMORY_FOLDER
from sense_v2.hf.saving.save import save_pretrained

FUSION_RATE, ROW_RATE = 3e-3, 0.2
NUM_FACTS, STEPS = 176, 250


def make_writable(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    facts: Sequence[Fact] | None = None,
    steps: int = STEPS,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[float]:
    """Train the fusion layers until they carry facts, on facts whose rows are let go of afterwards.

    `save_pretrained` keeps the result; from then on `teach_facts` changes rows alone.

    Args:
        model: With memory attached, its table opened with mode "r".
        tokenizer: The model's.
        facts: To train on; by default 176 that are made up.
        steps: Batches.
        batch_size: Questions of a batch.
        seed: Of the facts and their order.
        progress: Told how far it is.

    Returns:
        The loss of each step, in nats a token.

    Raises:
        ValueError: There is an overlay, whose rows would then mean something else; or the tokenizer is another's.
        FloatingPointError: The loss isn't finite; the fusion layers are what they were.
    """
    memory = memory_of(model)
    refuse_other_tokenizer(memory, tokenizer)
    if overlay_of(model) is not None:
        raise with_way_out(
            ValueError("this model has an overlay, whose rows would say something else behind other fusion layers"),
            "remove_overlay(model) first",
        )
    questions = questions_of(made_up_facts(NUM_FACTS, seed=seed) if facts is None else facts, tokenizer)
    rows = subject_rows(memory, questions)
    weights = [one for name, one in memory.layers.named_parameters() if not name.endswith("bias")]
    were = [one.detach().clone() for one in weights]
    overlay = add_overlay(model)
    descent = Descent(model, overlay, rows.row_ids_U, weights=weights, fusion_lr=FUSION_RATE)
    batches = shuffled([one for one in questions if not one.held_out], batch_size, seed)
    try:
        with descent, progress("teaching fusion layers", steps, unit="steps") as advance:
            for step in range(1, steps + 1):
                descent.step(next(batches), ROW_RATE * schedule(step, steps), schedule(step, steps))
                advance(1)
    except BaseException:
        for one, old in zip(weights, were, strict=True):
            one.data.copy_(old)
        raise
    finally:
        remove_overlay(model)
    return descent.losses


def make_folder_writable(
    folder: str | Path,
    output: str | Path,
    *,
    facts_file: str | Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Save a model again with fusion layers that carry facts; the first folder stays as it is.

    Args:
        folder: The model's.
        output: A new folder. The table is copied to it (a reflink where the file system has them).
        facts_file: To train on, as `read_facts` reads it, in place of made-up ones.
        device: Where the model runs, as `device_of` takes it.
        **options: Those of `make_writable`.

    Returns:
        What JSON can hold: "model", "output", "layers", "steps", "loss" (first, and the mean of the last ten) and
        "seconds".

    Raises:
        FileExistsError: `output` is there.
        ValueError: As `read_facts`, `from_pretrained` and `make_writable`.
    """
    started = time.perf_counter()
    folder, output = Path(folder), Path(output)
    if output.exists():
        raise with_way_out(FileExistsError(f"{output} is there already"), "Choose a new folder")
    facts = None if facts_file is None else read_facts(facts_file)
    place = device_of(device)
    model = from_pretrained(folder)
    try:
        model.to(place)
        tokenizer = saved_tokenizer(folder)
        losses = make_writable(model, tokenizer, facts=facts, **options)
        reference = read_backbone_facts(folder / MEMORY_FOLDER / BACKBONE_FILE).get("reference")
        save_pretrained(model, output, tokenizer=tokenizer, backbone=reference)
        return {
            "model": str(folder),
            "output": str(output),
            "layers": [fusion.layer_id for fusion in memory_of(model)],
            "steps": len(losses),
            "loss": [losses[0], float(np.mean(losses[-10:]))],
            "seconds": time.perf_counter() - started,
        }
    finally:
        detach_engram(model)
