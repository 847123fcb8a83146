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
    """Return a listening socket on 127.0.0.1. Raises `CommandError` if the port is taken or reserved."""
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
    """Run an ASGI app on a listening socket until SIGINT or SIGTERM; both are raised again at the end."""
    import uvicorn

    config = uvicorn.Config(
        LocalOnly(app), log_level="critical", timeout_graceful_shutdown=SHUTDOWN_SECONDS, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


class LocalOnly:
    """An ASGI app that answers only requests to this machine from a page of its own.

    Another site's page in this machine's browser could otherwise post to it (its Origin gives that away), or reach it
    under a name that it points to 127.0.0.1 (the Host gives that away).
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
