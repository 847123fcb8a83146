"""What a server's operator needs: a key, a limit on what waits, a log, health and metrics.

    request ──▶ `Operated`: the key, the limit ──▶ app ──▶ status, tokens, seconds ──▶ log, /metrics

/metrics is Prometheus' text format. Tokens are counted from the `usage` that an answer ends with, of whatever call.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from sense_v2.hf.serving.gate import TEXTS, Message, Receive, Send

log = logging.getLogger("sense_v2.serve")

RETRY_SECONDS = 1
# Seconds to the first part of an answer, and to its end.
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_TOKENS = re.compile(rb'"(prompt|completion|input|output)_tokens": ?(\d+)')
_KINDS = {b"prompt": "prompt", b"input": "prompt", b"completion": "generated", b"output": "generated"}

Sample = tuple[str, str, str, dict[str, float]]
"""Name, type and help of a metric, and its values by their labels."""


def log_to_stderr() -> None:
    """Print the log's lines, with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


class Operated:
    """An ASGI app that lets in who has the key, as many as may wait, and says what came of it.

    Args:
        app: What answers.
        api_key: What requests must bear; None: anyone may ask.
        max_waiting: How many requests for text may be in work or wait.
        is_alive: False once nothing can be answered any more.
        more: Further metrics.
    """

    def __init__(
        self,
        app: Any,
        *,
        api_key: str | None = None,
        max_waiting: int = 256,
        is_alive: Callable[[], bool] = lambda: True,
        more: Callable[[], Iterable[Sample]] = lambda: (),
    ) -> None:
        self.app, self.max_waiting, self.is_alive, self.more = app, max_waiting, is_alive, more
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self.in_work = 0
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seconds: dict[str, Counter[float]] = {"first": Counter(), "whole": Counter()}
        self.sums: Counter[str] = Counter()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, is_text = scope.get("path", ""), scope.get("path") in TEXTS
        answer = _Answer(send)
        self.in_work += is_text
        try:
            if path == "/health":
                alive = self.is_alive()
                await _say(answer, 200 if alive else 503, json.dumps({"status": "ok" if alive else "unhealthy"}))
            elif not self._bears_key(scope):
                await _refuse(answer, 401, "the request bears no key, or another key (Authorization: Bearer KEY)")
            elif path == "/metrics":
                await _say(answer, 200, self.metrics(), b"text/plain; version=0.0.4")
            elif is_text and self.in_work > self.max_waiting:
                await _refuse(
                    answer, 503, f"{self.max_waiting} requests are in work or wait already; ask again later"
                )
            else:
                await self.app(scope, receive, answer)
        finally:
            self.in_work -= is_text
            self._note(scope, answer, is_text)

    def _bears_key(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._key is None or hmac.compare_digest(given, self._key)

    def _note(self, scope: dict[str, Any], answer: _Answer, is_text: bool) -> None:
        status, path = answer.status or 500, scope.get("path", "")
        self.requests[path if is_text or status == 200 else "other", status] += 1
        whole = time.monotonic() - answer.started
        told = f"{scope.get('method')} {path[:100]!r} {status} {whole:.3f} s".replace("'", "")
        if is_text and status == 200:
            first = whole if answer.first is None else answer.first
            for kind, seconds in (("first", first), ("whole", whole)):
                self.seconds[kind].update(bound for bound in BUCKETS if seconds <= bound)
                self.seconds[kind][float("inf")] += 1
                self.sums[kind] += seconds  # type: ignore[assignment]  # a Counter counts whatever adds
            self.tokens.update(answer.tokens)
            counted = ", ".join(
                f"{answer.tokens[kind]} {kind}" for kind in ("prompt", "generated") if kind in answer.tokens
            )
            told += f", first {first:.3f} s, tokens: {counted}" + ("" if answer.is_whole else ", cut off")
        log.info(told)

    def metrics(self) -> str:
        """Write all metrics as Prometheus reads them."""
        samples: list[Sample] = [
            (
                "requests_total",
                "counter",
                "Requests, by path and status.",
                {f'path="{path}",status="{status}"': n for (path, status), n in self.requests.items()},
            ),
            ("requests_in_work", "gauge", "Requests for text in work or waiting.", {"": self.in_work}),
            (
                "tokens_total",
                "counter",
                "Tokens of whole answers and their prompts.",
                {f'kind="{kind}"': n for kind, n in self.tokens.items()},
            ),
        ]
        lines = [line for sample in (*samples, *self.more()) for line in _lines(*sample)]
        for kind, what in (("first", "to the first part of an answer"), ("whole", "to its end")):
            name, counts = f"sense_engram_{kind}_seconds", self.seconds[kind]
            lines += [f"# HELP {name} Seconds {what}.", f"# TYPE {name} histogram"]
            for bound in (*BUCKETS, float("inf")):
                lines.append(f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else bound}"}} {counts[bound]}')
            lines += [f"{name}_sum {self.sums[kind]}", f"{name}_count {counts[float('inf')]}"]
        return "\n".join(lines) + "\n"


class _Answer:
    """Sends an answer on, and notes what it was."""

    def __init__(self, send: Send) -> None:
        self.send, self.started = send, time.monotonic()
        self.status: int | None = None
        self.first: float | None = None
        self.is_whole = False
        self.tokens: dict[str, int] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and self.first is None:
                self.first = time.monotonic() - self.started
            for kind, count in _TOKENS.findall(body):
                self.tokens[_KINDS[kind]] = int(count)
            self.is_whole = not message.get("more_body", False)
        await self.send(message)


def _lines(name: str, kind: str, what: str, values: dict[str, float]) -> Iterable[str]:
    yield f"# HELP sense_engram_{name} {what}"
    yield f"# TYPE sense_engram_{name} {kind}"
    for labels, value in values.items():
        yield f"sense_engram_{name}{f'{{{labels}}}' if labels else ''} {value}"


async def _refuse(send: Send, status: int, what: str) -> None:
    error = {"message": what, "type": "invalid_request_error", "param": None, "code": status}
    await _say(send, status, json.dumps({"error": error}))


async def _say(send: Send, status: int, text: str, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind)]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_SECONDS).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
