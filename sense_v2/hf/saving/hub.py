"""A saved folder -> a repository of the Hugging Face hub.

The way back is `from_pretrained("name/model")`.

What is uploaded is named file by file: the backbone's weights as safetensors, tokenizer, configuration, card and
memory. A table's optimizer states, journals, locks and whatever else lies in the folder stay here. huggingface_hub
uploads the table as it does any large file, in chunks, of which those that the hub has already aren't sent again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from sense_v2.core.errors import with_way_out
from sense_v2.engram.delta.apply import strip_delta
from sense_v2.engram.table.format import manifest_name
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.tokenizer import description_path
from sense_v2.hf.saving.backbone_facts import BACKBONE_FILE, read_facts
from sense_v2.hf.saving.folder import (
    CONFIG_FILE,
    FUSION_FILE,
    MAP_FILE,
    MEMORY_FOLDER,
    OVERLAY_FILE,
    REFERENCE_FILE,
    TABLE_FILE,
)
from sense_v2.hf.saving.model_card import CARD_FILE

_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    "config.yaml",
    CARD_FILE,
)
_MEMORY_FILES = (CONFIG_FILE, FUSION_FILE, TABLE_FILE, MAP_FILE, description_path(Path(MAP_FILE)).name, BACKBONE_FILE)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a model with memory",
) -> Any:
    """Upload what `save_pretrained` wrote, and make the repository if there is none.

    Args:
        folder: The saved model; nothing in it changes.
        repo_id: The repository, "user/name".
        private: True to make a private repository.
        token: The hub's, by default the saved one.
        revision: The branch to commit to.
        create_pr: True to open a pull request.
        commit_message: Of the commit.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        FileNotFoundError: No model is there, or it was not saved to its end.
        ValueError: Its table, or its backbone on this machine, is a reference, or it has uncommitted rows.
    """
    folder = Path(folder)
    memory = folder / MEMORY_FOLDER
    named = read_facts(memory / BACKBONE_FILE).get("reference")
    has_weights = any(folder.glob("*.safetensors"))
    is_model = (folder / "config.json").is_file() and bool(named or has_weights)
    is_memory = memory.is_dir() and not has_weights and not (folder / "config.json").exists()
    if not (is_model or is_memory):
        raise with_way_out(
            FileNotFoundError(f"{folder}: no model there (config.json and safetensors)"), "save_pretrained writes one"
        )
    if (memory / REFERENCE_FILE).is_file():
        raise with_way_out(
            ValueError(f"{folder} names its table by reference, which nobody else can follow"),
            "save the model with table='copy' and push that folder",
        )
    if named and Path(named["model"]).is_absolute() and not has_weights:
        raise with_way_out(
            ValueError(f"{folder} names its backbone, {named['model']}, which nobody else can follow"),
            "open the model and save it with its weights (save_pretrained without backbone=), and push that folder",
        )
    if memory.is_dir():
        missing = [name for name in (CONFIG_FILE, FUSION_FILE, TABLE_FILE, MAP_FILE) if not (memory / name).is_file()]
        if missing or not (memory / manifest_name(TABLE_FILE)).is_file():
            raise with_way_out(
                FileNotFoundError(
                    f"{memory} lacks {', '.join(missing) or manifest_name(TABLE_FILE)}: it was not saved to its end"
                ),
                "save it again",
            )
        files = TableFiles(memory / TABLE_FILE)
        for journal in (files.journal, *files.other_journals):
            if not (journal.is_file() and journal.stat().st_size):
                continue
            raise with_way_out(
                ValueError(f"{journal}: somebody trains {memory / TABLE_FILE}, or died doing it"),
                "commit or close it first, or run `sense-engram verify --repair` where nobody does",
            )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model").repo_id
    with tempfile.TemporaryDirectory(prefix="sense-v2-push-") as staging:
        _stage(folder, Path(staging))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def _stage(folder: Path, staging: Path) -> None:
    """Link what is uploaded; write a manifest and an overlay without optimizer states."""
    for pattern in _FILES:
        for path in folder.glob(pattern):
            link = staging / path.name
            if path.is_file() and not link.is_symlink():
                link.symlink_to(path.resolve())
    memory = folder / MEMORY_FOLDER
    if not memory.is_dir():
        return
    (staging / MEMORY_FOLDER).mkdir()
    for name in _MEMORY_FILES:
        if (memory / name).is_file():
            (staging / MEMORY_FOLDER / name).symlink_to((memory / name).resolve())
    if (memory / OVERLAY_FILE).is_file():
        strip_delta(memory / OVERLAY_FILE, staging / MEMORY_FOLDER / OVERLAY_FILE)
    manifest = dataclasses.replace(read_manifest(memory / manifest_name(TABLE_FILE)), states={})
    (staging / MEMORY_FOLDER / manifest_name(TABLE_FILE)).write_text(manifest.to_json(), encoding="utf-8")
