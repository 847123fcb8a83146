"""What stands before a web server of ours: who may ask, what for, and how much.

    request ──OwnPages──▶ to a name of this server ──OneModel──▶ a call of the API, in the model's bounds ──▶ app

Another site's page in this machine's browser could post to a server here (its Origin gives that away), or reach it
under a name that it points to this machine (the Host gives that away). And a server of one model has no use for calls
that load others, or for a prompt that the model can't take.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Collection
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from sense_v2.hf.serving.served_overlays import ServedOverlays

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY_BYTES = 8 * 2**20
MAX_STOPS = 16
# The calls of OpenAI's API that are answered, and what each calls its text and the tokens that it wants.
TEXTS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}
_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_RANGES = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-0.99, 2), "presence_penalty": (-2, 2)}

asked: ContextVar[dict[str, Any]] = ContextVar("asked", default={})  # noqa: B039  # never changed in place
"""The request that is answered, as it came: an app's handlers may hand on a part of it."""

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """A request that gets a 4xx: its status, and what to say."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status, self.what = status, what


def own_names(host: str, allowed: Collection[str] = ()) -> Callable[[str], bool]:
    """Return what says whether a name is one of a server's that listens on `host`. On a loopback address, these are
    the loopback's and the `allowed`. On others, addresses and this machine's own names, too: no site can point one of
    these elsewhere."""
    names = {*LOOPBACK, *(name.lower() for name in allowed)}
    if host in LOOPBACK:
        return names.__contains__
    names |= {host.lower(), socket.gethostname().lower()}

    def is_own(name: str) -> bool:
        try:
            return name in names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    return is_own


class OwnPages:
    """An ASGI app that answers only requests to a name of its own, from a page of its own or from no page.

    Args:
        app: What answers.
        is_own: Whether a name is the server's.
        headers: Sent with every answer.
        closed: Beginnings of paths that are answered by 404.
    """

    def __init__(
        self,
        app: Any,
        is_own: Callable[[str], bool],
        *,
        headers: Collection[tuple[bytes, bytes]] = (),
        closed: tuple[str, ...] = (),
    ) -> None:
        self.app, self.is_own, self.headers, self.closed = app, is_own, list(headers), closed

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refused as refused:
            if scope["type"] == "http":
                await _answer(send, refused.status, "text/plain", f"{refused.what}\n")
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        await self.app(scope, _bounded(receive), send_with_headers)

    def _check(self, scope: dict[str, Any]) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        try:
            is_own = self.is_own(urlsplit(f"//{host}").hostname or "")
            is_own = is_own and (not origin or urlsplit(origin).netloc == host)
        except ValueError:  # half an IPv6 address
            is_own = False
        if not is_own:
            raise Refused(403, f"{host[:200]!r} is no name of this server, or another site's page asks")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            raise Refused(413, f"{MAX_BODY_BYTES} bytes are the most that is read")
        if scope.get("path", "/").startswith(self.closed):
            raise Refused(404, "nothing is here")


def _bounded(receive: Receive) -> Receive:
    """Receive no more than `MAX_BODY_BYTES`; a body that goes on ends as if its sender had left."""
    left = MAX_BODY_BYTES

    async def bounded() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return bounded


class OneModel:
    """An ASGI app that answers the calls of OpenAI's API for one model, and refuses what the model can't do.

    Args:
        app: What answers.
        name: The model's.
        count_tokens: A text -> how many tokens it has.
        max_tokens: How many the model can take, prompt and answer together.
        overlays: What requests may name as `name+OVERLAY`, if anything.
    """

    def __init__(
        self,
        app: Any,
        name: str,
        count_tokens: Callable[[str], int],
        max_tokens: int,
        overlays: ServedOverlays | None = None,
    ) -> None:
        self.app, self.name, self.count_tokens, self.max_tokens = app, name, count_tokens, max_tokens
        self.overlays = overlays

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path, method = scope.get("path", ""), scope.get("method")
        try:
            if path in ("/v1/models", "/health") and method in ("GET", "HEAD"):
                if path == "/v1/models" and self.overlays is not None:
                    await _answer(send, 200, "application/json", json.dumps(self._models(self.overlays)))
                else:
                    await self.app(scope, receive, send)
                return
            if path not in TEXTS:
                raise Refused(404, f"{path} isn't served; {', '.join(TEXTS)} and /v1/models are")
            if method != "POST":
                raise Refused(405, f"{path} takes POST")
            body = await _body(receive)
            request = _parsed(body)
            overlay = self._overlay(request)
            self._check(path, request)
        except Refused as refused:
            error = {"message": refused.what, "type": "invalid_request_error", "param": None, "code": refused.status}
            await _answer(send, refused.status, "application/json", json.dumps({"error": error}))
            return
        asked.set(request)
        if overlay is not None:  # the app knows the model alone
            body = json.dumps({**request, "model": self.name}).encode()
        told = False

        async def receive_again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        with nullcontext() if self.overlays is None else self.overlays.answering(overlay):
            await self.app(scope, receive_again, send)

    def _models(self, overlays: ServedOverlays) -> dict[str, Any]:
        """List the model, and itself with each overlay."""
        names = [self.name, *(f"{self.name}+{overlay}" for overlay in overlays.files())]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "sense-engram"} for name in names]
        return {"object": "list", "data": models}

    def _overlay(self, request: dict[str, Any]) -> str | None:
        """Find the overlay that a request names, if any. Raise `Refused` for another model or overlay."""
        model = request.get("model")
        if model in (None, self.name):
            return None
        found = {} if self.overlays is None else {f"{self.name}+{one}": one for one in self.overlays.files()}
        if not isinstance(model, str) or model not in found:
            served = " and its overlays, which /v1/models lists, are" if self.overlays is not None else " is"
            raise Refused(404, f"the model {str(model)[:200]!r} isn't served; {self.name!r}{served}")
        return found[model]

    def _check(self, path: str, request: dict[str, Any]) -> None:
        """Raise `Refused` for what would fail in the server, or take all of its memory."""
        wanted = 1
        for name in _COUNTS:
            if request.get(name) is not None:
                wanted = request[name]
                if type(wanted) is not int or not 1 <= wanted <= self.max_tokens:
                    raise Refused(400, f"{name} must be a number from 1 to {self.max_tokens}")
        for name, (least, most) in _RANGES.items():
            value = request.get(name)
            if value is not None and (type(value) not in (int, float) or not least <= value <= most):
                raise Refused(400, f"{name} must be a number from {least} to {most}")
        if type(request.get("seed", 0)) not in (int, type(None)) or abs(request.get("seed") or 0) >= 2**63:
            raise Refused(400, "seed must be an integer of 64 bits")
        stops = request.get("stop")
        stops = [stops] if isinstance(stops, str) else stops or []
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(s and isinstance(s, str) for s in stops):
            raise Refused(400, f"stop must be a text, or a list of at most {MAX_STOPS} texts, none of them empty")
        if "generation_config" in request:
            raise Refused(400, "generation_config isn't taken; max_tokens, temperature, top_p, seed and stop are")
        name = TEXTS[path]
        texts = list(_texts(request.get(name), name))
        # A token is at least a byte of text, so that what is far too long needn't be tokenised.
        num_tokens = sum(map(self.count_tokens, texts)) if sum(map(len, texts)) <= 64 * self.max_tokens else None
        if num_tokens == 0:
            raise Refused(400, f"{name} has no tokens; give it some text")
        if num_tokens is None or num_tokens + wanted > self.max_tokens:
            found = f"more than {self.max_tokens}" if num_tokens is None else f"{num_tokens}"
            raise Refused(
                400, f"{name} has {found} tokens and {wanted} are wanted; the model takes {self.max_tokens} in all"
            )


def _texts(value: Any, name: str) -> Any:
    """Find the texts of a prompt, of a list of messages, or of a message's parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and name != "prompt":
        for one in value:
            if not isinstance(one, dict):
                raise Refused(400, f"{name}: each entry is an object, not {json.dumps(one)[:50]}")
            if one.get("content") is not None or "role" in one:
                yield from _texts(one.get("content") or "", "content")
            elif isinstance(one.get("text"), str):
                yield one["text"]
    else:
        what = "a text" if name == "prompt" else "a text or a list of messages that isn't empty"
        raise Refused(400, f"{name} must be {what}")


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(413, f"{MAX_BODY_BYTES} bytes are the most that is read")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refused(400, "the request is no JSON object")
    return request


async def _answer(send: Send, status: int, kind: str, text: str) -> None:
    headers = [(b"content-type", kind.encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
