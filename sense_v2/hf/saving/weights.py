"""A saved model's weights, loaded without those that aren't the model's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sense_v2.engram.reading.safetensors_headers import find_tensors


def load_weights(
    model_class: type[PreTrainedModel],
    folder: str | os.PathLike[str],
    config: PreTrainedConfig,
    is_wanted: Callable[[str], bool],
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model from some of the tensors in `folder`, as if the others weren't there.

    The weights stay mapped files until they are copied into the model.

    Args:
        model_class: Of the model.
        folder: Where config.json and the safetensors are.
        config: The model's configuration.
        is_wanted: True for the name of a tensor that belongs to the model.
        **options: Those of the class's own `from_pretrained`.

    Returns:
        The model, and what transformers reports of loading it.
    """
    weights: dict[str, torch.Tensor] = {}
    spans = find_tensors(folder, is_wanted).tensors
    for path in sorted({span.path for found in spans.values() for span in found}):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if name in spans}  # noqa: SIM118
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **options
    )
    model, report = loaded
    if model.can_generate():
        with contextlib.suppress(OSError):  # a model that was saved without one
            model.generation_config = GenerationConfig.from_pretrained(Path(folder), local_files_only=True)
    return model, report
