"""A web server for this machine's browsers alone, as `sense-engram play` runs it.

It listens on 127.0.0.1 and sends a content security policy that lets the page ask nobody else. Gradio's own way of
launching is not used: it would search for a free port, ask its address back over HTTP, and offer to be shared.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from sense_v2.core.errors import CommandError
from sense_v2.hf.serving.gate import OwnPages, own_names

HOST = "127.0.0.1"
# Gradio's page needs its scripts inline and compiles templates; what matters is where it may send anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'; frame-ancestors 'none'"
)
# Gradio's, of which the page has no use.
UPLOADS = ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/component_server")
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
        local_only(app), log_level="critical", timeout_graceful_shutdown=SHUTDOWN_SECONDS, access_log=False
    )
    uvicorn.Server(config).run(sockets=[listener])


def local_only(app: Any) -> OwnPages:
    """Let only this machine's browsers in, and let the page ask nobody else. Files aren't uploaded to it."""
    policy = [(b"content-security-policy", POLICY.encode())]
    return OwnPages(app, own_names(HOST), headers=policy, closed=UPLOADS)
