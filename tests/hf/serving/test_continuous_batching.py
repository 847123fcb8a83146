"""transformers' continuous batching with memory: the tokens of full forwards without a cache, one request at a time.

Models × what the engine does to a request: many at once, prompts in chunks, prefixes shared, pages lost and computed
again or kept beside, forks, cancellations.
"""

import copy
import functools
import logging
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import ContinuousBatchingConfig, GenerationConfig

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.serving import paged_state

MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma": {},
    "gemma3": {"sliding_window": 12},
}
NEW = 8
"""Tokens generated."""

_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def bare_model(name, dtype=torch.float32):
    model = tiny_model(name, initializer_range=0.2, **MODELS[name]).to(dtype)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    return model


def remembering(name, variant="sense", dtype=torch.float32):
    return _remembering(name, variant, dtype)


@functools.cache
def _remembering(name, variant, dtype):
    folder = Path(_FOLDER.name) / f"{name}-{variant}-{dtype}"
    model = copy.deepcopy(bare_model(name, dtype))
    layers = [1, 2] if name in ("qwen3", "gemma") else [0, 2]
    attach_engram(model, tiny_config(folder, layer_indices=layers, variant=variant), tiny_tokenizer())
    wake(model.engram, scale=0.6)
    return model


def settings(**changes):
    return ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 160, "max_batch_tokens": 96, **changes})


def some_prompts(count=32, longest=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def assert_greedy(model, prompts, answers, new=NEW):
    """Each token is the likeliest of one full forward of its request alone, so all are what that goes on with."""
    assert [len(answer) for answer in answers] == [new] * len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        assert model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def batched(model, prompts, new=NEW, config=None, **changes):
    found = model.generate_batch(
        prompts,
        max_new_tokens=new,
        continuous_batching_config=settings(**changes),
        generation_config=config,
    )
    assert all(one.error is None for one in found.values())
    return [one.generated_tokens for one in found.values()]


@pytest.mark.parametrize("variant", ["sense", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_many_at_once_have_the_tokens_of_each_alone(name, variant):
    model, prompts = remembering(name, variant), some_prompts()
    assert_greedy(model, prompts, batched(model, prompts))


def test_a_state_that_is_lost_shows(monkeypatch):
    """Without what lies before, tokens are others: the tests here would find it."""
    model, prompts = remembering("llama"), some_prompts(8)
    own = paged_state.Step.interleave
    monkeypatch.setattr(paged_state.Step, "interleave", lambda self, past_NPX, new_TX: own(self, None, new_TX))
    with pytest.raises(AssertionError):
        assert_greedy(model, prompts, batched(model, prompts))


def test_a_fresh_memory_changes_no_token(tmp_path):
    model, prompts = copy.deepcopy(bare_model("llama")), some_prompts()
    expected = batched(model, prompts)
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert batched(model, prompts) == expected
    detach_engram(model)
    assert batched(model, prompts) == expected


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_prompts_in_chunks(name):
    model, prompts = remembering(name), some_prompts(6, 40, seed=1)
    assert_greedy(model, prompts, batched(model, prompts, max_batch_tokens=7))


def test_prefixes_are_shared():
    """Pages that one request filled are another's, the memory's with them."""
    model, prefix = remembering("llama"), some_prompts(1, 60, seed=2)[0] + some_prompts(1, 60, seed=5)[0]
    prompts = [[*prefix[: 4 * n], 7 + n, 9] for n in range(1, len(prefix) // 4)]
    matched = []
    with model.continuous_batching_context_manager(continuous_batching_config=settings()) as manager:
        for prompt in prompts:
            name = manager.add_request(prompt, max_new_tokens=NEW)
            found = next(manager.request_id_iter(name))
            assert_greedy(model, [prompt], [found.generated_tokens])
            cache = manager.batch_processor.cache
            matched.append(cache.search_prefix_match("probe", [*prefix, 1]))
            cache.free_blocks("probe")
    assert matched[-1] > 16


def test_requests_that_lose_their_pages(monkeypatch):
    """There are pages for a few only; the others are computed again."""
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

    offloaded, own = [], OffloadingManager.offload_requests
    monkeypatch.setattr(
        OffloadingManager, "offload_requests", lambda self, *args: offloaded.append(1) or own(self, *args)
    )
    model, prompts = remembering("llama"), some_prompts(10, 20, seed=4)
    found = batched(model, prompts, new=30, num_blocks=14, allow_block_sharing=False)
    assert_greedy(model, prompts, found, 30)
    assert offloaded


def test_forks_of_a_request():
    """Several answers to a prompt: each token is as likely as a full forward says, and the answers differ."""
    model, prompt = remembering("llama"), some_prompts(1, 30, seed=6)[0]
    config = GenerationConfig(
        do_sample=True, top_k=3, num_return_sequences=6, eos_token_id=-1, pad_token_id=0, temperature=1.0
    )
    answers = batched(model, [prompt], config=config, return_logprobs=False, seed=0)
    assert len({tuple(answer) for answer in answers}) > 1
    for answer in answers:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(3).indices
        assert all(token in row for token, row in zip(answer, best.tolist(), strict=True))


def test_sampling_with_a_seed_is_generates():
    """As many tokens are drawn a step, from the same distributions in the same order."""
    model = remembering("llama")
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (5, 9), generator=generator)
    config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=0, eos_token_id=-1, pad_token_id=0, max_new_tokens=NEW
    )
    found = batched(model, ids.tolist(), config=config, seed=11, allow_block_sharing=False)
    torch.manual_seed(11)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert found == expected[:, ids.shape[1] :].tolist()


def test_cancelled_requests_leave_the_others_alone():
    model, prompts = remembering("llama"), some_prompts(12, 30, seed=8)
    with model.continuous_batching_context_manager(continuous_batching_config=settings()) as manager:
        gone = [manager.add_request(p, max_new_tokens=90, streaming=True) for p in prompts[:6]]
        seen = set()
        while seen != set(gone):
            seen.add(manager.get_result(timeout=30).request_id)
        for name in gone[::2]:
            manager.cancel_request(name)
        stay = [manager.add_request(p, max_new_tokens=NEW) for p in prompts[6:]]
        for name in gone[1::2]:
            manager.cancel_request(name)
        found = {}
        while len(found) < len(stay):
            one = manager.get_result(timeout=30)
            if one.request_id in stay:
                found[one.request_id] = one.generated_tokens
    assert_greedy(model, prompts[6:], [found[name] for name in stay])


def test_bfloat16():
    """Compressed ids take two values of the cache."""
    model, prompts = remembering("llama", dtype=torch.bfloat16), some_prompts(8, seed=9)
    for prompt, answer in zip(prompts, batched(model, prompts), strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.15  # rounding can turn two that are nearly as likely


def test_eager_attention_and_a_manager_that_stays():
    model, prompts = remembering("llama"), some_prompts(6, seed=10)
    model.set_attn_implementation("eager")
    try:
        for _ in range(2):
            found = model.generate_batch(
                prompts, max_new_tokens=NEW, continuous_batching_config=settings(), persistent_manager=True
            )
            assert_greedy(model, prompts, [one.generated_tokens for one in found.values()])
        assert hasattr(model, "_cached_continuous_batching_manager")
        model.destroy_cached_continuous_batching_manager()
        assert not hasattr(model, "_cached_continuous_batching_manager")
    finally:
        model.set_attn_implementation("sdpa")


def test_what_fails_while_it_runs_fails_its_requests(monkeypatch):
    """A row that can't be read is the error of the requests that wait, not an empty answer."""
    model = remembering("llama")
    monkeypatch.setattr(model.engram, "begin_rows", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    found = model.generate_batch([[5, 6]], max_new_tokens=2, continuous_batching_config=settings())
    assert [one.error for one in found.values()] == ["the disk is gone"]
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


REFUSED = {
    "a CUDA graph": ({"use_cuda_graph": True}, {}, "no CUDA graph and no compiled step"),
    "half a CUDA graph": ({"use_cuda_graph": (False, True)}, {}, "no CUDA graph and no compiled step"),
    "a compiled step": ({"default_compile_level": 1}, {}, "no CUDA graph and no compiled step"),
    "a memory that looks ahead": ({}, {"causal": False}, "looks ahead"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_served_is_refused_before_it_starts(case, tmp_path):
    given, memory, why = REFUSED[case]
    model = copy.deepcopy(bare_model("llama"))
    attach_engram(model, tiny_config(tmp_path, **memory), tiny_tokenizer())
    with pytest.raises(ValueError, match=why):
        model.generate_batch([[5, 6]], max_new_tokens=2, continuous_batching_config=settings(**given))


def test_a_window_shorter_than_the_memorys_reach_is_refused(tmp_path):
    model = tiny_model("mistral", sliding_window=2)
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"depends on 2 before it.*keeps 1 \(sliding_window = 2\)"):
        model.generate_batch([[5, 6]], max_new_tokens=2, continuous_batching_config=settings())


def test_training_mode_is_left_and_arguments_are_not_changed():
    model, given = remembering("llama"), settings()
    before = copy.deepcopy(given)
    model.init_continuous_batching(continuous_batching_config=given)
    assert given == before
