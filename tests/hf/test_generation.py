"""Generation with a cache equals the full forward without one: models × modes.

Each mode is a function of a model that fails where its cached logits or tokens are not those of full forwards. It is
run on the model with memory; where the model without memory can't do it, `BARE_CANNOT` says so, and a test holds that
this is still true.
"""

import copy
import functools
import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    MambaModel,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    cache_utils,
    pipeline,
)

from sense_v2.hf import forward_hooks
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.cache import EngramState

# What makes each differ from the others: windows shorter than the sequences, recurrent states, positions learned.
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma3": {"sliding_window": 6},
    "gpt2": {},
    "lfm2": {},
    "qwen3_next": {},
    "falcon_h1": {},
    "mamba": {},
    "mamba2": {},
}
LATER = ("qwen3", "gemma", "lfm2", "falcon_h1")
"""Have no memory before their first layer, so that a cache is filled already when the memory first sees it."""
CAPACITY = 40
"""Of a static cache."""
NEW = 6
"""Tokens generated."""

_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def bare_model(name):
    """Random weights large enough that another token changes the logits by more than rounding does."""
    model = tiny_model(name, initializer_range=0.2, **MODELS[name])
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def remembering(name, variant="sense"):
    folder = Path(_FOLDER.name) / f"{name}-{variant}"
    model = copy.deepcopy(bare_model(name))
    layers = [1, 2] if name in LATER else [0, 2]
    attach_engram(model, tiny_config(folder, layer_indices=layers, variant=variant), tiny_tokenizer())
    wake(model.engram, scale=0.6)
    return model


def some_ids(batch=2, length=13, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions_of(mask):
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


def full_logits(model, ids, mask=None):
    given = {} if mask is None else {"attention_mask": mask, "position_ids": positions_of(mask)}
    with torch.no_grad():
        return model(ids, use_cache=False, **given).logits


def full_greedy(model, ids, mask=None, new=NEW):
    """Tokens and the logits each was taken from, one full forward a token."""
    logits = []
    for _ in range(new):
        logits.append(full_logits(model, ids, mask)[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(logits, 1)


def generated(model, ids, mask=None, **given):
    given = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, **given}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, output_scores=True, **given
    )


def assert_same(logits, expected):
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def assert_generates(model, ids, mask=None, **given):
    out = generated(model, ids, mask, **given)
    tokens, logits = full_greedy(model, ids, mask)
    assert torch.equal(out.sequences, tokens)
    assert_same(torch.stack(out.logits, 1), logits)


# transformers 5.24 calls it so; before, and until 5.40, it is past_key_values.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def forward(model, cache, ids, **given):
    """Logits of the next tokens of a stream whose earlier ones are in `cache`."""
    with torch.no_grad():
        return model(ids, use_cache=True, **{CACHE: cache}, **given).logits


def in_parts(model, cache, ids, sizes):
    """Logits of all of `ids`, given in parts of these sizes and a rest."""
    parts, done = [], 0
    for size in (*sizes, ids.shape[1]):
        part = ids[:, done : done + size]
        if part.shape[1]:
            parts.append(forward(model, cache, part))
        done += size
    return torch.cat(parts, 1)


def new_cache(model):
    return DynamicCache(config=model.config)


# --- the modes ---


def greedy(model):
    assert_generates(model, some_ids())


def left_padding(model):
    ids, mask = padded()
    assert_generates(model, ids, mask)


def padded():
    ids = some_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [7]])).long()
    return ids * mask, mask


def sampling(model):
    torch.manual_seed(3)
    expected = generated(model, some_ids(), do_sample=True, use_cache=False)
    torch.manual_seed(3)
    out = generated(model, some_ids(), do_sample=True)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same(torch.stack(out.logits, 1), torch.stack(expected.logits, 1))


def beam_search(model):
    for ids, mask in ((some_ids(), None), padded()):
        out = generated(model, ids, mask, num_beams=3, num_return_sequences=2)
        expected = generated(model, ids, mask, num_beams=3, num_return_sequences=2, use_cache=False)
        assert torch.equal(out.sequences, expected.sequences)
        assert_same(out.sequences_scores, expected.sequences_scores)


def chunked_prefill(model):
    for size in (1, 2, 5):
        for ids, mask in ((some_ids(), None), padded()):
            assert_generates(model, ids, mask, prefill_chunk_size=size)


def several_tokens_on_a_cache(model):
    ids = some_ids()
    expected = full_logits(model, ids)
    for sizes in ((4, 1, 3), (1, 1, 1, 6), (12,), (2, 9)):
        assert_same(in_parts(model, new_cache(model), ids, sizes), expected)


def a_cache_that_the_model_makes(model):
    ids = some_ids()
    with torch.no_grad():
        out = model(ids[:, :5], use_cache=True)
    cache = out[CACHE]
    assert_same(torch.cat([out.logits, in_parts(model, cache, ids[:, 5:], (1, 4))], 1), full_logits(model, ids))


def a_cache_that_makes_its_layers_as_it_goes(model):
    ids = some_ids()
    assert_same(in_parts(model, DynamicCache(), ids, (4, 1, 3)), full_logits(model, ids))


def two_streams(model):
    first, second = some_ids(seed=1), some_ids(seed=2)
    caches = new_cache(model), new_cache(model)
    found = [[], []]
    for start, stop in ((0, 3), (3, 4), (4, 9), (9, 13)):
        for ids, cache, logits in zip((first, second), caches, found, strict=True):
            logits.append(forward(model, cache, ids[:, start:stop]))
    assert_same(torch.cat(found[0], 1), full_logits(model, first))
    assert_same(torch.cat(found[1], 1), full_logits(model, second))


def prompt_lookup(model):
    pattern = some_ids(1, 5)
    ids = torch.cat([pattern, pattern, pattern[:, :2]], 1)
    out = generated(model, ids, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, full_greedy(model, ids)[0])


def assisted(model):
    """By an assistant that is right now and then, and one that has memory as well."""
    other = copy.deepcopy(bare_model("llama"))
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    for assistant in (other, remembering("llama")):
        ids = some_ids(1)
        out = generated(model, ids, assistant_model=assistant, max_new_tokens=12)
        assert torch.equal(out.sequences, full_greedy(model, ids, new=12)[0])


def crop(model):
    """Further back than the memory reaches, and less far; then other tokens."""
    ids, other = some_ids(), some_ids(seed=4)
    for removed in (1, 6, 12):
        cache = new_cache(model)
        cache.activate_past_recording()
        forward(model, cache, ids)
        cache.crop(-removed)
        kept = ids.shape[1] - removed
        sequence = torch.cat([ids[:, :kept], other[:, :5]], 1)
        logits = in_parts(model, cache, sequence[:, kept:], (1, 2))
        assert_same(logits, full_logits(model, sequence)[:, kept:])


def reorder_cache(model):
    ids, order = some_ids(3), torch.tensor([2, 2, 0])
    cache = new_cache(model)
    forward(model, cache, ids[:, :8])
    cache.reorder_cache(order)
    assert_same(in_parts(model, cache, ids[order][:, 8:], (1,)), full_logits(model, ids[order])[:, 8:])


def batch_select_indices(model):
    ids, order = some_ids(3), torch.tensor([2, 0])
    cache = new_cache(model)
    forward(model, cache, ids[:, :8])
    cache.batch_select_indices(order)
    assert_same(in_parts(model, cache, ids[order][:, 8:], (1,)), full_logits(model, ids[order])[:, 8:])


def batch_repeat_interleave(model):
    ids, order = some_ids(2), torch.tensor([0, 0, 0, 1, 1, 1])
    cache = new_cache(model)
    forward(model, cache, ids[:, :8])
    cache.batch_repeat_interleave(3)
    assert_same(in_parts(model, cache, ids[order][:, 8:], (1,)), full_logits(model, ids[order])[:, 8:])


def reset(model):
    cache = new_cache(model)
    forward(model, cache, some_ids(seed=8))
    cache.reset()
    assert_same(in_parts(model, cache, some_ids(), (3, 1)), full_logits(model, some_ids()))


def a_prefix_for_two_continuations(model):
    prefix = some_ids(1, 7)
    cache = new_cache(model)
    forward(model, cache, prefix[:, :7])
    for seed in (1, 2):
        ids = torch.cat([prefix, some_ids(1, 5, seed)], 1)
        logits = in_parts(model, copy.deepcopy(cache), ids[:, 7:], (1, 2))
        assert_same(logits, full_logits(model, ids)[:, 7:])
        out = generated(model, ids, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(out.sequences, full_greedy(model, ids)[0])


def static_cache(model):
    for ids, mask in ((some_ids(), None), padded()):
        assert_generates(model, ids, mask, cache_implementation="static", disable_compile=True)


def static_cache_in_parts(model):
    ids = some_ids()
    for sizes in ((4, 1, 3), (1, 1, 1, 6), (2, 9)):
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        assert_same(in_parts(model, cache, ids, sizes), full_logits(model, ids))
    cache.reset()
    assert_same(in_parts(model, cache, ids, (5,)), full_logits(model, ids))


def static_cache_with_beams(model):
    ids = some_ids()
    settings = {"num_beams": 3, "disable_compile": True}
    out = generated(model, ids, cache_implementation="static", **settings)
    assert torch.equal(out.sequences, generated(model, ids, num_beams=3, use_cache=False).sequences)


def static_cache_cropped(model):
    ids = some_ids()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    forward(model, cache, torch.cat([ids[:, :8], some_ids(seed=4)[:, :6]], 1))
    cache.crop(-6)
    assert_same(in_parts(model, cache, ids[:, 8:], (1, 2)), full_logits(model, ids)[:, 8:])


def embeddings(model):
    ids = some_ids()
    embedded = model.get_input_embeddings()(ids)
    given = {"engram_input_ids": ids} if hasattr(model, "engram") else {}
    out = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False, **given)
    tokens = full_greedy(model, ids)[0]
    assert torch.equal(out, tokens[:, ids.shape[1] :])
    both = model.generate(ids, inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(both, tokens)


MODES = [
    greedy,
    left_padding,
    sampling,
    beam_search,
    chunked_prefill,
    several_tokens_on_a_cache,
    a_cache_that_the_model_makes,
    a_cache_that_makes_its_layers_as_it_goes,
    two_streams,
    prompt_lookup,
    assisted,
    crop,
    reorder_cache,
    batch_select_indices,
    batch_repeat_interleave,
    reset,
    a_prefix_for_two_continuations,
    static_cache,
    static_cache_in_parts,
    static_cache_with_beams,
    static_cache_cropped,
    embeddings,
]
# What transformers itself can't do with these models, memory or not.
BARE_CANNOT = {
    *((name, "static_cache_cropped") for name in ("mistral", "gemma3", "lfm2", "qwen3_next", "falcon_h1")),
    *(
        (name, mode)
        for name in ("lfm2", "qwen3_next", "falcon_h1")
        for mode in ("a_cache_that_makes_its_layers_as_it_goes", "batch_select_indices", "batch_repeat_interleave")
    ),
    # A recurrent state can't go back.
    *((name, mode) for name in ("qwen3_next", "falcon_h1") for mode in ("prompt_lookup", "assisted", "crop")),
    ("falcon_h1", "embeddings"),
    # Nothing but a state, and Mamba's first takes several tokens at once only at the beginning.
    *(
        (name, mode)
        for name in ("mamba", "mamba2")
        for mode in (
            "chunked_prefill",
            "a_cache_that_makes_its_layers_as_it_goes",
            "prompt_lookup",
            "assisted",
            "crop",
            "batch_select_indices",
            "batch_repeat_interleave",
            "static_cache_cropped",
        )
    ),
    *(
        ("mamba", mode)
        for mode in (
            "several_tokens_on_a_cache",
            "a_cache_that_the_model_makes",
            "two_streams",
            "reorder_cache",
            "reset",
            "a_prefix_for_two_continuations",
            "static_cache_in_parts",
        )
    ),
}
# Newer than transformers 5.19: static layers that are cropped, Mamba's cache by the name that all others have, and
# ids that reach its layers through gradient checkpointing.
STATIC_CACHES_ARE_CROPPED = hasattr(cache_utils.StaticLayer, "crop")
MAMBA_IS_AS_OTHERS = "cache_params" not in inspect.signature(MambaModel.forward).parameters
if not STATIC_CACHES_ARE_CROPPED:
    BARE_CANNOT |= {(name, "static_cache_cropped") for name in MODELS}
if not MAMBA_IS_AS_OTHERS:
    BARE_CANNOT |= {("mamba2", mode) for name, mode in BARE_CANNOT if name == "mamba"}
MATRIX = [(name, mode) for name in MODELS for mode in MODES]
WITH_MEMORY = [(name, mode) for name, mode in MATRIX if (name, mode.__name__) not in BARE_CANNOT]
WITHOUT = [(name, mode) for name, mode in MATRIX if (name, mode.__name__) in BARE_CANNOT]


def ids_of(matrix):
    return [f"{name}-{mode.__name__}" for name, mode in matrix]


@pytest.mark.parametrize(("name", "mode"), WITH_MEMORY, ids=ids_of(WITH_MEMORY))
def test_equal_to_the_full_forward(name, mode):
    mode(remembering(name))


@pytest.mark.parametrize(("name", "mode"), WITHOUT, ids=ids_of(WITHOUT))
def test_what_is_left_out_fails_without_memory_as_well(name, mode):
    errors = (AssertionError, AttributeError, IndexError, RuntimeError, ValueError)
    with pytest.raises(errors if MAMBA_IS_AS_OTHERS else (*errors, KeyError, TypeError)):
        mode(bare_model(name))


@pytest.mark.skipif(not MAMBA_IS_AS_OTHERS, reason="this transformers keeps ids from checkpointed layers")
def test_a_model_that_hands_nothing_down_trains_with_gradient_checkpointing_too(tmp_path):
    model, ids = copy.deepcopy(bare_model("mamba")).train(), some_ids()
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    wake(model.engram)
    found = []
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        rows = model.engram.storage.gradients()[1]
        found.append((rows.clone(), model.engram.layers["1"].W_k.weight.grad.clone()))
        model.zero_grad()
        model.engram.storage.clear_gradients()
        model.gradient_checkpointing_enable()
    assert found[0][0].abs().max() > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "mode",
    [mode for mode in MODES if ("llama", mode.__name__) not in BARE_CANNOT],
    ids=lambda mode: mode.__name__,
)
def test_the_papers_variant_reaches_nine_positions_back(mode):
    model = remembering("llama", variant="paper")
    assert model.engram.reach == 9
    mode(model)


# --- the modes would notice ---


@pytest.mark.parametrize("part", ["recent_tokens", "remember"])
@pytest.mark.parametrize("mode", [greedy, several_tokens_on_a_cache, static_cache, two_streams, prompt_lookup])
def test_a_memory_without_its_past_is_noticed(monkeypatch, part, mode):
    forget = {"recent_tokens": lambda self: None, "remember": lambda self, layer_id, inputs_BTX: inputs_BTX}
    model = remembering("llama")
    with monkeypatch.context() as patch:
        patch.setattr(EngramState, part, forget[part])
        with pytest.raises(AssertionError):
            mode(model)


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("reorder_cache", reorder_cache),
        ("reorder_cache", beam_search),
        ("crop", crop),
        ("crop", prompt_lookup),
        ("reset", reset),
    ],
)
def test_a_memory_that_does_not_follow_its_cache_is_noticed(monkeypatch, method, mode):
    monkeypatch.setattr(EngramState, method, lambda self, *args: None)
    with pytest.raises((AssertionError, ValueError)):
        mode(remembering("llama"))


# --- any splits of any streams ---


@st.composite
def schedules(draw):
    """A few streams, and turns: which stream goes on, by how many tokens, and how many are then taken back."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    turns = draw(
        st.lists(
            st.tuples(st.integers(0, len(lengths) - 1), st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=12
        )
    )
    return lengths, turns, draw(st.integers(0, 10_000))


@pytest.mark.parametrize("name", ["llama", "mistral", "lfm2"])
@settings(max_examples=40)
@given(schedule=schedules())
def test_any_splits_of_any_streams(name, schedule):
    lengths, turns, seed = schedule
    model = remembering(name)
    streams = [some_ids(1, length, seed + number) for number, length in enumerate(lengths)]
    caches = [new_cache(model) for _ in streams]
    for cache in caches:
        cache.activate_past_recording()
    done, found = [0] * len(streams), [[] for _ in streams]

    def go_on(number, count):
        part = streams[number][:, done[number] : done[number] + count]
        if part.shape[1]:
            found[number].append(forward(model, caches[number], part))
            done[number] += part.shape[1]
        return part.shape[1]

    for number, count, taken_back in turns:
        taken_back = min(taken_back, max(go_on(number, count) - 1, 0))
        if done[number]:
            caches[number].crop(-taken_back)
        if taken_back:
            found[number][-1] = found[number][-1][:, :-taken_back]
            done[number] -= taken_back
    for number, ids in enumerate(streams):
        go_on(number, ids.shape[1])
        assert_same(torch.cat(found[number], 1), full_logits(model, ids))


def test_a_window_that_was_left_behind_is_not_rolled_back_into():
    model = remembering("mistral")
    cache = new_cache(model)
    forward(model, cache, some_ids(1, 30))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    state = cache.engram
    with pytest.raises(RuntimeError, match="the memory kept the last 8 only"):
        state.crop(-9)
    for _ in range(20):
        forward(model, cache, some_ids(1, 1))
        for track in (state.tokens, *state.conv_inputs.values()):
            # The window and what it reaches, at most twice: memory doesn't grow with the sequence.
            assert 6 + model.engram.reach <= track.values.shape[1] < 2 * (6 + model.engram.reach)


# --- caches that change the numbers ---


@pytest.fixture
def uncompiled_quanto(monkeypatch):
    """quanto without its C++ extension, which takes a minute to compile and only unpacks bits."""
    from optimum.quanto.library.extensions import cpp

    def unpack(packed, bits):
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


# quanto: its groups divide the tiny heads.
QUANTIZED = {"fp8": {}, "quanto": {"nbits": 4, "q_group_size": 4, "residual_length": 2}}
if not hasattr(cache_utils, "Fp8QuantizedLayer"):  # transformers 5.19 has none
    del QUANTIZED["fp8"]


@pytest.mark.parametrize("backend", QUANTIZED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantized_cache(name, backend, uncompiled_quanto):
    """It changes attention's numbers, so the full forward is no measure. Its own attention beside a memory computed
    anew at each call from all hidden states of the stream is one."""
    remembered, plain = remembering(name), copy.deepcopy(bare_model(name))
    ids = some_ids(1)
    seen = {0: [], 2: []}
    given = []

    def hook(layer_id):
        def add(module, args):
            seen[layer_id].append(args[0])
            hidden, all_ids = torch.cat(seen[layer_id], 1), torch.cat(given, 1)
            fused = remembered.engram.layers[str(layer_id)](hidden, all_ids)
            return (fused[:, -args[0].shape[1] :], *args[1:])

        return add

    layers = plain.base_model.h if name == "gpt2" else plain.base_model.layers
    for layer_id in seen:
        layers[layer_id].register_forward_pre_hook(hook(layer_id))
    cache, expected = QuantizedCache(backend, plain.config, **QUANTIZED[backend]), []
    for start, stop in ((0, 5), (5, 6), (6, 10), (10, 13)):
        given.append(ids[:, start:stop])
        expected.append(forward(plain, cache, ids[:, start:stop]))
    expected = torch.cat(expected, 1)
    cache = QuantizedCache(backend, remembered.config, **QUANTIZED[backend])
    found = in_parts(remembered, cache, ids, (5, 1, 4))
    assert_same(found, expected)
    assert (found - full_logits(remembered, ids)).abs().max() > 1e-3  # it shows


@pytest.mark.skipif("fp8" not in QUANTIZED, reason="no such cache")
def test_generate_with_a_quantized_cache():
    out = generated(
        remembering("llama"), some_ids(), cache_implementation="quantized", cache_config={"backend": "fp8"}
    )
    assert out.sequences.shape == (2, 13 + NEW)


# --- packed documents ---


@pytest.mark.parametrize("size", [1, 3, 5])
def test_documents_that_restart_in_a_cache_keep_apart_and_positions_that_go_on_do_not(size):
    """In whichever part of the stream a document's first position comes."""
    model, ids = remembering("llama"), some_ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    asked = []
    handle = model.engram.storage.register_forward_pre_hook(lambda module, args: asked.append(args[0].clone()))
    try:
        with torch.no_grad():
            model(ids, position_ids=positions, use_cache=False)
        whole, asked[:] = list(asked), []
        cache = new_cache(model)
        for start in range(0, 12, size):
            stop = min(start + size, 12)
            forward(model, cache, ids[:, start:stop], position_ids=positions[:, start:stop])
    finally:
        handle.remove()
    for number in range(2):
        assert torch.equal(torch.cat(asked[number::2], 1), whole[number])
    apart = [model.engram.layers["0"].row_ids(ids[:, a:b]) for a, b in ((0, 5), (5, 8), (8, 12))]
    assert torch.equal(whole[0], torch.cat(apart, 1))


def test_the_convolution_stops_at_a_document_that_began_in_an_earlier_part():
    """With one layer, before which memory is added, hidden states are the embeddings, so each document's fused states
    are known from the document alone."""
    model, ids = remembering("llama"), some_ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    fusion, fused = model.engram.layers["0"], []
    layer = model.base_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args, kwargs: fused.append(args[0]), with_kwargs=True)
    try:
        cache = new_cache(model)
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            forward(model, cache, ids[:, start:stop], position_ids=positions[:, start:stop])
    finally:
        hook.remove()
    hidden = model.get_input_embeddings()(ids)
    alone = [fusion(hidden[:, a:b], ids[:, a:b]) for a, b in ((0, 4), (4, 9))]
    assert_same(torch.cat(fused, 1), torch.cat(alone, 1))


# --- refused, never wrong ---


def test_a_cache_that_was_filled_without_memory_is_refused(tmp_path):
    model, ids = copy.deepcopy(bare_model("llama")), some_ids()
    for cache in (new_cache(model), DynamicCache(), StaticCache(config=model.config, max_cache_len=CAPACITY)):
        forward(model, cache, ids)
        attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
        with pytest.raises(ValueError, match=r"filled without this memory.*new cache, or call with use_cache=False"):
            forward(model, cache, ids[:, :1])
        with pytest.raises(ValueError, match="filled without this memory"):
            model.generate(torch.cat([ids, ids[:, :1]], 1), max_new_tokens=2, **{CACHE: cache})
        detach_engram(model)


def test_a_recurrent_cache_that_was_filled_without_memory_is_refused():
    cache = new_cache(bare_model("qwen3_next"))
    forward(bare_model("qwen3_next"), cache, some_ids())
    with pytest.raises(ValueError, match="filled without this memory"):
        forward(remembering("qwen3_next"), cache, some_ids(2, 1))


def test_a_cache_that_went_on_without_memory_is_refused():
    model, bare = remembering("llama"), bare_model("llama")
    cache = new_cache(model)
    forward(model, cache, some_ids())
    forward(bare, cache, some_ids(2, 3))
    with pytest.raises(ValueError, match="holds 16 tokens, of which the memory has seen 13"):
        forward(model, cache, some_ids(2, 1))


def test_a_cache_of_another_memory_is_refused_until_it_is_empty(tmp_path):
    model, ids = copy.deepcopy(bare_model("llama")), some_ids()
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    cache = new_cache(model)
    forward(model, cache, ids)
    other = remembering("llama")
    with pytest.raises(ValueError, match="filled with another memory attached"):
        forward(other, cache, ids[:, :1])
    cache.reset()
    assert_same(in_parts(other, cache, ids, (4,)), full_logits(other, ids))
    assert len(cache) == model.config.num_hidden_layers
    assert all(keys is not None for keys, *_ in cache)
    detach_engram(model)


def test_a_saved_cache_goes_on_with_its_table_opened_again(tmp_path):
    """Nothing of the model that filled it is left in another process but its table's name."""
    model, ids = copy.deepcopy(bare_model("llama")), some_ids()
    detach_engram(attach_engram(model, tiny_config(tmp_path), tiny_tokenizer()))
    attach_engram(model, tiny_config(tmp_path), mode="r")
    expected, cache = full_logits(model, ids), new_cache(model)
    forward(model, cache, ids[:, :9])
    torch.save(cache, tmp_path / "cache.pt")
    detach_engram(model)
    attach_engram(model, tiny_config(tmp_path), mode="r")
    assert_same(forward(model, torch.load(tmp_path / "cache.pt", weights_only=False), ids[:, 9:]), expected[:, 9:])
    detach_engram(model)


def test_a_call_that_failed_in_the_middle_leaves_a_cache_that_is_refused():
    model = remembering("llama")
    cache = new_cache(model)
    forward(model, cache, some_ids())

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        forward(model, cache, some_ids(2, 2))
    handle.remove()
    with pytest.raises(ValueError, match="a call failed in the middle"):
        forward(model, cache, some_ids(2, 1))


def test_a_cache_of_another_batch_is_refused():
    model = remembering("llama")
    cache = new_cache(model)
    forward(model, cache, some_ids(3))
    with pytest.raises(ValueError, match="the cache holds 3 sequences, input_ids have 2"):
        forward(model, cache, some_ids(2, 1))


def test_a_mask_that_covers_half_of_the_past_is_refused():
    model = remembering("llama")
    cache = new_cache(model)
    forward(model, cache, some_ids())
    with pytest.raises(
        ValueError, match="covers 5 tokens; the cache holds 13 and input_ids 2 more: expected 2 or 15"
    ):
        forward(model, cache, some_ids(2, 2), attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("name", [CACHE, "past_key_values", "state"])
def test_a_state_of_earlier_tokens_that_is_no_cache_is_refused(name):
    class PagedAttentionCache:
        """What continuous batching passes: not one of transformers' Cache classes."""

    with pytest.raises(ValueError, match=f"{name} is a PagedAttentionCache, no transformers Cache"):
        remembering("llama").base_model(some_ids(), **{name: PagedAttentionCache()})


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_by_the_name_it_had_before():
    model, ids = remembering("llama"), some_ids()
    cache, stale = new_cache(model), new_cache(model)
    forward(bare_model("llama"), stale, ids)
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 6), (6, 13))]
        assert_same(torch.cat(parts, 1), full_logits(model, ids))
        with pytest.raises(ValueError, match="was filled without this memory"):
            model.base_model(ids[:, :1], past_key_values=stale)


def test_an_early_exit_before_the_first_memory_guesses_ahead(tmp_path):
    model, ids = copy.deepcopy(bare_model("llama")), some_ids(1)
    attach_engram(model, tiny_config(tmp_path, layer_indices=[2]), tiny_tokenizer())
    wake(model.engram)
    out = generated(model, ids, assistant_early_exit=1)
    assert torch.equal(out.sequences, full_greedy(model, ids)[0])
    detach_engram(model)


def test_a_memory_that_looks_ahead_takes_no_cache(tmp_path):
    model = copy.deepcopy(bare_model("llama"))
    attach_engram(model, tiny_config(tmp_path, causal=False), tiny_tokenizer())
    model(some_ids(), use_cache=False)
    with pytest.raises(ValueError, match="looks ahead"):
        model(some_ids(), use_cache=True)
    detach_engram(model)


def test_a_prepared_mask_comes_with_a_plain_one():
    model, (ids, mask) = remembering("llama"), padded()
    prepared = torch.ones(9, 9).tril()[None, None] * mask[:, None, None, :] > 0
    given = {"position_ids": positions_of(mask), "use_cache": False}
    with pytest.raises(ValueError, match="engram_attention_mask="):
        model(ids, attention_mask=prepared, **given)
    with torch.no_grad():
        logits = model(ids, attention_mask=prepared, engram_attention_mask=mask, **given).logits
    assert_same(logits[mask > 0], full_logits(model, ids, mask)[mask > 0])


def test_embeddings_without_ids_say_how_to_pass_them():
    model = remembering("llama")
    embedded = model.get_input_embeddings()(some_ids())
    with pytest.raises(ValueError, match="engram_input_ids="):
        model.generate(inputs_embeds=embedded, max_new_tokens=2)
    with pytest.raises(ValueError, match="engram_input_ids="):
        model.generate(inputs_embeds=embedded, engram_input_ids=some_ids(2, 4), max_new_tokens=2)


# --- on and off ---


def test_attaching_leaves_the_settings_and_detaching_all_of_the_model(tmp_path):
    model = copy.deepcopy(bare_model("llama"))
    before, attributes = copy.deepcopy(model.generation_config), set(vars(model))
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    assert model.generation_config == before
    assert model.config.use_cache is True
    detach_engram(model)
    assert model.generation_config == before
    assert set(vars(model)) == attributes
    greedy(model)


def test_a_cache_goes_on_without_memory_once_it_is_detached(tmp_path):
    model, ids = copy.deepcopy(bare_model("llama")), some_ids()
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())  # fresh: it changes nothing
    cache = new_cache(model)
    forward(model, cache, ids[:, :6])
    detach_engram(model)
    assert_same(forward(model, cache, ids[:, 6:]), full_logits(model, ids)[:, 6:])


def test_gradients_through_a_cache_are_those_of_the_full_forward():
    model, ids = remembering("llama"), some_ids()
    weights = list(model.engram.parameters())

    def gradients(logits):
        found = torch.autograd.grad(logits.square().sum(), weights)
        return torch.cat([grad.flatten() for grad in found])

    whole = gradients(model(ids, use_cache=False).logits)
    cache = new_cache(model)
    parts = [model(ids[:, a:b], use_cache=True, **{CACHE: cache}).logits for a, b in ((0, 5), (5, 6), (6, 13))]
    torch.testing.assert_close(gradients(torch.cat(parts, 1)), whole, atol=1e-3, rtol=1e-4)


def test_the_pipeline_generates_with_memory():
    model = remembering("llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="<pad>")
    tokenizer.padding_side = "left"
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["word3 Word7 WORD2 word9", "word5 word5"]
    answers = write(prompts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_tensors=True)
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        assert answer["generated_token_ids"][-ids.shape[1] - NEW :] == full_greedy(model, ids)[0][0].tolist()


def test_layers_without_memory_look_for_a_cache_only_until_its_tokens_are_kept(tmp_path, monkeypatch):
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path, layer_indices=[1]), tiny_tokenizer()).eval()
    assert model.config.num_hidden_layers == 3
    looked = []
    kept_in = forward_hooks._kept_in
    monkeypatch.setattr(forward_hooks, "_kept_in", lambda *call: looked.append(call) or kept_in(*call))
    with torch.inference_mode():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        assert len(looked) == 2  # the first layer, which keeps the tokens, and the one with memory
        model(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    assert len(looked) == 4
    assert cache.engram.length == 4
