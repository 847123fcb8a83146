"""LongCat-Flash-Lite: transformers' LongCat-Flash, with the n-gram embedding from tables that stay on disk.

transformers has the backbone (models/longcat_flash) and skips the tensors of the n-gram embedding. What these do is a
memory of the variant `longcat_flash` before the first layer, whose W_v is the projections of all tables side by side.
So cache, padding, packed documents and generation are those of any model with memory.

Source: modeling_longcat_ngram.py in the model's repository.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.importing import released_projections
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import EngramTokenizer, write_identity_map
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.saving.weights import load_weights


def load_longcat(folder: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """Load a LongCat-Flash-Lite model, all but its tables, and attach these. Raises `ValueError` as
    `attach_longcat_tables`; `options` are those of `from_pretrained`."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    settings: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    described = released_config(settings)
    if described is None or described.variant != "longcat_flash":
        raise with_way_out(
            ValueError(
                f"{folder}: config.json describes no n-gram embedding of LongCat-Flash-Lite (ngram_vocab_size_ratio)"
            ),
            "name that model's folder",
        )
    # The released config.json has a name that transformers doesn't know, and numbers that its types don't take.
    known = {
        name: value for name, value in settings.items() if name not in ("model_type", "auto_map", "architectures")
    }
    if "num_layers" in known:
        known.pop("num_hidden_layers", None)
    for name, value in known.items():
        if type(value) is int and isinstance(getattr(LongcatFlashConfig, name, None), float):
            known[name] = float(value)
    config = LongcatFlashConfig(**known)

    def is_wanted(name: str) -> bool:
        return "ngram_embeddings." not in name and not name.startswith("model.mtp.")

    model, _ = load_weights(LongcatFlashForCausalLM, folder, config, is_wanted, **options)
    return attach_longcat_tables(model, folder)


def attach_longcat_tables(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Attach the tables of a LongCat-Flash-Lite checkpoint, which stay where they are, and their projections.

    Raises `ValueError` if the folder's don't fit the model; the model is then as it was.
    """
    table = open_released_table(folder, variant="longcat_flash")
    try:
        size = table.belongs_to.compressed_vocab_size
        hidden_size, num_ids = model.config.hidden_size, model.config.vocab_size
        if table.config is None or size != num_ids:
            raise with_way_out(
                ValueError(f"{folder}: tables of {size} token ids, and the model has {num_ids}"),
                "name the model's own checkpoint",
            )
        weights = released_projections(folder, table.config.total_heads)
        expected = [hidden_size, table.config.engram_dim]
        found = list(weights["W_v.weight"].shape) if weights else None
        if found != expected:
            raise with_way_out(
                ValueError(
                    f"{folder}: its ngram_embeddings.post_projs are {found} side by side; expected {expected}"
                ),
                "name the model's own checkpoint, or fetch it again",
            )
        # The map has to stay, as a copy of the model opens it again.
        temporary = tempfile.mkdtemp(prefix="longcat-map-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        path = Path(temporary) / "identity.npy"
        write_identity_map(path, num_ids)
        config = dataclasses.replace(table.config, shadow_map_path=str(path))
        attach_engram(model, config, EngramTokenizer(path), storage={0: table})
    except BaseException:
        table.close()
        raise
    with torch.no_grad():
        model.engram.layers["0"].W_v.weight.copy_(weights["W_v.weight"])  # type: ignore[union-attr,index]
    return model
