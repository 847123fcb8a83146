"""`sense-engram serve`: a saved model behind transformers' own OpenAI-compatible server.

Nothing of the server is ours. The command looks at the folder, makes transformers know models with memory, and hands
over. Requests queue up and are generated one after the other: transformers' continuous batching keeps tokens in a
paged cache, which has no place for the memory's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sense_v2.hf  # noqa: F401  # makes transformers know models with memory
from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import saved_tokenizer
from sense_v2.hf.saving.folder import MEMORY_FOLDER, check_folder
from sense_v2.hf.saving.model_config import MODEL_TYPE


def run_serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    dtype: str = "auto",
    echo: Callable[[str], Any] = print,
    tell: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Serves the model in the folder `model` until it is interrupted. `tell` gets one dictionary that JSON can hold
    right before that, and from then on the server's own lines go to stderr.

    Raises `CommandError` where the folder is one that transformers would open without its memory or where packages
    of the server are missing, and what is wrong with the folder.
    """
    folder = Path(model)
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
    name = str(folder)
    echo(f"model    {name}, by this name; `curl http://{host}:{port}/v1/models` lists it")
    echo(f"serving  http://{host}:{port}/v1 until Ctrl-C")
    with contextlib.ExitStack() as stack:
        if tell is not None:
            tell({"model": name, "url": f"http://{host}:{port}/v1", "host": host, "port": port})
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        Serve(force_model=name, continuous_batching=False, host=host, port=port, device=device, dtype=dtype)
