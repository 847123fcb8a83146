"""Memory on a model of transformers.

Importing this package registers saved models with transformers' Auto classes, and PEFT's wrappers are met from
then on. Public names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sense_v2.core.config import EngramConfig as EngramConfig
from sense_v2.hf.adapters import watch_wrappers
from sense_v2.hf.auto import register

if TYPE_CHECKING:
    from sense_v2.hf.attach import attach_engram as attach_engram
    from sense_v2.hf.attach import detach_engram as detach_engram
    from sense_v2.hf.facts.teach_facts import teach_facts as teach_facts
    from sense_v2.hf.facts.writable import make_writable as make_writable
    from sense_v2.hf.insight.interventions import memory_off as memory_off
    from sense_v2.hf.load import from_pretrained as from_pretrained
    from sense_v2.hf.memory import memory_of as memory_of
    from sense_v2.hf.memory import trainable_parameters as trainable_parameters
    from sense_v2.hf.overlays import add_overlay as add_overlay
    from sense_v2.hf.overlays import load_overlay as load_overlay
    from sense_v2.hf.overlays import remove_overlay as remove_overlay
    from sense_v2.hf.overlays import unload_overlay as unload_overlay
    from sense_v2.hf.saving.backbone_facts import backbone_reference as backbone_reference
    from sense_v2.hf.saving.hub import push_to_hub as push_to_hub
    from sense_v2.hf.saving.save import save_pretrained as save_pretrained
    from sense_v2.hf.training.callback import EngramCallback as EngramCallback
    from sense_v2.hf.training.counted_rows import count_rows as count_rows
    from sense_v2.hf.training.teaching import teach as teach
    from sense_v2.hf.training.trainer import EngramTrainer as EngramTrainer

_HOME = {
    "EngramCallback": "training.callback",
    "EngramTrainer": "training.trainer",
    "add_overlay": "overlays",
    "attach_engram": "attach",
    "backbone_reference": "saving.backbone_facts",
    "count_rows": "training.counted_rows",
    "detach_engram": "attach",
    "from_pretrained": "load",
    "load_overlay": "overlays",
    "make_writable": "facts.writable",
    "memory_of": "memory",
    "memory_off": "insight.interventions",
    "push_to_hub": "saving.hub",
    "remove_overlay": "overlays",
    "save_pretrained": "saving.save",
    "teach": "training.teaching",
    "teach_facts": "facts.teach_facts",
    "trainable_parameters": "memory",
    "unload_overlay": "overlays",
}

__all__ = sorted([*_HOME, "EngramConfig"])

if not TYPE_CHECKING:  # or a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register()
watch_wrappers()
