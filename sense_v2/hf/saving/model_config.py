"""config.json of a model with memory: the backbone's own, announced as one that has a memory.

config.json    the backbone's own, but model_type "sense_engram", with the backbone's under another name
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from sense_v2.core.errors import with_way_out
from sense_v2.hf.saving.folder import replace_file

MODEL_TYPE = "sense_engram"

_BACKBONE_TYPE, _BACKBONE_ARCHITECTURES = "backbone_model_type", "backbone_architectures"


class EngramModelConfig(PreTrainedConfig):
    """config.json of a model with memory. `backbone()` is the configuration that the model itself has."""

    model_type = MODEL_TYPE

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        # As they are in the file: what it leaves out has the backbone's defaults, not those of this class.
        self._fields = {name: value for name, value in fields.items() if name != "model_type"}
        if "name_or_path" in fields:
            self._fields["name_or_path"] = str(fields["name_or_path"])

    def backbone(self) -> PreTrainedConfig:
        fields = dict(self._fields)
        if _BACKBONE_TYPE not in fields:
            raise with_way_out(
                ValueError(f"this {MODEL_TYPE} configuration names no {_BACKBONE_TYPE}"),
                "copy the model's config.json again",
            )
        model_type, fields["architectures"] = fields.pop(_BACKBONE_TYPE), fields.pop(_BACKBONE_ARCHITECTURES, None)
        return AutoConfig.for_model(model_type, **fields)

    def to_dict(self) -> dict[str, Any]:
        values = {**self._fields, "model_type": MODEL_TYPE}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def forget_announcement(model: PreTrainedModel) -> None:
    """Give a model that a named class opened from a saved folder the type of its own configuration back."""
    own = vars(model.config)
    if own.get("model_type") == MODEL_TYPE:
        for name in ("model_type", _BACKBONE_TYPE, _BACKBONE_ARCHITECTURES):
            own.pop(name, None)


ADAPTER_NOTE = "memory_in_engram: open with sense_v2.hf.from_pretrained"


def announce_in_adapter(path: Path) -> None:
    """Add a key to PEFT's adapter_config.json, which PEFT warns of when it opens the adapter without its memory."""
    values = {**json.loads(path.read_text(encoding="utf-8")), ADAPTER_NOTE: True}
    replace_file(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def announce_memory(folder: Path, model: PreTrainedModel) -> bool:
    """Rewrite the config.json that `model` was saved with, so that it says what the folder is.

    Returns False, and leaves the file, if no Auto class of transformers opens such a backbone.
    """
    # The later one wins: a class that is both is a causal model.
    auto_classes: dict[str, Any] = dict.fromkeys(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(), AutoModelForMaskedLM)
    auto_classes |= dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), AutoModelForCausalLM)
    auto_class = auto_classes.get(type(model).__name__)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if auto_class is None or values.get("model_type") not in CONFIG_MAPPING_NAMES:
        return False
    values[_BACKBONE_TYPE], values[_BACKBONE_ARCHITECTURES] = values["model_type"], [type(model).__name__]
    # Pipelines and transformers' server load the class that stands here, if transformers has one of that name: the
    # backbone's own would open without its memory.
    values["model_type"], values["architectures"] = MODEL_TYPE, [auto_class.__name__]
    replace_file(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    return True
