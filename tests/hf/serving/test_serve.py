"""`sense-engram serve` in a process of its own, asked by OpenAI's client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_save import with_memory
from tiny import tiny_tokenizer
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from sense_v2.cli.main import main
from sense_v2.hf import add_overlay, from_pretrained, save_pretrained
from sense_v2.hf.attach import detach_engram

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
ROOT = Path(__file__).parents[3]
KEY = "secret"
PROMPTS = [f"word{number} WORD{number + 1} word{number + 2}" for number in range(6)]


def tokenizer() -> PreTrainedTokenizerFast:
    inner = tiny_tokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with spaces between them
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", chat_template=template)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = with_memory(folder / "table")
    model.generation_config.eos_token_id = None
    save_pretrained(model, folder / "model", tokenizer=tokenizer())
    (folder / "overlays").mkdir()
    write_delta(folder / "model", folder / "overlays" / "facts.safetensors", seed=1)
    return folder / "model"


def write_delta(folder: Path, path: Path, seed: int) -> None:
    """All rows are others."""
    model = from_pretrained(folder)
    overlay = add_overlay(model, path)
    rows = torch.randn(1_500, 8, generator=torch.Generator().manual_seed(seed))
    overlay.write(torch.arange(1_500), rows)
    overlay.commit()
    detach_engram(model)


@pytest.fixture(scope="module")
def client(saved):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sense_v2.cli.main", "serve", str(saved), "--port", str(port), "--json"]
    command += ["--max-waiting", "40", "--cache-tokens", "4096", "--overlays", str(saved.parent / "overlays")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["SENSE_ENGRAM_API_KEY"] = KEY
    with open(saved.parent / "log", "w+") as log, open(saved.parent / "out", "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 120
            while True:
                assert server.poll() is None, (saved.parent / "log").read_text()
                assert time.monotonic() < deadline, (saved.parent / "log").read_text()
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
            client.server = server
            yield client
        finally:
            if server.poll() is None:
                server.terminate()
                server.wait(timeout=20)


def expected(model, prompt: str, max_tokens: int) -> str:
    token_ids = torch.tensor([tiny_tokenizer().encode(prompt).ids])
    out = model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tokenizer().decode(out[0, token_ids.shape[1] :], skip_special_tokens=True)


def test_the_folder_is_the_only_model(client, saved):
    assert [model.id for model in client.models.list()] == [str(saved), f"{saved}+facts"]


def test_each_request_has_its_overlay_and_overlays_come_and_go(client, saved):
    folder = saved.parent / "overlays"
    write_delta(saved, saved.parent / "more.safetensors", seed=2)
    (saved.parent / "more.safetensors").rename(folder / "more.safetensors")  # while it serves
    overlays = {None: None, "facts": folder / "facts.safetensors", "more": folder / "more.safetensors"}

    def ask(number: int) -> str:
        overlay = list(overlays)[number % 3]
        request = {
            "model": str(saved) if overlay is None else f"{saved}+{overlay}",
            "prompt": PROMPTS[number // 3 % len(PROMPTS)],
            "max_tokens": 8,
            "temperature": 0,
        }
        if number % 5 == 4:  # what batches don't know
            request["frequency_penalty"] = 1e-6
        if number % 2:
            parts = list(client.completions.create(**request, stream=True))
            assert {part.model for part in parts} == {request["model"]}
            return "".join(part.choices[0].text for part in parts if part.choices)
        answer = client.completions.create(**request)
        assert answer.model == request["model"]
        return answer.choices[0].text

    with ThreadPoolExecutor(18) as pool:
        found = list(pool.map(ask, range(18)))
    for start, path in enumerate(overlays.values()):
        model = from_pretrained(saved, overlay=path)
        assert found[start::3] == [expected(model, prompt, 8) for prompt in PROMPTS]
        detach_engram(model)
    assert found[0::3] != found[1::3] != found[2::3] != found[0::3]
    (folder / "more.safetensors").unlink()
    for gone in ("more", "../overlays/facts", "none"):
        with pytest.raises(openai.NotFoundError, match="and its overlays, which /v1/models lists, are"):
            client.completions.create(model=f"{saved}+{gone}", prompt=PROMPTS[0])
    (folder / "damaged.safetensors").write_bytes(b"no delta")
    with pytest.raises(openai.InternalServerError, match="can't be read now"):
        client.completions.create(model=f"{saved}+damaged", prompt=PROMPTS[0])
    (folder / "damaged.safetensors").unlink()
    answer = client.completions.create(model=str(saved), prompt=PROMPTS[0], max_tokens=8, temperature=0)
    assert answer.choices[0].text == found[0]


def test_json_says_where_it_is_served_and_is_all_of_stdout(client, saved):
    client.models.list()  # a request, which the server logs
    assert "GET /v1/models" in (saved.parent / "log").read_text()
    told = json.loads((saved.parent / "out").read_text())
    assert told == {"model": str(saved), "url": str(client.base_url).rstrip("/"), "host": "127.0.0.1"} | {
        "port": client.base_url.port
    }


def test_answers_are_those_of_generate(client, saved):
    model = from_pretrained(saved)
    for prompt in PROMPTS[:2]:
        answer = client.completions.create(model=str(saved), prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text == expected(model, prompt, 8)
    chat = client.chat.completions.create(
        model=str(saved), messages=[{"role": "user", "content": PROMPTS[2]}], max_tokens=8, temperature=0
    )
    assert chat.choices[0].message.content == expected(model, PROMPTS[2], 8)
    with_it = [expected(model, prompt, 8) for prompt in PROMPTS]
    detach_engram(model)
    assert with_it != [expected(model, prompt, 8) for prompt in PROMPTS]  # or the test would show nothing


def test_several_at_once_some_of_them_streaming(client, saved):
    def ask(number: int) -> str:
        if number % 2:
            stream = client.chat.completions.create(
                model=str(saved),
                messages=[{"role": "user", "content": PROMPTS[number]}],
                max_tokens=12,
                temperature=0,
                stream=True,
            )
            parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
            assert len([part for part in parts if part]) > 3  # it came in parts
            return "".join(part or "" for part in parts)
        answer = client.completions.create(model=str(saved), prompt=PROMPTS[number], max_tokens=12, temperature=0)
        return answer.choices[0].text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(ask, range(len(PROMPTS))))
    model = from_pretrained(saved)
    assert found == [expected(model, prompt, 12) for prompt in PROMPTS]


def test_32_at_once_and_some_that_leave_in_the_middle(client, saved):
    prompts = [f"word{n % 30} {'Word3 ' * (n % 7)}WORD{n % 29}" for n in range(32)]

    def ask(number: int) -> str | None:
        if number % 8 == 3:
            request = {"model": str(saved), "prompt": prompts[number], "max_tokens": 100, "temperature": 0}
            with client.completions.create(**request, stream=True) as stream:
                next(iter(stream))
            return None
        answer = client.completions.create(
            model=str(saved), prompt=prompts[number], max_tokens=6 + number % 5, temperature=0
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    model = from_pretrained(saved)
    for number, text in enumerate(found):
        assert text is None or text == expected(model, prompts[number], 6 + number % 5)


def test_a_penalty_which_batches_dont_know(client, saved):
    """It is answered by itself."""
    answer = client.completions.create(
        model=str(saved), prompt=PROMPTS[0], max_tokens=8, temperature=0, frequency_penalty=2
    )
    model = from_pretrained(saved)
    model.generation_config.repetition_penalty = 3.0
    assert answer.choices[0].text == expected(model, PROMPTS[0], 8)


def test_the_key_health_and_metrics(client, saved):
    other = openai.OpenAI(base_url=str(client.base_url), api_key="other", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="another key"):
        other.completions.create(model=str(saved), prompt=PROMPTS[0])
    root = str(client.base_url).removesuffix("/v1/")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    assert httpx.get(f"{root}/metrics").status_code == 401
    client.completions.create(model=str(saved), prompt=PROMPTS[0], max_tokens=5, temperature=0)
    text = httpx.get(f"{root}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(found['sense_engram_tokens_total{kind="generated"}']) >= 5
    assert int(found["sense_engram_engine_requests"]) == 0
    # Its three tokens and those that were generated, but for the last, each of four heads.
    assert int(found['sense_engram_memory_rows_total{table="0"}']) >= 4 * (3 + 5 - 1)
    assert 'sense_engram_memory_wait_seconds{table="0",quantile="0.99"}' in found
    log = (saved.parent / "log").read_text()
    assert re.search(r"POST /v1/completions 200 [\d.]+ s, first [\d.]+ s, tokens: 3 prompt, 5 generated\n", log)


def test_what_would_fail_or_load_another_model_is_refused(client, saved):
    """By the server as it runs; all cases are in test_gate.py."""
    for refused in ({"max_tokens": 0}, {"prompt": ""}, {"prompt": PROMPTS[0] * 1000}, {"temperature": 9}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": str(saved), "prompt": PROMPTS[0], **refused})
    with pytest.raises(openai.NotFoundError, match="isn't served"):
        client.completions.create(model="another", prompt=PROMPTS[0])
    with pytest.raises(openai.PermissionDeniedError):
        client.models.list(extra_headers={"Host": "evil.example"})
    with pytest.raises(openai.NotFoundError):
        client.post("/../reset", cast_to=object)


def test_a_server_that_is_stopped_ends_what_it_began(client, saved):
    """The last test of this server."""
    request = {"model": str(saved), "prompt": PROMPTS[1], "max_tokens": 60, "temperature": 0}
    with client.completions.create(**request, stream=True) as stream:
        parts = [next(iter(stream)).choices[0].text]
        client.server.terminate()
        parts += [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(parts) == expected(from_pretrained(saved), PROMPTS[1], 60)
    assert client.server.wait(timeout=20) in (0, -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no model there"),
        (lambda folder: (folder / "engram" / "fusion.safetensors").unlink(), "fusion layers' weights are missing"),
        (
            lambda folder: (folder / "tokenizer_config.json").unlink() or (folder / "tokenizer.json").unlink(),
            "tokenizer",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
            "opens without its memory",
        ),
    ],
)
def test_a_folder_that_is_not_served(saved, tmp_path, capsys, spoil, message):
    subprocess.run(["cp", "-r", str(saved), str(tmp_path / "copy")], check=True)
    spoil(tmp_path / "copy")
    assert main(["serve", str(tmp_path / "copy")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 2


def test_a_folder_of_overlays_that_isnt_there(saved, tmp_path, capsys):
    assert main(["serve", str(saved), "--overlays", str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err


def test_without_the_servers_packages(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(saved)]) == 1
    assert 'pip install "sense-v2[serve]"' in capsys.readouterr().err
