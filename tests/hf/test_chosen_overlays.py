"""Overlays that each sequence of a batch chooses: the bits of a batch that has one overlay for all.

The oracle is `add_overlay`, which puts one overlay between the table and all sequences. A sequence beside others has
the bits that it has there, at the same place of a batch of the same shape; alone, in a batch of another shape, the
backbone's own matrix products round otherwise.
"""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_generation import CACHE
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import DynamicCache, StaticCache

from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf import add_overlay, attach_engram, from_pretrained, load_overlay, save_pretrained, unload_overlay
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.memory import memory_of

CHOSEN = ["a", None, "b", "a"]
NEW = 6
SLIDING = {"mistral": {"sliding_window": 12}, "gemma3": {"sliding_window": 12}}
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def saved(name):
    """A folder with a model, and with deltas a and b, which share rows."""
    folder = Path(_FOLDER.name) / name
    model = tiny_model(name, initializer_range=0.2, **SLIDING.get(name, {}))
    model.generation_config.eos_token_id = None
    layers = [1, 2] if name == "qwen3" else [0, 2]
    attach_engram(model, tiny_config(folder / "table", layer_indices=layers), tiny_tokenizer())
    wake(model.engram, scale=0.6)
    storage = memory_of(model).storage
    rows = storage.weight.clone()
    storage.weight.div_(50)
    storage.write(torch.arange(1_500), rows)
    storage.commit()
    save_pretrained(model, folder / "model")
    detach_engram(model)
    for delta, ids, seed in (("a", torch.arange(0, 1_500, 2), 1), ("b", torch.arange(300, 1_500), 2)):
        path = folder / "model" / "engram" / "engram_table.dat"
        overlay = OverlayStorage(MMapEmbeddingStorage(1_500, 8, path, mode="r"), folder / f"{delta}.safetensors")
        overlay.write(ids, torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(seed)))
        overlay.commit()
        overlay.close()
    return folder


@pytest.fixture
def folder():
    return saved("llama")


def with_both(name="llama"):
    folder = saved(name)
    model = from_pretrained(folder / "model")
    for delta in ("a", "b"):
        load_overlay(model, delta, folder / f"{delta}.safetensors")
    return model


def with_one(name, delta):
    """The oracle: one overlay under all sequences."""
    folder = saved(name)
    return from_pretrained(folder / "model", overlay=None if delta is None else folder / f"{delta}.safetensors")


def some_ids(batch=4, length=11, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **given):
    return model(ids, **given).logits


def of_each(outputs, chosen=CHOSEN):
    """Sequence n of what the oracle of its overlay gives for the whole batch: `outputs(delta)`."""
    found = {delta: outputs(delta) for delta in set(chosen)}
    return torch.stack([found[delta][number] for number, delta in enumerate(chosen)])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mamba", "lfm2"])
def test_each_sequence_has_the_bits_of_its_own_overlay(name):
    model, ids = with_both(name), some_ids()
    expected = of_each(lambda delta: logits(with_one(name, delta), ids))
    found = logits(model, ids, overlay=CHOSEN)
    assert torch.equal(found, expected)
    base = logits(with_one(name, None), ids)
    assert torch.equal(found[1], base[1])
    assert all(not torch.equal(found[n], base[n]) for n in (0, 2, 3))
    # Alone it is the same but for rounding in the backbone's products.
    for number, delta in enumerate(CHOSEN):
        alone = logits(with_one(name, delta), ids[number : number + 1])
        torch.testing.assert_close(found[number : number + 1], alone, atol=1e-4, rtol=0)
    assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids, overlay="b"), logits(with_one(name, "b"), ids))


def test_unloading_gives_the_bits_from_before(folder):
    model, ids = with_both(), some_ids()
    untouched = logits(from_pretrained(folder / "model"), ids)
    logits(model, ids, overlay=CHOSEN)
    unload_overlay(model, "a")
    with pytest.raises(ValueError, match=r"no overlay 'a' is loaded \(loaded: b\)"):
        logits(model, ids, overlay=CHOSEN)
    assert torch.equal(logits(model, ids, overlay=[None] * 4), untouched)
    unload_overlay(model, "b")
    assert torch.equal(logits(model, ids), untouched)
    with pytest.raises(ValueError, match="no overlay 'b' is loaded"):
        unload_overlay(model, "b")


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "no cache", "static cache"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_padding(name, given):
    """Prompts of several lengths, padded on the left."""
    ids = some_ids()
    mask = torch.ones_like(ids)
    for number, padded in enumerate((0, 3, 5, 1)):
        mask[number, :padded] = 0
    ids = ids.masked_fill(mask == 0, 0)

    def generated(model, **overlay):
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **given, **overlay)

    found = generated(with_both(name), overlay=CHOSEN)
    expected = of_each(lambda delta: generated(with_one(name, delta)))
    assert torch.equal(found, expected)
    assert not torch.equal(expected, generated(with_one(name, None)))


@pytest.mark.parametrize("given", [{"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}])
def test_drafts_that_are_taken_back(given):
    """The cache is cropped, and goes on with its overlay."""
    for number, overlay in enumerate(CHOSEN[:3]):
        ids = some_ids(batch=1, seed=number)
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
        found = with_both().generate(ids, overlay=[overlay], **settings, **given)
        assert torch.equal(found, with_one("llama", overlay).generate(ids, **settings))


def test_beside_a_lora():
    model, ids = with_both(), some_ids()
    expected = logits(model, ids, overlay=CHOSEN)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()  # a fresh one changes nothing
    assert torch.equal(logits(wrapped, ids, overlay=CHOSEN), expected)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "num_beams": 2}
    assert torch.equal(wrapped.generate(**given, overlay=CHOSEN), with_both().generate(**given, overlay=CHOSEN))


def test_a_cache_goes_on_with_the_overlays_that_it_was_begun_with():
    model, ids = with_both(), some_ids()
    whole = logits(model, ids, overlay=CHOSEN, use_cache=False)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :6], **{CACHE: cache}, overlay=CHOSEN)
    torch.testing.assert_close(logits(model, ids[:, 6:], **{CACHE: copy.deepcopy(cache)}), whole[:, 6:])
    order = torch.tensor([2, 0, 1, 1])
    other = copy.deepcopy(cache)
    other.reorder_cache(order)
    torch.testing.assert_close(logits(model, ids[order, 6:], **{CACHE: other}), whole[order, 6:])
    other = copy.deepcopy(cache)
    other.batch_select_indices(torch.tensor([2, 3]))
    other.crop(-1)
    torch.testing.assert_close(logits(model, ids[2:, 5:], **{CACHE: other}), whole[2:, 5:])
    with pytest.raises(ValueError, match=r"the cache was begun with other overlays: a, none, b, a; .* b, none, b, a"):
        logits(model, ids[:, 6:], **{CACHE: copy.deepcopy(cache)}, overlay=["b", None, "b", "a"])
    unload_overlay(model, "b")
    load_overlay(model, "b", saved("llama") / "b.safetensors")  # another one, as far as the cache knows
    with pytest.raises(ValueError, match="overlay that was unloaded"):
        logits(model, ids[:, 6:], **{CACHE: cache})


def test_compiled():
    model, ids = with_both(), some_ids()
    model.set_attn_implementation("eager")  # transformers 5.19 masks another way when it is compiled
    step = torch.compile(model, fullgraph=True, backend="eager")
    alone = {"overlay": CHOSEN, "use_cache": False}  # nor does PyTorch 2.8 trace how it makes a cache
    assert torch.equal(logits(step, ids, **alone), logits(model, ids, **alone))
    found, expected = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    for cache in (found, expected):
        logits(model, ids[:, :-1], **{CACHE: cache}, overlay=CHOSEN)
    again = logits(step, ids[:, -1:], **{CACHE: found})
    torch.testing.assert_close(again, logits(model, ids[:, -1:], **{CACHE: expected}))
    torch.testing.assert_close(again[:, 0], logits(model, ids, overlay=CHOSEN)[:, -1])
    torch.compiler.reset()


def test_lies_on_top_of_the_models_own_overlay(folder, tmp_path):
    """A row that both have changed is the chosen one's; others are the model's own."""
    model, ids = from_pretrained(folder / "model"), some_ids()
    own = add_overlay(model)
    own.write(torch.arange(1_500), torch.ones(1_500, 8))
    changed = logits(model, ids)
    load_overlay(model, "a", folder / "a.safetensors")
    found = logits(model, ids, overlay=CHOSEN[:2] * 2)
    assert torch.equal(found[[1, 3]], changed[[1, 3]])
    delta = OverlayStorage(
        MMapEmbeddingStorage(1_500, 8, own.base.path, mode="r"), folder / "a.safetensors", mode="r"
    )
    own.write(delta.changed_ids, delta(delta.changed_ids))
    assert torch.equal(found[[0, 2]], logits(model, ids)[[0, 2]])


def test_training_moves_the_rows_that_no_overlay_has(folder):
    """A sequence with an overlay learns through the model's own rows alone."""
    model, ids = from_pretrained(folder / "model"), some_ids()
    add_overlay(model).train()
    load_overlay(model, "b", folder / "b.safetensors")  # has rows from 300 on
    storage = memory_of(model).storage
    model(ids, labels=ids, overlay="b").loss.backward()
    row_ids_U, grads_UD = storage.gradients()
    assert (grads_UD[row_ids_U >= 300] == 0).all()
    assert (grads_UD[row_ids_U < 300] != 0).any()


def test_a_copy_of_a_model_has_the_overlays_of_its_own(folder):
    model, ids = with_both(), some_ids()
    other = copy.deepcopy(model)
    expected = logits(model, ids, overlay=CHOSEN)
    unload_overlay(model, "a")
    assert torch.equal(logits(other, ids, overlay=CHOSEN), expected)
    save_pretrained(other, folder / "again")
    assert torch.equal(logits(from_pretrained(folder / "again"), ids), logits(model, ids))


def test_a_file_that_goes_or_changes_is_no_matter(folder, tmp_path):
    model, ids = from_pretrained(folder / "model"), some_ids()
    path = tmp_path / "facts.safetensors"
    path.write_bytes((folder / "a.safetensors").read_bytes())
    load_overlay(model, "facts", path)
    expected = logits(model, ids, overlay="facts")
    with path.open("r+b") as file:
        file.truncate(10)
    assert torch.equal(logits(model, ids, overlay="facts"), expected)
    path.unlink()
    assert torch.equal(logits(model, ids, overlay="facts"), expected)


def test_what_is_refused(folder, tmp_path):
    model, ids = with_both(), some_ids()
    for chosen, told in (
        (["a", None], r"overlay names 2 overlays for 4 sequences"),
        (["a", "c", None, None], r"no overlay 'c' is loaded \(loaded: a, b\)"),
        (["a", 3, None, None], r"overlay is a name, or a list of names and None"),
    ):
        with pytest.raises(ValueError, match=told):
            logits(model, ids, overlay=chosen)
        with pytest.raises(ValueError, match=told):
            model.generate(ids, max_new_tokens=2, overlay=chosen)
    with pytest.raises(ValueError, match="an overlay 'a' is loaded already"):
        load_overlay(model, "a", folder / "b.safetensors")
    with pytest.raises(FileNotFoundError):
        load_overlay(model, "c", tmp_path / "none.safetensors")
    damaged = bytearray((folder / "a.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="the file is damaged"):
        load_overlay(model, "c", tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="was made on another table than"):
        load_overlay(model, "c", saved("qwen3") / "a.safetensors")
    assert torch.equal(logits(model, ids, overlay=CHOSEN), logits(with_both(), ids, overlay=CHOSEN))
    bare = tiny_model("llama")
    with pytest.raises(ValueError, match="no memory attached"):
        load_overlay(bare, "a", folder / "a.safetensors")
