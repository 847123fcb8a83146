"""A saved model behind transformers' own OpenAI-compatible server.

Nothing of the server is ours: the folder is checked, transformers is made to know models with memory, and the server
takes over. Requests queue up and are generated one after the other: transformers' continuous batching keeps tokens in
a paged cache, which has no place for the memory's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import saved_tokenizer
from sense_v2.hf.saving.folder import MEMORY_FOLDER, check_folder
from sense_v2.hf.saving.model_config import MODEL_TYPE


def openai_server(folder: Path, *, host: str, port: int, device: str, dtype: str) -> Callable[[], Any]:
    """Check that a model can be served.

    Args:
        folder: The model's; its path is the model's name.
        host: The address to listen on.
        port: The port to listen on.
        device: Where the model runs: cpu, cuda:0, auto.
        dtype: Of the weights; auto: as saved.

    Returns:
        The server: called, it serves until it is interrupted.

    Raises:
        CommandError: transformers would open the folder without its memory, or packages of the server are missing.
        FileNotFoundError: A part of the folder is missing.
        ValueError: A part of the folder is damaged.
    """
    config = check_folder(folder)
    if (folder / MEMORY_FOLDER).is_dir() and config.get("model_type") != MODEL_TYPE:
        raise CommandError(
            f"{folder} was saved in a form that transformers' server opens without its memory",
            "load it and save it again, with from_pretrained and save_pretrained of sense_v2.hf",
        )
    saved_tokenizer(folder)
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
        from transformers.cli.serve import Serve
    except ImportError as error:
        raise CommandError(
            f"transformers' server can't be imported ({error})",
            'pip install "sense-v2[serve]" installs what it needs',
        ) from error
    return functools.partial(
        Serve, force_model=str(folder), continuous_batching=False, host=host, port=port, device=device, dtype=dtype
    )
