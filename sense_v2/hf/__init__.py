"""Memory on a model of transformers.

Importing this package registers saved models with transformers' Auto classes, and PEFT's wrappers are met from
then on. Public names are imported on first use.
"""

from importlib import import_module
from typing import Any

from sense_v2.hf.adapters import watch_wrappers
from sense_v2.hf.auto import register

_HOME = {
    "EngramCallback": "training.callback",
    "EngramTrainer": "training.trainer",
    "add_overlay": "overlays",
    "attach_engram": "attach",
    "backbone_reference": "saving.backbone_facts",
    "detach_engram": "attach",
    "from_pretrained": "load",
    "load_overlay": "overlays",
    "make_writable": "facts.writable",
    "push_to_hub": "saving.hub",
    "remove_overlay": "overlays",
    "save_pretrained": "saving.save",
    "teach": "training.teaching",
    "teach_facts": "facts.teach_facts",
    "unload_overlay": "overlays",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register()
watch_wrappers()
