"""A saved folder's config.json -> the Auto classes of transformers: `AutoModelForCausalLM.from_pretrained(folder)`.

    config.json    the backbone's own, but model_type "sense_engram", with the backbone's under another name

The file says what the folder is: transformers without `sense_v2.hf` refuses a model_type that it doesn't know, where
the backbone's own would open without its memory and without a word. With it imported, the Auto classes, pipelines
and transformers' server get the backbone's class with the memory attached. A class that is named, as in
`LlamaForCausalLM.from_pretrained(folder)`, opens the backbone alone, and transformers warns of the model_type.
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

from sense_v2.engram.disk import new_file, write_at

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
            raise ValueError(
                f"this {MODEL_TYPE} configuration names no {_BACKBONE_TYPE}; copy the model's config.json again"
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


class EngramForCausalLM(PreTrainedModel):
    """What the Auto classes find for a folder with memory; its `from_pretrained` gives the backbone's own class."""

    config_class = EngramModelConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: EngramModelConfig | None = None, mode: str = "r", **options: Any
    ) -> Any:
        """As `sense_v2.hf.pretrained.from_pretrained`."""
        from sense_v2.hf.pretrained import from_pretrained

        return from_pretrained(str(name), mode=mode, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> Any:
        raise ValueError(
            "a model with memory isn't made from a configuration alone: make its backbone and attach_engram, or "
            "load a saved one with from_pretrained"
        )


def register() -> None:
    """Makes the Auto classes know `sense_engram`; importing `sense_v2.hf` does it."""
    AutoConfig.register(MODEL_TYPE, EngramModelConfig, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForMaskedLM):
        auto_class.register(EngramModelConfig, EngramForCausalLM, exist_ok=True)


def announce_memory(folder: Path, model: PreTrainedModel) -> bool:
    """Rewrites the config.json that `model` was saved with, so that it says what the folder is. False, and the file
    stays, where no Auto class of transformers opens such a backbone."""
    auto_class = next(
        (
            auto_class
            for auto_class, names in (
                (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
                (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
            )
            if type(model).__name__ in names.values()
        ),
        None,
    )
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if auto_class is None or values.get("model_type") not in CONFIG_MAPPING_NAMES:
        return False
    values[_BACKBONE_TYPE], values[_BACKBONE_ARCHITECTURES] = values["model_type"], [type(model).__name__]
    # Pipelines and transformers' server load the class that stands here, if transformers has one of that name: the
    # backbone's own would open without its memory.
    values["model_type"], values["architectures"] = MODEL_TYPE, [auto_class.__name__]
    with new_file(path, replace=True) as fd:
        write_at(fd, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(), 0)
    return True
