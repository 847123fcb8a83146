"""The engines of a server: each request has its own settings, whatever else is in the batch."""

import asyncio
import copy
import os
import time

import pytest
import torch
from test_continuous_batching import NEW, assert_greedy, bare_model, remembering, some_prompts
from test_serve import tokenizer
from tiny import tiny_config, tiny_tokenizer, wake
from transformers import GenerationConfig

pytest.importorskip("fastapi")
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.serving.engines import Engines, State
from sense_v2.hf.serving.gate import asked


@pytest.fixture
def engines():
    made = Engines(2048)
    made.init_cb(remembering("llama"), None)
    yield made
    made.stop()


def settings(**changes):
    given = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "max_new_tokens": NEW, "use_cache": False}
    return GenerationConfig(**{**given, **changes})


async def answer(engines, prompt, name, **changes):
    inputs = {"input_ids": prompt, "attention_mask": [1] * len(prompt)}
    found = await engines.generate_non_streaming(remembering("llama"), tokenizer(), inputs, settings(**changes), name)
    return [int(token) for token in found[2]]


def test_settings_are_each_requests_own(engines):
    """Sampling that leaves one token is greedy, beside some that leaves many."""
    prompts = some_prompts(12, 20, seed=20)
    kinds = [
        {},
        {"do_sample": True, "temperature": 1e-4},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-6, "temperature": 2.0},
        {"do_sample": True, "temperature": 3.0, "top_k": 0},
        {"repetition_penalty": 50.0},
    ]

    async def all_at_once():
        asks = [answer(engines, p, f"r{n}", **kinds[n % len(kinds)]) for n, p in enumerate(prompts)]
        return await asyncio.gather(*asks)

    found = asyncio.run(all_at_once())
    for kind in range(4):
        assert_greedy(remembering("llama"), prompts[kind::6], found[kind::6])
    for kind in (4, 5):
        with pytest.raises(AssertionError):
            assert_greedy(remembering("llama"), prompts[kind::6], found[kind::6])
    assert set(engines.batched) == {False, True}
    assert engines.num_waiting == 0


def test_a_seed_gives_the_same_answer_again(engines):
    async def seeded():
        asked.set({"seed": 5})
        torch.manual_seed(5)  # as transformers' handlers do
        return await answer(engines, [5, 6, 7], "seeded", do_sample=True, temperature=2.0)

    assert asyncio.run(seeded()) == asyncio.run(seeded())
    assert not engines.batched


def test_streams_and_a_client_that_leaves(engines):
    prompts = some_prompts(4, 20, seed=21)

    async def all_at_once():
        model = remembering("llama")
        streams = [
            engines.generate_streaming(
                model, tokenizer(), {"input_ids": prompt}, settings(max_new_tokens=60), f"s{number}"
            )
            for number, prompt in enumerate(prompts)
        ]
        firsts = [await asyncio.wait_for(queue.get(), 30) for queue, _ in streams]
        streams[0][1].cancel()
        waiting = asyncio.create_task(answer(engines, prompts[1], "leaves", max_new_tokens=80))
        await asyncio.sleep(0.05)
        waiting.cancel()
        texts = []
        for (queue, _), first in zip(streams[1:], firsts[1:], strict=True):
            parts = [first]
            while (part := await asyncio.wait_for(queue.get(), 30)) is not None:
                parts.append(part)
            texts.append("".join(parts))
        for _ in range(100):
            if engines.num_waiting == 0:
                break
            await asyncio.sleep(0.05)
        return texts, streams

    texts, streams = asyncio.run(all_at_once())
    assert engines.num_waiting == 0
    assert [streamer.total_tokens for _, streamer in streams[1:]] == [60] * 3
    model = remembering("llama")
    for prompt, text in zip(prompts[1:], texts, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings(max_new_tokens=60, use_cache=True)
        )
        whole = tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text.strip() == whole.strip()


def test_an_engine_that_failed_says_so(engines, monkeypatch):
    model = remembering("llama")
    monkeypatch.setattr(model.engram, "begin_rows", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(RuntimeError, match="can't be generated: the disk is gone"):
        asyncio.run(answer(engines, [5, 6], "fails"))
    monkeypatch.undo()
    deadline = time.monotonic() + 10
    while engines.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engines.is_alive()
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        asyncio.run(answer(engines, [5, 6], "too late"))


def on_a_copy(folder):
    """A model whose table is in `folder`, its engines, and what it says to a prompt."""
    model = attach_engram(copy.deepcopy(bare_model("llama")), tiny_config(folder), tiny_tokenizer())
    wake(model.engram, scale=0.6)
    made = Engines(2048)
    made.init_cb(model, None)
    return made, asyncio.run(answer(made, [5, 6, 7], "before"))


def test_a_table_that_vanishes_while_it_serves_is_there_until_the_end(tmp_path):
    made, before = on_a_copy(tmp_path)
    (tmp_path / "engram_table.dat").unlink()
    try:
        assert asyncio.run(answer(made, [5, 6, 7], "after")) == before
        assert made.is_alive()
    finally:
        made.stop()


def test_a_table_that_is_cut_while_it_serves_fails_its_requests_with_a_sentence(tmp_path):
    made, _ = on_a_copy(tmp_path)
    os.truncate(tmp_path / "engram_table.dat", 64)
    try:
        with pytest.raises(RuntimeError, match=r"can't be generated: .*engram_table.dat.*"):
            asyncio.run(answer(made, [5, 6, 7], "after"))
        deadline = time.monotonic() + 10
        while made.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not made.is_alive()  # /health says so
    finally:
        made.stop()


def test_a_model_that_cant_is_answered_one_after_the_other(caplog):
    from tiny import tiny_model

    state, model = State(2048), tiny_model("lfm2")
    assert not state.use_continuous_batching(model, None)
    manager, ids = state.get_manager("any", use_cb=False), torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = asyncio.run(manager.generate_non_streaming(model, tokenizer(), inputs, settings(use_cache=True), "alone"))
    assert_greedy(model, ids.tolist(), [found[2].tolist()])
    assert not state.engines.batched
    assert "no attention" in caplog.text
    assert State(2048).use_continuous_batching(copy.copy(remembering("llama")), None)
    assert not State(2048, batched=False).use_continuous_batching(remembering("llama"), None)
