"""A saved model behind transformers' own OpenAI-compatible server.

The folder is checked, transformers is made to know models with memory, and its server takes over, behind the checks
of `gate.py`: it answers for this model alone. Requests queue up and are generated one after the other: transformers'
continuous batching keeps tokens in a paged cache, which has no place for the memory's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import saved_tokenizer
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.saving.folder import MEMORY_FOLDER, check_folder
from sense_v2.hf.saving.model_config import MODEL_TYPE
from sense_v2.hf.serving.gate import OneModel, OwnPages, own_names

# Of a model that says of no limit.
MAX_TOKENS = 1 << 17
# At once; what comes beyond is answered by 503.
MAX_REQUESTS = 256


def openai_server(
    folder: Path, *, host: str, port: int, device: str, dtype: str, names: Sequence[str] = ()
) -> Callable[[], Any]:
    """Check that a model can be served.

    Args:
        folder: The model's; its path is the model's name.
        host: The address to listen on.
        port: The port to listen on.
        device: Where the model runs: cpu, cuda:0, auto.
        dtype: Of the weights; auto: as saved.
        names: Further names that requests may call the server by.

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
    tokenizer = saved_tokenizer(folder)
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
    text = config.get("text_config") or config
    limit = next((text[name] for name in ("max_position_embeddings", "n_positions") if text.get(name)), MAX_TOKENS)

    class Server(Serve):
        def start_server(self) -> None:  # what Serve calls where it isn't to block
            server = self.server.config
            model = OneModel(
                server.app, str(folder), lambda one: len(encode([one], tokenizer, separator_id=None)), limit
            )
            server.app = OwnPages(model, own_names(host, names))
            server.limit_concurrency = MAX_REQUESTS
            self.server.run()

    options: dict[str, Any] = {"host": host, "port": port, "device": device, "dtype": dtype}
    return lambda: Server(force_model=str(folder), continuous_batching=False, non_blocking=True, **options)
