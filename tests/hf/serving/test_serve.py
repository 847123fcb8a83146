"""`sense-engram serve` in a process of its own, asked by OpenAI's client."""

import json
import os
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
from sense_v2.hf import from_pretrained, save_pretrained
from sense_v2.hf.attach import detach_engram

openai = pytest.importorskip("openai")
ROOT = Path(__file__).parents[3]
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
    return folder / "model"


@pytest.fixture(scope="module")
def client(saved):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sense_v2.cli.main", "serve", str(saved), "--port", str(port), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
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
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        finally:
            server.terminate()
            server.wait(timeout=20)


def expected(model, prompt: str, max_tokens: int) -> str:
    token_ids = torch.tensor([tiny_tokenizer().encode(prompt).ids])
    out = model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tokenizer().decode(out[0, token_ids.shape[1] :], skip_special_tokens=True)


def test_the_folder_is_the_only_model(client, saved):
    assert [model.id for model in client.models.list()] == [str(saved)]


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


def test_without_the_servers_packages(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(saved)]) == 1
    assert 'pip install "sense-v2[serve]"' in capsys.readouterr().err
