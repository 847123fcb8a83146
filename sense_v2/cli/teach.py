"""`sense-engram delta teach`: a short text into the rows of its n-grams, kept in a small file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sense_v2.core.errors import CommandError
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import saved_tokenizer
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.saving.folder import MEMORY_FOLDER
from sense_v2.hf.training.teaching import teach
from sense_v2.report import wording

SHOWN_TOKENS = 12


def run_teach(
    folder: Path,
    text: str,
    output: Path,
    *,
    prompt: str = "",
    steps: int | None = None,
    lr: float | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Teaches the model in `folder` to go on from `prompt` with `text`; what changes is kept in the delta `output`,
    which may have facts already. Nothing in `folder` changes. Returns one dictionary that JSON can hold.

    Raises `CommandError`, and what loading and teaching raise.
    """
    if not (folder / MEMORY_FOLDER).is_dir():
        raise CommandError(f"{folder} is no folder of a model with memory", "name what train, or demo, has saved")
    model = from_pretrained(folder, overlay=output, mode="r+")
    try:
        tokenizer = saved_tokenizer(folder)
        given: dict[str, Any] = {name: value for name, value in (("steps", steps), ("lr", lr)) if value is not None}
        before = _continuation(model, tokenizer, prompt)
        started = time.perf_counter()
        taught = teach(model, tokenizer, text, prompt=prompt, **given)
        seconds = time.perf_counter() - started
        after = _continuation(model, tokenizer, prompt)
        taught.overlay.commit()
        result = {
            "model": str(folder),
            "prompt": prompt,
            "text": text,
            "loss": [taught.losses[0], taught.losses[-1]],
            "steps": len(taught.losses) - 1,
            "seconds": seconds,
            "rows": len(taught.row_ids_U),
            "before": before,
            "after": after,
            "delta": str(output),
            "rows_in_all": len(taught.overlay.changed_ids),
            "bytes": output.stat().st_size,
        }
    finally:
        detach_engram(model)
    for line in _lines(result):
        echo(line)
    return result


def _continuation(model: Any, tokenizer: Any, prompt: str) -> str | None:
    """How the model goes on, the likeliest token each time; None without a prompt."""
    prompt_1T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()[None]
    if not prompt_1T.shape[1]:
        return None
    with torch.no_grad():
        token_ids_1T = model.generate(
            prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=SHOWN_TOKENS, do_sample=False
        )
    text: str = tokenizer.decode(token_ids_1T[0, prompt_1T.shape[1] :].tolist(), skip_special_tokens=True)
    return text


def _lines(result: dict[str, Any]) -> list[str]:
    before, after = (wording.decimals(loss, 2) for loss in result["loss"])
    lines = [
        f"taught   {result['text']!r} after {result['prompt']!r}: loss {before} before, {after} now, "
        f"{result['steps']} steps in {wording.duration(result['seconds'])}"
    ]
    if result["before"] is not None:
        lines += [f"before   {result['before']!r}", f"now      {result['after']!r}"]
    lines.append(
        f"delta    {result['delta']}: {wording.count(result['rows'])} rows of this text, "
        f"{wording.count(result['rows_in_all'])} in all, {wording.size(result['bytes'])}"
    )
    return lines
