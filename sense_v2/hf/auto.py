"""A saved folder's config.json -> the Auto classes of transformers: `AutoModelForCausalLM.from_pretrained(folder)`.

    config.json    the backbone's own, but model_type "sense_engram", with the backbone's under another name

The file says what the folder is: transformers without `sense_v2.hf` refuses a model_type that it doesn't know, where
the backbone's own would open without its memory and without a word. With it imported, the Auto classes, pipelines
and transformers' server get the backbone's class with the memory attached. A class that is named, as in
`LlamaForCausalLM.from_pretrained(folder)`, opens the backbone alone, and transformers warns of the model_type.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.hf.saving.model_config import MODEL_TYPE, EngramModelConfig


class EngramForCausalLM(PreTrainedModel):
    """What the Auto classes find for a folder with memory; its `from_pretrained` gives the backbone's own class."""

    config_class = EngramModelConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: EngramModelConfig | None = None, mode: str = "r", **options: Any
    ) -> Any:
        """As `sense_v2.hf.load.from_pretrained`."""
        from sense_v2.hf.load import from_pretrained

        return from_pretrained(str(name), mode=mode, config=config, **options)

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> Any:
        raise with_way_out(
            ValueError("a model with memory isn't made from a configuration alone"),
            "make its backbone and attach_engram, or load a saved one with from_pretrained",
        )


def register() -> None:
    """Makes the Auto classes know `sense_engram`; importing `sense_v2.hf` does it."""
    AutoConfig.register(MODEL_TYPE, EngramModelConfig, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForMaskedLM):
        auto_class.register(EngramModelConfig, EngramForCausalLM, exist_ok=True)
