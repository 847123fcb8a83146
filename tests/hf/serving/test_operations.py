"""Key, limit, log and metrics before an app."""

import asyncio
import json
import logging
import re

import pytest

from sense_v2.hf.serving.operations import Operated

PATH = "/v1/completions"
USAGE = {"usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}}


class App:
    """Answers in two parts, the second when it is let go."""

    def __init__(self):
        self.go = asyncio.Event()
        self.status = 200

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"data: part\n\n", "more_body": True})
        await self.go.wait()
        await send({"type": "http.response.body", "body": json.dumps(USAGE).encode()})


async def ask(server, path=PATH, method="POST", **headers):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    await server(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], dict(sent[0]["headers"]), body.decode()


def run(test):
    return asyncio.run(test())


def test_a_key_is_asked_for_where_there_is_one():
    async def test():
        app = App()
        app.go.set()
        server = Operated(app, api_key="secret")
        for given in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            status, _, body = await ask(server, **given)
            assert (status, json.loads(body)["error"]["code"]) == (401, 401)
            assert (await ask(server, "/metrics", "GET", **given))[0] == 401
        assert (await ask(server, authorization="Bearer secret"))[0] == 200
        assert (await ask(server, "/health", "GET"))[0] == 200
        assert (await ask(Operated(app)))[0] == 200

    run(test)


def test_what_waits_beyond_the_limit_is_told_to_come_again():
    async def test():
        app = App()
        server = Operated(app, max_waiting=2)
        waiting = [asyncio.create_task(ask(server)) for _ in range(2)]
        await asyncio.sleep(0)
        status, headers, body = await ask(server)
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert "2 requests are in work or wait already" in body
        assert (await ask(server, "/health", "GET"))[0] == 200
        assert "sense_engram_requests_in_work 2" in (await ask(server, "/metrics", "GET"))[2]
        app.go.set()
        assert [(await one)[0] for one in waiting] == [200, 200]
        assert (await ask(server))[0] == 200
        assert server.in_work == 0

    run(test)


def test_a_client_that_is_gone_leaves_its_place():
    async def test():
        server = Operated(App(), max_waiting=1)
        gone = asyncio.create_task(ask(server))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert server.in_work == 0

    run(test)


def test_health_says_when_nothing_can_be_answered():
    async def test():
        alive = [True]
        server = Operated(App(), is_alive=lambda: alive[0])
        assert (await ask(server, "/health", "GET"))[0] == 200
        alive[0] = False
        status, _, body = await ask(server, "/health", "GET")
        assert (status, json.loads(body)) == (503, {"status": "unhealthy"})

    run(test)


def test_a_line_and_numbers_of_each_request(caplog):
    async def test():
        app = App()
        app.go.set()
        server = Operated(app, more=lambda: [("rows_total", "counter", "Rows.", {'table="0"': 3})])
        await ask(server)
        await ask(server)
        app.status = 404
        await ask(server, "/nothing\nhere" * 50, "GET")
        return (await ask(server, "/metrics", "GET"))[2]

    with caplog.at_level(logging.INFO, "sense_v2.serve"):
        metrics = run(test)
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"POST /v1/completions 200 [\d.]+ s, first [\d.]+ s, tokens: 5 prompt, 7 generated", lines[0])
    assert lines[2].startswith(r"GET /nothing\nhere")
    assert "\n" not in lines[2]
    assert len(lines[2]) < 160
    found = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert found['sense_engram_requests_total{path="/v1/completions",status="200"}'] == "2"
    assert found['sense_engram_requests_total{path="other",status="404"}'] == "1"
    assert found['sense_engram_tokens_total{kind="generated"}'] == "14"
    assert found['sense_engram_rows_total{table="0"}'] == "3"
    assert found["sense_engram_whole_seconds_count"] == found['sense_engram_whole_seconds_bucket{le="+Inf"}'] == "2"
    for line in metrics.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+', line)
