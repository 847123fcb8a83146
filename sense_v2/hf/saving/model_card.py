"""What is known of a model -> its model card, README.md in its folder.

Everything in it is a fact that was given or read; there is no prose to be wrong.

A card that somebody else wrote, or changed the first line of, stays as it is.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from transformers import PreTrainedModel
from yaml import YAMLError

from sense_v2 import __version__
from sense_v2.hf.data.streaming import is_hub_dataset
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.saving.folder import replace_file

CARD_FILE = "README.md"
_MARK = "<!-- Written by sense_v2; without this line it is not written again. -->"


def model_card(
    model: PreTrainedModel,
    name: str,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    memory_only: bool = False,
) -> str:
    """Return the card's text. `training` and `evaluation` become tables, one row for each name."""
    memory = attached_memory(model)
    corpus = str(training.get("corpus", ""))
    front = ModelCardData(
        library_name="transformers",
        tags=["engram", "sense-v2"] if memory is not None else ["sense-v2"],
        pipeline_tag="text-generation" if hasattr(model, "generate") and model.can_generate() else None,
        datasets=[corpus.partition(":")[0]] if is_hub_dataset([corpus]) else None,
        **_origin(str(getattr(model.config, "_name_or_path", "") or "")),
    )
    backbone = {
        "class": type(model).__name__,
        "layers": model.config.get_text_config().num_hidden_layers,
        "hidden size": model.config.get_text_config().hidden_size,
        "parameters": sum(
            value.numel() for name, value in model.named_parameters() if not name.startswith("engram.")
        ),
        "weights": str(model.dtype).removeprefix("torch."),
    }
    sections = {"Backbone": backbone}
    if memory is not None:
        config, manifest, shadow_map = memory.config, memory.storage.manifest, memory.tokenizer
        sections["Memory"] = {
            "variant": config.variant,
            "before layers": ", ".join(map(str, config.layer_indices)),
            "n-grams of": f"{', '.join(map(str, config.ngram_orders))} tokens",
            "heads": config.total_heads,
            "rows": manifest.rows,
            "row width": manifest.width,
            "row type": manifest.dtype,
            "tokenizer": config.tokenizer_name or shadow_map.tokenizer_name,
            "token ids, compressed ids": f"{shadow_map.vocab_size:,}, {shadow_map.compressed_vocab_size:,}",
            "step of the last commit": manifest.step,
        }
    sections["Training"], sections["Evaluation"] = dict(training), dict(evaluation)
    sections["Versions"] = {"sense_v2": __version__, "transformers": transformers.__version__}
    lines = ["---", front.to_yaml().strip(), "---", _MARK, "", f"# {name}"]
    for title, facts in sections.items():
        known = {fact: value for fact, value in facts.items() if value is not None}
        if known:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {_cell(fact)} | {_cell(value)} |" for fact, value in known.items()]
    use = _use_of_memory(name, front.base_model) if memory_only else _use(name, memory is not None)
    lines += ["", "## Use", "", "```python", *use, "```", ""]
    return "\n".join(lines)


def _origin(backbone: str) -> dict[str, Any]:
    """What the hub is told of the backbone, a name or a folder: its name there, and what its own card says of its
    license and language. A folder of some machine says nothing elsewhere, so it is named by what it was made from."""
    folder = Path(backbone)
    name: str | None
    if backbone.count("/") == 1 and not backbone.startswith(("/", ".")) and not folder.exists():
        cached = try_to_load_from_cache(backbone, CARD_FILE)
        name, card = backbone, Path(cached) if isinstance(cached, str) else None
    else:
        in_cache = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", folder.absolute().as_posix())
        name, card = "/".join(in_cache.groups()) if in_cache else None, folder / CARD_FILE if backbone else None
    try:
        known = ModelCard.load(card).data.to_dict() if card is not None and card.is_file() else {}
    except (OSError, ValueError, YAMLError):  # somebody else's, which need not be right
        known = {}
    kept = {key: known[key] for key in ("license", "license_name", "license_link", "language") if key in known}
    return {"base_model": name or known.get("base_model"), **kept}


def write_card(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    memory_only: bool = False,
) -> None:
    """Write the card to `folder`."""
    card = model_card(model, name, training, evaluation, memory_only=memory_only)
    replace_file(folder / CARD_FILE, card.encode())


def is_others_card(folder: Path) -> bool:
    """True if somebody else wrote the card that is there."""
    path = folder / CARD_FILE
    return path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace").splitlines()


def _use(name: str, has_memory: bool) -> list[str]:
    lines = ["from transformers import pipeline", "", f'pipeline("text-generation", model="{name}")("…")']
    return ["import sense_v2.hf  # makes transformers know models with memory", *lines] if has_memory else lines


def _use_of_memory(name: str, base_model: Any) -> list[str]:
    return [
        "from sense_v2.hf import from_pretrained",
        "from transformers import AutoModelForCausalLM",
        "",
        f'from_pretrained("{name}", backbone=AutoModelForCausalLM.from_pretrained("{base_model or "…"}"))',
    ]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return " ".join(str(value).replace("|", "\\|").split())
    return f"{value:,}" if isinstance(value, numbers.Integral) else f"{float(value):.4g}"
