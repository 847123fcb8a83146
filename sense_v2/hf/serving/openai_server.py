"""A saved model behind transformers' own OpenAI-compatible server.

The folder is checked, transformers is made to know models with memory, and its server takes over, behind the checks
of `gate.py` (it answers for this model alone) and `operations.py` (who may ask, how many at once, what came of it).
Answers are generated in batches that requests join and leave (`engines.py`), or one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import saved_tokenizer
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.saving.folder import MEMORY_FOLDER, check_folder
from sense_v2.hf.saving.model_config import MODEL_TYPE
from sense_v2.hf.serving.gate import OneModel, OwnPages, asked, own_names
from sense_v2.hf.serving.operations import Operated, log_to_stderr
from sense_v2.hf.serving.served_overlays import ServedOverlays

# Of a model that says of no limit.
MAX_TOKENS = 1 << 17
# In work or waiting; what comes beyond is answered by 503.
MAX_WAITING = 256
# Open at once, whatever they ask: those that wait, and who looks after the server.
MAX_CONNECTIONS = 2 * MAX_WAITING + 64
# Tokens of all requests that an engine holds at once.
CACHE_TOKENS = 16_384
# What is being answered when the server is stopped has so long.
STOP_SECONDS = 30


def openai_server(
    folder: Path,
    *,
    host: str,
    port: int,
    device: str,
    dtype: str,
    names: Sequence[str] = (),
    batched: bool = True,
    cache_tokens: int = CACHE_TOKENS,
    max_waiting: int = MAX_WAITING,
    api_key: str | None = None,
    overlays: Path | None = None,
) -> Callable[[], Any]:
    """Check that a model can be served.

    Args:
        folder: The model's; its path is the model's name.
        host: The address to listen on.
        port: The port to listen on.
        device: Where the model runs: cpu, cuda:0, auto.
        dtype: Of the weights; auto: as saved.
        names: Further names that requests may call the server by.
        batched: Answer requests in batches, where the model can; else one after the other.
        cache_tokens: Tokens of all requests that an engine of batches holds at once.
        max_waiting: Requests in work or waiting; what comes beyond is answered by 503.
        api_key: What requests must bear; None: anyone may ask.
        overlays: A folder of deltas, each of which a request may name as `MODEL+NAME`.

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
    if overlays is not None and not overlays.is_dir():
        raise CommandError(f"{overlays}: no such folder", "make it, with or without deltas in it: it is watched")
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

    if batched:
        limit = min(limit, cache_tokens)

    class Server(Serve):
        def start_server(self) -> None:  # what Serve calls where it isn't to block
            from sense_v2.hf.serving.engines import State

            served = None if overlays is None else ServedOverlays(overlays)
            state = State(cache_tokens, batched=batched, overlays=served)
            handlers: list[Any] = [self._chat_handler, self._completion_handler, self._response_handler]
            for handler in handlers:
                handler.generation_state = state
                handler._resolve_model = partial(_resolved, handler._resolve_model)
            server = self.server.config
            model = OneModel(
                server.app, str(folder), lambda one: len(encode([one], tokenizer, separator_id=None)), limit, served
            )
            operated = Operated(
                model, api_key=api_key, max_waiting=max_waiting, is_alive=state.is_cb_alive, more=state.metrics
            )
            server.app = OwnPages(operated, own_names(host, names))
            server.limit_concurrency = max(MAX_CONNECTIONS, 2 * max_waiting)
            server.timeout_graceful_shutdown = STOP_SECONDS
            logging.getLogger("uvicorn.access").disabled = True  # `Operated` has a line a request
            log_to_stderr()
            try:
                self.server.run()
            finally:
                state.shutdown()

    options: dict[str, Any] = {"host": host, "port": port, "device": device, "dtype": dtype}
    options["log_level"] = "error"  # it warns of each request
    return lambda: Server(force_model=str(folder), continuous_batching=False, non_blocking=True, **options)


def _resolved(resolve: Callable[[Any], tuple[Any, ...]], body: Any) -> tuple[Any, ...]:
    """Do what a handler of transformers does with a request's model; the answer names it as the request did."""
    model_id, *found = resolve(body)
    return (asked.get().get("model") or model_id, *found)
