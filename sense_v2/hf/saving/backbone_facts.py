"""What a memory was trained on -> what differs from it where it is loaded.

A saved folder records its backbone in engram/backbone.json: architecture, sizes, a digest of the weights, where they
are if they were saved by reference, the tokenizer's tokens, the versions. Loading compares. What would give wrong
answers is an error (another width, tokens that share compressed ids in another way); what may work is a warning,
field by field.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from sense_v2 import __version__
from sense_v2.core.errors import with_way_out
from sense_v2.engram.tokenizer import EngramTokenizerBuilder

BACKBONE_FILE = "backbone.json"

_SAMPLES = 64  # values of each tensor that the digest reads


def backbone_facts(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """Return what identifies a backbone, as JSON holds it, without the memory attached to it. `state_dict` holds the
    weights that are saved, if they aren't the model's own."""
    config = model.config.get_text_config()
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return {
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "hidden_size": int(config.hidden_size),
        "num_hidden_layers": int(config.num_hidden_layers),
        "vocab_size": int(weight.shape[0]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights_digest(model, state_dict or {}),
        "transformers": transformers.__version__,
        "sense_v2": __version__,
    }


def backbone_reference(model: PreTrainedModel) -> dict[str, Any]:
    """Return where a model was read from, for `save_pretrained(…, backbone=)`; call it before anything is trained.

    Raises `ValueError` for a model that was made, not read, and for one whose weights nothing identifies.
    """
    name = str(model.name_or_path or "")
    if not name:
        raise with_way_out(
            ValueError("this model was read from no folder and no hub, so nothing names its weights"),
            "save it with them",
        )
    path = Path(name)
    where = {"model": str(path.resolve())} if path.exists() else {"model": name, "revision": _revision(model)}
    weights = _weights_digest(model, {})
    if weights is None:
        raise with_way_out(
            ValueError("this model is quantized, adapted or not in memory, so nothing identifies its weights"),
            "save it with them",
        )
    return {**where, "weights": weights, "dtype": str(model.dtype).removeprefix("torch.")}


def _revision(model: PreTrainedModel) -> str | None:
    return getattr(model.config, "_commit_hash", None)


def has_weights(named: Mapping[str, Any], model: PreTrainedModel) -> bool:
    """True if a model's weights are those of the place that `backbone_reference` named, bit for bit."""
    return named["weights"] == _weights_digest(model, {})


def may_have_weights(named: Mapping[str, Any], model: PreTrainedModel) -> bool:
    """True also where it can't be told: rounded to another type, quantized, or not in memory."""
    is_rounded = str(model.dtype).removeprefix("torch.") != named["dtype"]
    return is_rounded or _weights_digest(model, {}) in (None, named["weights"])


def tokenizer_facts(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return what identifies a tokenizer, and its file if that lies in `folder`."""
    return {"token_texts": _texts_digest(EngramTokenizerBuilder(tokenizer)), "tokenizer_file": _file_digest(folder)}


def read_facts(path: Path) -> dict[str, Any]:
    """Read a backbone.json; {} if there is none. Raises `ValueError` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise with_way_out(ValueError(f"{path}: not valid JSON: {error}"), "copy it again") from error
    if not isinstance(facts, dict):
        raise with_way_out(
            ValueError(f"{path}: expected a JSON object, found {type(facts).__name__}"), "copy it again"
        )
    return facts


def check_backbone(recorded: dict[str, Any], model: PreTrainedModel, path: Path) -> None:
    """Compare a model with the one that the memory at `path` was trained on.

    Warns of each field that differs. Raises `ValueError` if the hidden sizes do.
    """
    wrapped: Any = model
    found = backbone_facts(wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else model)
    compared = ["model_type", "architecture", "hidden_size", "num_hidden_layers", "vocab_size"]
    # Other rounding, or weights that aren't there yet, say nothing about whose they are.
    if found["dtype"] == recorded.get("dtype") and None not in (found["weights"], recorded.get("weights")):
        compared.append("weights")
    differences = [
        (name, recorded[name], found[name]) for name in compared if name in recorded and recorded[name] != found[name]
    ]
    text = "; ".join(f"{name} was {old}, is {new}" for name, old, new in differences)
    if any(name == "hidden_size" for name, _, _ in differences):
        raise with_way_out(
            ValueError(f"the memory in {path} was trained on another backbone: {text}"),
            "Its fusion layers have the width of that one: load it on a model of the same width, or attach a "
            "new memory",
        )
    if differences:
        warnings.warn(
            f"the memory in {path} was trained on another backbone: {text}. It is attached all the same; measure "
            "whether it helps there",
            UserWarning,
            stacklevel=3,
        )
    for name in ("transformers", "sense_v2"):
        if name in recorded and _release(recorded[name]) != _release(found[name]):
            warnings.warn(
                f"{path} was saved with {name} {recorded[name]}, this is {found[name]}: outputs may differ",
                UserWarning,
                stacklevel=3,
            )


def check_tokenizer(recorded: dict[str, Any], tokenizer: Any, map_path: Path, normalization: str) -> None:
    """Compare a tokenizer with the shadow map that the memory was trained with.

    Warns if the map is the same and the tokens' texts differ. Raises `ValueError` if token ids map otherwise.
    """
    builder = EngramTokenizerBuilder(tokenizer, normalization=normalization)
    if recorded.get("token_texts") == _texts_digest(builder):
        return
    map_V, given_V = np.load(map_path, mmap_mode="r", allow_pickle=False), builder.mapping()
    name = builder.tokenizer_name or type(tokenizer).__name__
    if len(map_V) != len(given_V):
        raise with_way_out(
            ValueError(
                f"the memory at {map_path} was trained with a tokenizer of {len(map_V)} token ids, {name} has "
                f"{len(given_V)}"
            ),
            "use the tokenizer that was saved with it",
        )
    differing_U = np.flatnonzero(map_V != given_V)
    if len(differing_U):
        first = int(differing_U[0])
        raise with_way_out(
            ValueError(
                f"the memory at {map_path} was trained with another tokenizer than {name}: {len(differing_U)} of "
                f"{len(map_V)} token ids have another compressed id, the first is {first} "
                f"({builder.token_texts[first]!r}: {int(map_V[first])}, now {int(given_V[first])})"
            ),
            "use the tokenizer that was saved with it",
        )
    if "token_texts" in recorded:
        warnings.warn(
            f"{name} isn't the tokenizer that the memory at {map_path} was trained with: its tokens have other "
            "texts, though as many of them share a compressed id. What the rows say is about the others",
            UserWarning,
            stacklevel=3,
        )


def tokenizer_file_differs(recorded: dict[str, Any], folder: Path) -> bool:
    """True if the tokenizer.json in `folder` isn't the one that was saved there."""
    found = _file_digest(folder)
    return None not in (recorded.get("tokenizer_file"), found) and recorded["tokenizer_file"] != found


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _weights_digest(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """SHA-256 over names, shapes and a sample of each tensor; None if one isn't in memory, quantized or adapted."""
    if getattr(model, "hf_quantizer", None) is not None or hasattr(model, "peft_config"):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if name.startswith("engram."):
            continue
        value = state_dict.get(name, parameter)
        if value.is_meta:
            return None
        try:
            flat = value.detach().reshape(-1)
        except NotImplementedError:  # torchao's quantized tensors, which know little more than to be multiplied
            return None
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES].float().cpu().numpy().astype("<f4")
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def _texts_digest(builder: EngramTokenizerBuilder) -> str:
    return hashlib.sha256(json.dumps(builder.token_texts).encode()).hexdigest()[:16]


def _file_digest(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
