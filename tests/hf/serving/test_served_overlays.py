"""An overlay for each request of a server: from a folder that is watched, many in one batch, the base untouched."""

import asyncio
import json
import os
import random
import shutil

import pytest
import torch
from test_chosen_overlays import saved, with_one
from test_continuous_batching import assert_greedy, some_prompts
from test_engines import settings
from test_serve import tokenizer

pytest.importorskip("fastapi")
from fastapi import HTTPException

from sense_v2.hf import from_pretrained
from sense_v2.hf.serving.engines import Engines
from sense_v2.hf.serving.gate import OneModel
from sense_v2.hf.serving.served_overlays import ServedOverlays


@pytest.fixture
def served(tmp_path):
    """What requests may name: a and b."""
    for name in ("a", "b"):
        shutil.copy(saved("llama") / f"{name}.safetensors", tmp_path)
    return ServedOverlays(tmp_path)


@pytest.fixture
def engines(served):
    made = Engines(2048, served)
    model = from_pretrained(saved("llama") / "model")
    made.init_cb(model, None)
    yield made
    made.stop()


async def answer(engines, prompt, overlay, number=0, **changes):
    inputs = {"input_ids": prompt, "attention_mask": [1] * len(prompt)}
    with engines.overlays.answering(overlay):
        found = await engines.generate_non_streaming(
            engines.model, tokenizer(), inputs, settings(**changes), f"r{number}-{id(prompt)}"
        )
    return [int(token) for token in found[2]]


def replaced(path, source):
    """As our own tools write a delta: a new file, renamed."""
    shutil.copy(source, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def loaded_in(engines):
    return sorted(engines.model.engram.overlay_numbers)


def test_each_request_has_its_own_in_a_batch_or_alone(engines):
    prompts = some_prompts(18, 20, seed=40)
    overlays = [(None, "a", "b")[number % 3] for number in range(18)]
    kinds = [{}, {"do_sample": True, "top_k": 1}, {"repetition_penalty": 1.0001}]

    async def all_at_once():
        asks = [
            answer(engines, prompt, overlay, number, **kinds[number // 3 % 3])
            for number, (prompt, overlay) in enumerate(zip(prompts, overlays, strict=True))
        ]
        return await asyncio.gather(*asks)

    found = asyncio.run(all_at_once())
    for start, delta in enumerate((None, "a", "b")):
        assert_greedy(with_one("llama", delta), prompts[start::3], found[start::3])
    assert set(engines.batched) == {False, True}
    assert loaded_in(engines) == ["a@1", "b@2"]


def test_a_model_that_isnt_batched(engines):
    """transformers' handlers make tensors for it."""

    async def ask():
        inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        with engines.overlays.answering("b"):
            found = await engines.generate_non_streaming(
                engines.model, tokenizer(), inputs, settings(use_cache=True), "alone"
            )
        return found[2].tolist()

    assert_greedy(with_one("llama", "b"), [[5, 6, 7]], [asyncio.run(ask())])
    assert not engines.batched


def test_files_that_come_change_and_go(engines, served):
    folder, prompt = served.folder, [5, 6, 7, 8]
    told = {delta: asyncio.run(answer(engines, prompt, delta)) for delta in (None, "a", "b")}
    assert len({tuple(one) for one in told.values()}) == 3
    replaced(folder / "new.safetensors", folder / "a.safetensors")
    assert list(served.files()) == ["a", "b", "new"]
    assert asyncio.run(answer(engines, prompt, "new")) == told["a"]
    replaced(folder / "new.safetensors", folder / "b.safetensors")
    assert asyncio.run(answer(engines, prompt, "new")) == told["b"]
    assert loaded_in(engines) == ["a@1", "b@2", "new@4"]
    (folder / "new.safetensors").unlink()
    assert list(served.files()) == ["a", "b"]
    assert loaded_in(engines) == ["a@1", "b@2"]
    (folder / ".hidden.safetensors").write_bytes(b"")
    assert list(served.files()) == ["a", "b"]


def test_an_answer_goes_on_with_what_it_began_with(engines, served):
    """Its file is replaced, and then gone, while the answer is generated."""
    prompt = [5, 6, 7, 8]

    async def meanwhile():
        slow = asyncio.create_task(answer(engines, prompt, "a", 1, max_new_tokens=60))
        while not engines.num_waiting:
            await asyncio.sleep(0.001)
        replaced(served.folder / "a.safetensors", served.folder / "b.safetensors")
        fast = await answer(engines, prompt, "a", 2)
        (served.folder / "a.safetensors").unlink()
        served.files()
        return await slow, fast

    slow, fast = asyncio.run(meanwhile())
    assert_greedy(with_one("llama", "a"), [prompt], [slow], 60)
    assert_greedy(with_one("llama", "b"), [prompt], [fast])
    assert loaded_in(engines) == []


@pytest.mark.parametrize("damage", ["cut", "another table's", "gone"])
def test_a_delta_that_cant_be_read_is_an_error_of_its_requests_alone(engines, served, damage):
    prompt, path = [5, 6, 7, 8], served.folder / "a.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "another table's":
        shutil.copy(saved("qwen3") / "a.safetensors", path)
    else:
        path.unlink()

    async def both():
        return await asyncio.gather(
            answer(engines, prompt, "a", 1), answer(engines, prompt, "b", 2), return_exceptions=True
        )

    refused, found = asyncio.run(both())
    assert isinstance(refused, HTTPException)
    assert (refused.status_code, "can't be read now" in refused.detail) == (503, True)
    assert_greedy(with_one("llama", "b"), [prompt], [found])
    shutil.copy(saved("llama") / "a.safetensors", path)
    assert_greedy(with_one("llama", "a"), [prompt], [asyncio.run(answer(engines, prompt, "a", 3))])


def test_a_client_that_leaves_gives_its_overlay_back(engines, served):
    async def leave():
        waiting = asyncio.create_task(answer(engines, [5, 6], "b", 1, max_new_tokens=90))
        while not engines.num_waiting:
            await asyncio.sleep(0.001)
        waiting.cancel()
        (served.folder / "b.safetensors").unlink()
        await asyncio.gather(waiting, return_exceptions=True)
        served.files()
        return await answer(engines, [5, 6], None, 2)

    found = asyncio.run(leave())
    assert_greedy(with_one("llama", None), [[5, 6]], [found])
    assert loaded_in(engines) == []
    assert engines.is_alive()


@pytest.mark.slow
def test_400_requests_with_cancels_while_an_overlay_is_replaced(engines, served):
    """Every token is right, and neither files nor overlays pile up."""
    chance, found, files_open = random.Random(0), [], []

    async def one(number, turn):
        async with turn:
            length = chance.randrange(1, 30)
            prompt = [7] * length if chance.random() < 0.3 else [chance.randrange(3, 96) for _ in range(length)]
            overlay = chance.choice([None, "a", "b", "c"])
            delta = chance.choice("ab") if overlay == "c" else overlay
            new = chance.randrange(1, 16)
            kind = chance.choice([{}, {"do_sample": True, "top_k": 1}])

            async def ask():
                if overlay == "c":  # nothing comes between this and the reading of it
                    replaced(served.folder / "c.safetensors", saved("llama") / f"{delta}.safetensors")
                return await answer(engines, prompt, overlay, number, max_new_tokens=new, **kind)

            asked = asyncio.create_task(ask())
            if chance.random() < 0.1:
                await asyncio.sleep(chance.random() / 50)
                asked.cancel()
            (tokens,) = await asyncio.gather(asked, return_exceptions=True)
            if not isinstance(tokens, asyncio.CancelledError):
                found.append((delta, prompt, tokens, new))

    async def rounds():
        turn = asyncio.Semaphore(32)
        for begin in range(0, 400, 100):
            await asyncio.gather(*(one(number, turn) for number in range(begin, begin + 100)))
            while engines.num_waiting:
                await asyncio.sleep(0.01)
            files_open.append(len(os.listdir("/proc/self/fd")))
            assert len(loaded_in(engines)) == 3

    asyncio.run(rounds())
    assert 300 < len(found) < 400
    for delta, prompt, tokens, new in found:
        assert_greedy(with_one("llama", delta), [prompt], [tokens], new)
    assert files_open[0] == files_open[-1]


# What a request may name


async def app(scope, receive, send):
    """Answers with the body that it got."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(served, path, **request):
    sent = []

    async def receive():
        return {"type": "http.request", "body": json.dumps(request).encode()}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "POST" if request else "GET", "headers": []}
    asyncio.run(OneModel(app, "mine", lambda text: len(text.split()), 20, served)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_the_list_and_what_the_app_is_asked(served):
    status, body = ask(served, "/v1/models")
    assert (status, [model["id"] for model in body["data"]]) == (200, ["mine", "mine+a", "mine+b"])
    assert ask(served, "/v1/completions", prompt="x", model="mine+a") == (200, {"prompt": "x", "model": "mine"})
    assert ask(served, "/v1/completions", prompt="x", model="mine") == (200, {"prompt": "x", "model": "mine"})


@pytest.mark.parametrize(
    "name", ["mine+c", "mine+", "mine+../a", "mine+a.safetensors", "a", "mine+/etc/passwd", 3, ["mine+a"]]
)
def test_another_name_is_a_404(served, name):
    (served.folder.parent / "c.safetensors").write_bytes(b"")
    status, body = ask(served, "/v1/completions", prompt="x", model=name)
    assert status == 404
    assert "isn't served; 'mine' and its overlays, which /v1/models lists, are" in body["error"]["message"]
