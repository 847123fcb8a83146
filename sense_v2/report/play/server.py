"""A web server for this machine's browsers alone, as `sense-engram play` runs it.

It listens on 127.0.0.1 and sends a content security policy that lets the page ask nobody else. Gradio's own way of
launching is not used: it would search for a free port, ask its address back over HTTP, and offer to be shared.
"""

from __future__ import annotations

import errno
import socket
from typing import Any
from urllib.parse import urlsplit

from sense_v2.core.errors import CommandError

HOST = "127.0.0.1"
# Gradio's page needs its scripts inline and compiles templates; what matters is where it may send anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; frame-ancestors 'none'"
)
# Connections of open pages are closed after this long.
SHUTDOWN_SECONDS = 1


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
