"""`sense-engram play`: a page on this machine, to see what a model's memory does, and to teach it.

The model is opened read-only, the page is `play_page.py`'s, and it is served by uvicorn on 127.0.0.1 alone: to
browsers on this machine that have this page open, with a content security policy that lets them ask nobody else.
Gradio's own way of launching is not used: it would search for a free port, ask its address back over HTTP, and
offer to be shared.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import open_trained
from sense_v2.hf.memory import attached_memory

HOST = "127.0.0.1"
# Gradio's page needs its scripts inline and compiles templates; what matters is where it may send anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; frame-ancestors 'none'"
)
# Connections of open pages are closed after this long.
SHUTDOWN_SECONDS = 1


def run_play(
    folder: str | Path,
    *,
    port: int = 7860,
    save_to: Path = Path("deltas"),
    echo: Callable[[str], Any] = print,
    tell: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Serves the page for the model in `folder` until it is interrupted; port 0 takes any free one. `tell` gets one
    dictionary that JSON can hold right before that.

    Nothing in `folder` changes. Raises `CommandError` for a port that is taken, a model without memory or one that
    doesn't generate, and missing packages; and what loading the model raises.
    """
    with listen(port) as listener:
        _require_packages()
        model, tokenizer = open_trained(folder)
        memory = attached_memory(model)
        if memory is None:
            raise CommandError(
                f"{folder} has no memory, which is what the page shows",
                "name a folder that train, demo (runs/demo/model) or save_pretrained has saved with one",
            )
        if not memory.config.causal or not model.can_generate():
            raise CommandError(
                f"{folder} is a {type(model).__name__}, which doesn't write text",
                "name a model that generates",
            )
        # Importing Gradio already reads these.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from sense_v2.cli.play_page import build_app
        from sense_v2.cli.player import Player

        app = build_app(Player(model, tokenizer, str(folder), save_to))
        echo(f"model    {folder}, {memory.storage.num_embeddings:,} rows; nothing in it changes")
        url, port = f"http://{HOST}:{listener.getsockname()[1]}", listener.getsockname()[1]
        echo(f"open     {url} in a browser on this machine; Ctrl-C ends it")
        if tell is not None:
            tell({"model": str(folder), "url": url, "host": HOST, "port": port})
        serve(app, listener)


def listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1. Raises `CommandError` where the port is taken or not for us."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "in use" if error.errno == errno.EADDRINUSE else "not for everybody to use"
        raise CommandError(
            f"port {port} is {why}",
            f"--port {port + 1 if port < 65535 else 7861} takes another, --port 0 any free one",
        ) from error
    return listener


def _require_packages() -> None:
    missing = [name for name in ("gradio", "uvicorn", "fastapi") if find_spec(name) is None]
    if missing:
        raise CommandError(
            f"the page is made with {', '.join(missing)}, not installed here",
            'pip install "sense-v2[play]" installs what it needs',
        )


def serve(app: Any, listener: socket.socket) -> None:
    """Runs the ASGI app on a listening socket until SIGINT or SIGTERM, which are raised again after the last
    connection is closed."""
    import uvicorn

    config = uvicorn.Config(
        LocalOnly(app), log_level="critical", timeout_graceful_shutdown=SHUTDOWN_SECONDS, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


class LocalOnly:
    """An ASGI app that answers only what is addressed to this machine by a page of its own.

    A page of another site that a browser here has open could otherwise post to it (its Origin gives it away), or get
    at it under a name of its own that it points to 127.0.0.1 (the Host gives that away).
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if urlsplit(f"//{host}").hostname not in (HOST, "localhost") or (origin and urlsplit(origin).netloc != host):
            if scope["type"] == "http":
                await send(
                    {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": b"this page is for browsers on its own machine\n"})
            return

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
