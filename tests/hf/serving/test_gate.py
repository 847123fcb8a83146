"""What is asked of a server of ours and refused before its app hears of it."""

import json

import pytest

from sense_v2.hf.serving.gate import MAX_BODY_BYTES, OneModel, OwnPages, own_names
from sense_v2.report.play.server import local_only

LIMIT = 20


async def app(scope, receive, send):
    """Answers with the body that it got."""
    body = b""
    if scope["method"] == "POST":
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        else:
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body or b"got"})


def served(host="127.0.0.1", names=()):
    return OwnPages(OneModel(app, "mine", lambda text: len(text.split()), LIMIT), own_names(host, names))


def ask(server, path, *parts, method=None, **headers):
    """(status, body) of what `server` answers to a body that comes in parts."""
    sent, waiting = [], list(parts)

    async def receive():
        body = waiting.pop(0) if waiting else b""
        return {"type": "http.request", "body": body, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:8000", **headers}
    scope = {
        "type": "http",
        "path": path,
        "method": method or ("POST" if parts else "GET"),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    with pytest.raises(StopIteration):  # how a coroutine ends that waits for nothing
        server(scope, receive, send).send(None)
    return (sent[0]["status"], sent[1]["body"]) if sent else None


def post(path, **request):
    return ask(served(), path, json.dumps(request).encode())


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "[::1]:8000", 200),
        ("127.0.0.1", "evil.example:8000", 403),
        ("127.0.0.1", "192.168.0.7:8000", 403),
        ("127.0.0.1", "model.example", 200),
        ("0.0.0.0", "192.168.0.7:8000", 200),
        ("0.0.0.0", "evil.example", 403),
        ("0.0.0.0", "[::1", 403),
        ("0.0.0.0", "", 403),
    ],
)
def test_only_a_name_of_its_own_is_answered(host, name, status):
    assert ask(served(host, ["model.example"]), "/v1/models", host=name)[0] == status


@pytest.mark.parametrize(
    ("origin", "status"), [("http://localhost:8000", 200), ("https://evil.example", 403), ("null", 403)]
)
def test_a_foreign_page_is_refused(origin, status):
    assert ask(served(), "/v1/completions", b'{"prompt": "a"}', origin=origin)[0] == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/load_model", 404),
        ("POST", "/reset", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/systemone", 404),
        ("POST", "/v1/audio/transcriptions", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/v1/models", 200),
        ("GET", "/health", 200),
    ],
)
def test_only_calls_for_the_served_model_are_answered(method, path, status):
    parts = [b'{"model": "/etc"}'] if method == "POST" else []
    assert ask(served(), path, *parts, method=method)[0] == status


GOOD = {
    "/v1/completions": {"prompt": "one two"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two"}]},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "one two"}]}]},
}


@pytest.mark.parametrize("path", GOOD)
def test_what_the_model_can_do_reaches_it_as_it_was_sent(path):
    request = {**GOOD[path], "model": "mine", "max_tokens": 18, "temperature": 0, "stop": ["x"], "seed": None}
    body = json.dumps(request).encode()
    assert ask(served(), path, body[:7], body[7:]) == (200, body)


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        ("/v1/completions", {"prompt": ""}, "prompt has no tokens"),
        ("/v1/completions", {"prompt": None}, "prompt must be a text"),
        ("/v1/completions", {"prompt": [1, 2]}, "prompt must be a text"),
        ("/v1/completions", {"prompt": "word " * 21}, "prompt has 21 tokens and 1 are wanted; the model takes 20"),
        ("/v1/completions", {"prompt": "w" * 10_000}, "prompt has more than 20 tokens"),
        ("/v1/completions", {"max_tokens": 19}, "prompt has 2 tokens and 19 are wanted; the model takes 20 in all"),
        ("/v1/chat/completions", {"messages": []}, "messages must be a text or a list of messages that isn't empty"),
        ("/v1/chat/completions", {"messages": ["a"]}, "messages: each entry is an object"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, "messages has no tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]}, "content must be a text"),
        ("/v1/responses", {"input": ""}, "input has no tokens"),
        *(
            ("/v1/completions", {"max_tokens": value}, "max_tokens must be a number from 1 to 20")
            for value in (0, -1, 2.0, "4", True, 10**9)
        ),
        ("/v1/chat/completions", {"max_completion_tokens": 0}, "max_completion_tokens must be"),
        ("/v1/responses", {"max_output_tokens": 0}, "max_output_tokens must be"),
        ("/v1/completions", {"temperature": "hot"}, "temperature must be a number from 0 to 2"),
        ("/v1/completions", {"temperature": -1}, "temperature must be a number from 0 to 2"),
        ("/v1/completions", {"top_p": 2}, "top_p must be a number from 0 to 1"),
        ("/v1/completions", {"seed": 1.5}, "seed must be"),
        ("/v1/completions", {"seed": 2**70}, "seed must be"),
        ("/v1/completions", {"stop": ["a"] * 17}, "stop must be"),
        ("/v1/completions", {"stop": [""]}, "stop must be"),
        ("/v1/completions", {"generation_config": "{}"}, "generation_config isn't taken"),
    ],
)
def test_what_the_model_cannot_do_is_a_400(path, change, says):
    status, body = post(path, **{**GOOD[path], **change})
    assert status == 400
    assert says in json.loads(body)["error"]["message"]


def test_another_model_is_a_404():
    status, body = post("/v1/completions", prompt="one", model="/etc/passwd")
    assert status == 404
    assert "isn't served" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_a_400(body):
    assert ask(served(), "/v1/completions", body)[0] == 400


def test_a_body_is_read_no_further_than_its_limit():
    assert ask(served(), "/v1/completions", b"", **{"content-length": str(MAX_BODY_BYTES + 1)})[0] == 413
    assert ask(served(), "/v1/completions", b"", **{"content-length": "9" * 5000})[0] == 413
    part = b" " * (MAX_BODY_BYTES // 4)
    assert ask(served(), "/v1/completions", *[part] * 5)[0] == 413  # a length that wasn't told


def test_the_playground_takes_no_files_and_no_endless_body():
    page = local_only(app)
    assert ask(page, "/gradio_api/queue/join", b"{}")[0] == 200
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=1", "/upload"):
        assert ask(page, path, b"file")[0] == 404
    assert ask(page, "/gradio_api/queue/join", *[b" " * (MAX_BODY_BYTES // 4)] * 5) is None
