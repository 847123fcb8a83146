"""Continuous batching in which each request has its own overlay: the tokens of that overlay under a model alone."""

import pytest
import torch
from test_chosen_overlays import with_both, with_one
from test_continuous_batching import NEW, assert_greedy, settings, some_prompts

from sense_v2.hf import unload_overlay
from sense_v2.hf.overlays import ids_with_overlay


def chosen(count):
    return [(None, "a", "b")[number % 3] for number in range(count)]


def assert_each(name, overlays, prompts, answers, new=NEW):
    for delta in (None, "a", "b"):
        own = [number for number, one in enumerate(overlays) if one == delta]
        assert_greedy(with_one(name, delta), [prompts[n] for n in own], [answers[n] for n in own], new)


def batched(model, prompts, overlays, new=NEW, **changes):
    found = model.generate_batch(
        prompts, overlay=overlays, max_new_tokens=new, continuous_batching_config=settings(**changes)
    )
    assert [one.error for one in found.values()] == [None] * len(prompts)
    assert [one.prompt_ids for one in found.values()] == prompts
    return [one.generated_tokens for one in found.values()]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_many_at_once(name):
    prompts, overlays = some_prompts(24, seed=30), chosen(24)
    model = with_both(name)
    assert_each(name, overlays, prompts, batched(model, prompts, overlays))
    with pytest.raises(AssertionError):  # or the overlays would show in no token
        assert_each(name, overlays, prompts, batched(model, prompts, [None] * 24))
    assert_each(name, [None] * 24, prompts, batched(model, prompts, None))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompts_in_chunks(name):
    """A chunk can begin behind the end of a window, whose slots the chunk before has filled again."""
    prompts, overlays = some_prompts(6, 40, seed=31), chosen(6)
    assert_each(name, overlays, prompts, batched(with_both(name), prompts, overlays, max_batch_tokens=7))
    assert_each(name, overlays, prompts, batched(with_both(name), prompts, overlays, max_batch_tokens=32))


def test_requests_that_lose_their_pages(monkeypatch):
    """What was generated comes again as a part of the prompt, without a word about its overlay."""
    from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

    offloaded, own = [], OffloadingManager.offload_requests
    monkeypatch.setattr(
        OffloadingManager, "offload_requests", lambda self, *args: offloaded.append(1) or own(self, *args)
    )
    prompts, overlays = some_prompts(10, 20, seed=32), chosen(10)
    found = batched(with_both(), prompts, overlays, new=30, num_blocks=14, allow_block_sharing=False)
    assert_each("llama", overlays, prompts, found, 30)
    assert offloaded


def test_prefixes_are_shared_within_an_overlay_alone():
    model, prompt = with_both(), [5 + n % 80 for n in range(50)]
    with model.continuous_batching_context_manager(continuous_batching_config=settings()) as manager:

        def shared(overlay):
            cache = manager.batch_processor.cache
            found = cache.search_prefix_match("probe", ids_with_overlay(model, prompt, overlay))
            cache.free_blocks("probe")
            return found

        for overlay, before in ((None, 0), ("a", 0), ("b", 0), ("a", 48), (None, 48), ("b", 48)):
            if manager.batch_processor is not None:
                assert shared(overlay) == before
            name = manager.add_request(ids_with_overlay(model, prompt, overlay), max_new_tokens=NEW)
            found = next(manager.request_id_iter(name))
            assert_greedy(with_one("llama", overlay), [prompt], [found.generated_tokens])
            assert shared(overlay) == 48


def test_forks_have_the_overlay_of_their_request():
    from transformers import GenerationConfig

    model, prompt = with_both(), some_prompts(1, 30, seed=33)[0]
    config = GenerationConfig(do_sample=True, top_k=2, num_return_sequences=5, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(
        [prompt], overlay=["a"], generation_config=config, max_new_tokens=NEW, continuous_batching_config=settings()
    )
    answers = [one.generated_tokens for one in found.values()]
    assert len({tuple(answer) for answer in answers}) > 1
    for answer in answers:
        with torch.no_grad():
            logits = with_one("llama", "a")(torch.tensor([[*prompt, *answer]]), use_cache=False).logits
        best = logits[0, len(prompt) - 1 : -1].topk(2).indices.tolist()
        assert all(token in row for token, row in zip(answer, best, strict=True))


def test_an_overlay_that_is_unloaded_in_the_middle_leaves_the_others_alone():
    model, prompts = with_both(), some_prompts(6, 30, seed=34)
    with model.continuous_batching_context_manager(continuous_batching_config=settings()) as manager:
        gone = manager.add_request(ids_with_overlay(model, prompts[0], "b"), max_new_tokens=90, streaming=True)
        next(manager.request_id_iter(gone))
        unload_overlay(model, "b")
        names = [
            manager.add_request(ids_with_overlay(model, prompt, overlay), max_new_tokens=NEW)
            for prompt, overlay in zip(prompts[1:], [None, "a", None, "a", None], strict=True)
        ]
        answers = {}
        while len(answers) < len(names):
            one = manager.get_result(timeout=30)
            if one.request_id in names:
                answers[one.request_id] = one.generated_tokens
        manager.cancel_request(gone)
    found = [answers[name] for name in names]
    assert_each("llama", [None, "a", None, "a", None], prompts[1:], found)


def test_what_is_refused():
    model = with_both()
    with pytest.raises(ValueError, match="no overlay 'c' is loaded"):
        model.generate_batch([[5, 6]], overlay=["c"], max_new_tokens=2)
    with pytest.raises(ValueError, match="overlay names 2 overlays for 1 sequences"):
        model.generate_batch([[5, 6]], overlay=["a", "b"], max_new_tokens=2)
    with pytest.raises(ValueError, match="overlay is a name, or a list of names and None"):
        model.generate_batch([[5, 6]], overlay=5, max_new_tokens=2)
    model.engram.overlay_numbers["a"] = 2**31 // 96
    with pytest.raises(ValueError, match="22369621 overlays were loaded"):
        ids_with_overlay(model, [5, 6], "a")
