"""attach_engram on real transformers models: identity, training, masks, generation, and taking it off again."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from tokenizers import Tokenizer, models

from sense_v2.engram.model import EngramFusionLayer, open_table
from sense_v2.engram.optim import RowAdam, clip_grad_norm_
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.memory import attached_memory, memory_of
from sense_v2.hf.overlays import add_overlay, remove_overlay
from sense_v2.hf.saving.save import save_pretrained

DECODERS = ["llama", "qwen3", "mistral", "gemma", "gpt2"]
MODELS = [*DECODERS, "bert"]


def attached(name, folder, *, awake=True, layers=(1,), **changes):
    config = tiny_config(folder, layer_indices=list(layers), causal=name != "bert", **changes)
    model = attach_engram(tiny_model(name), config, tiny_tokenizer())
    if awake:
        wake(model.engram)
    return model


def some_ids(batch=2, length=9, seed=0):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- on and off ---


@pytest.mark.parametrize("name", MODELS)
def test_fresh_memory_changes_no_logit_and_detaching_restores_the_model(tmp_path, name):
    model, ids = tiny_model(name), some_ids()
    before, weights = model(ids).logits, state_of(model)
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    generation = copy.deepcopy(model.generation_config) if name != "bert" else None

    found = attach_engram(model, tiny_config(tmp_path, causal=name != "bert"), tiny_tokenizer())
    assert found is model
    assert torch.equal(model(ids).logits, before)

    wake(model.engram)
    assert not torch.equal(model(ids).logits, before)

    assert detach_engram(model) is model
    assert torch.equal(model(ids).logits, before)
    after = state_of(model)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert attached_memory(model) is None
    assert generation is None or model.generation_config == generation


def test_attaching_again_after_detaching_finds_the_trained_rows(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids()
    fusion, before = state_of(model.engram.layers), model(ids).logits
    detach_engram(model)
    attach_engram(model, tiny_config(tmp_path))
    model.engram.layers.load_state_dict(fusion)
    assert torch.equal(model(ids).logits, before)


def test_the_tables_pad_id_outlives_the_models(tmp_path):
    """A Trainer sets a model's pad token to its tokenizer's: the rows were trained with another."""
    model, ids = attached("llama", tmp_path), some_ids()
    fusion, before = state_of(model.engram.layers), model(ids).logits
    detach_engram(model)
    model.config.pad_token_id = 7
    attach_engram(model, tiny_config(tmp_path))
    model.engram.layers.load_state_dict(fusion)
    assert torch.equal(model(ids).logits, before)
    detach_engram(model)
    with pytest.raises(ValueError, match=r"pad_token_id = 7 is compressed id 3.*trained with 0.*leave pad_token_id"):
        attach_engram(model, tiny_config(tmp_path, pad_token_id=7))
    table = open_table(tiny_config(tmp_path), EngramTokenizer(tmp_path / "shadow_map.npy"), mode="r")
    attach_engram(model, tiny_config(tmp_path), storage=table)
    assert model.engram.layers["1"].hasher.pad_id == 0


def test_a_model_with_relative_paths_goes_on_where_it_was_when_the_process_changes_folders(tmp_path, monkeypatch):
    """Saving, copying, training and detaching, with the table, the map and an overlay named relative to a folder."""
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    model, ids = attached("llama", Path()), some_ids()
    before = model(ids).logits
    monkeypatch.chdir(tmp_path / "there")
    model.engram.storage.write(torch.tensor([0]), torch.ones(1, model.engram.storage.embedding_dim))
    model.engram.storage.commit(step=1)
    assert copy.deepcopy(model)(ids).logits.shape == before.shape
    save_pretrained(model, tmp_path / "saved")
    detach_engram(model)
    assert list((tmp_path / "there").iterdir()) == []

    monkeypatch.chdir(tmp_path)
    attach_engram(model, tiny_config(Path()), mode="r")
    assert model.engram.storage.committed_step == 1
    overlay = add_overlay(model, "facts.safetensors")
    monkeypatch.chdir(tmp_path / "there")
    overlay.write(torch.tensor([0]), torch.ones(1, overlay.embedding_dim))
    overlay.commit()
    remove_overlay(model)
    detach_engram(model)
    assert list((tmp_path / "there").iterdir()) == []
    assert (tmp_path / "facts.safetensors").is_file()


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_added_before_the_named_layers(tmp_path, name):
    """Against the fusion layer called by hand on the hidden states that reach each layer."""
    model, ids = attached(name, tmp_path, layers=(0, 2)), some_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    seen = {}
    layers = next(module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList))
    for number, layer in enumerate(layers):
        # Runs before the memory's own hook: what arrives; and inside the layer: what the layer got.
        hook = lambda module, args, kwargs, n=number: seen.__setitem__(("in", n), args[0])  # noqa: E731
        layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        hook = lambda module, args, kwargs, n=number: seen.__setitem__(("got", n), args[0])  # noqa: E731
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    model(ids, attention_mask=mask)
    for number in range(len(layers)):
        expected = seen["in", number]
        if number in (0, 2):
            expected = model.engram.layers[str(number)](expected, ids, mask)
            assert not torch.equal(expected, seen["in", number])
        assert torch.equal(seen["got", number], expected)


@pytest.mark.parametrize("name", DECODERS)
def test_no_logit_sees_a_later_token(tmp_path, name):
    model, ids = attached(name, tmp_path, layers=(0, 1)), some_ids()
    before = model(ids).logits
    ids[:, 5] = (ids[:, 5] + 31) % VOCABULARY
    after = model(ids).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert not torch.equal(before[:, 5], after[:, 5])


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_changes_no_logit(tmp_path, name):
    model, ids = attached(name, tmp_path), some_ids(batch=1)
    alone = model(ids).logits
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(out[:, 4:], alone, atol=1e-4, rtol=0)


def test_layers_share_one_table_and_one_map(tmp_path):
    model = attached("llama", tmp_path, layers=(0, 1, 2))
    layers = list(model.engram)
    assert all(layer.storage is model.engram.storage for layer in layers)
    assert all(layer.tokenizer is model.engram.tokenizer for layer in layers)
    ids = some_ids()
    rows = [set(layer.row_ids(ids).flatten().tolist()) for layer in layers]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]


def test_parameters_are_named_engram_and_the_table_is_none_of_them(tmp_path):
    model = attached("llama", tmp_path)
    names = [name for name, _ in model.named_parameters() if "engram" in name]
    assert "engram.layers.1.W_k.weight" in names
    assert all(name.startswith("engram.") for name in names)
    rows = model.engram.storage.num_embeddings
    assert all(value.shape[:1] != (rows,) for value in model.state_dict().values())
    assert len(names) == len(set(names)) == len(list(model.engram.parameters()))


def test_memory_takes_the_backbones_dtype(tmp_path):
    model = attach_engram(tiny_model("llama").bfloat16(), tiny_config(tmp_path), tiny_tokenizer())
    wake(model.engram)
    assert model.engram.layers["1"].W_k.weight.dtype == torch.bfloat16
    assert model.engram.storage.dtype == torch.float32
    assert model(some_ids()).logits.dtype == torch.bfloat16


# --- training ---


@pytest.mark.parametrize("name", MODELS)
def test_backbone_fusion_and_rows_learn_together(tmp_path, name):
    model, ids = attached(name, tmp_path, awake=False).train(), some_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    row_optimizer = RowAdam(model.engram.storage, lr=0.1)
    rows_before = model.engram.storage.weight.clone()
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), model.engram.storage, 1.0)
        for one in (optimizer, row_optimizer):
            one.step()
            one.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    # A decoder's last position predicts nothing here, so its rows have a gradient of zero.
    met = ids if name == "bert" else ids[:, :-1]
    touched = set(torch.cat([layer.row_ids(met).flatten() for layer in model.engram]).tolist())
    moved = (model.engram.storage.weight != rows_before).any(1).nonzero().flatten().tolist()
    assert set(moved) == touched


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_with_two_micro_batches(tmp_path, name, use_reentrant):
    """Both forwards before the backwards: a replayed layer must see the ids of its own forward."""
    model = attached(name, tmp_path, layers=(1, 2)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    first, second = some_ids(seed=1), some_ids(seed=2)

    def gradients():
        losses = [model(ids, labels=ids).loss for ids in (first, second)]
        for loss in losses:
            loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        rows = model.engram.storage.gradients()
        model.zero_grad()
        model.engram.storage.clear_gradients()
        return found, rows

    expected, expected_rows = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found, found_rows = gradients()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-4)
    assert torch.equal(found_rows[0], expected_rows[0])
    torch.testing.assert_close(found_rows[1], expected_rows[1], atol=1e-5, rtol=1e-4)


def test_packed_documents_keep_apart(tmp_path):
    model = attached("llama", tmp_path).train()
    ids = some_ids(batch=1, length=8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    asked = []
    model.engram.storage.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    model(ids, position_ids=positions)
    (layer,) = model.engram
    alone = torch.cat([layer.row_ids(ids[:, :4]), layer.row_ids(ids[:, 4:])], 1)
    assert torch.equal(asked[0], alone)


# --- generation ---


@pytest.mark.parametrize("name", DECODERS)
def test_generate_equals_full_forwards(tmp_path, name):
    model, ids = attached(name, tmp_path), some_ids()
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)


def test_generate_with_left_padding(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids(batch=1, length=5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long()[None]
    alone = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    out = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    assert torch.equal(out[:, 3:], alone)


def test_a_deep_copy_has_a_memory_of_its_own(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids()
    with torch.no_grad():
        for layer in memory_of(model):
            layer.W_v.weight.normal_()
    before = model(ids, use_cache=False).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids, use_cache=False).logits, before)
    with torch.no_grad():
        for layer in memory_of(copied):
            layer.W_v.weight.zero_()
    assert not torch.equal(copied(ids, use_cache=False).logits, before)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    detach_engram(copied)
    assert torch.equal(model(ids, use_cache=False).logits, before)
    assert not torch.equal(copied(ids, use_cache=False).logits, before)


# --- files ---


def test_files_that_are_not_there_yet_are_made(tmp_path):
    model = attached("llama", tmp_path / "deep" / "folder")
    folder = tmp_path / "deep" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "engram_table.dat",
        "engram_table.json",
        "engram_table.lock",
        "shadow_map.json",
        "shadow_map.npy",
    ]
    assert (folder / "engram_table.dat").stat().st_size == 1_500 * 8 * 4
    assert np.load(folder / "shadow_map.npy").max() + 1 == model.engram.tokenizer.compressed_vocab_size


def test_a_map_is_taken_as_a_tokenizer(tmp_path):
    config = tiny_config(tmp_path)
    EngramTokenizerBuilder(tiny_tokenizer()).build_mapping(config.shadow_map_path)
    shadow_map = EngramTokenizer(config.shadow_map_path)
    model = attach_engram(tiny_model("llama"), config, shadow_map)
    assert model.engram.tokenizer is shadow_map


# --- bad input ---


def test_disabled_attaches_nothing_and_says_so(tmp_path):
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="enabled is False"):
        attach_engram(model, tiny_config(tmp_path, enabled=False), tiny_tokenizer())
    assert attached_memory(model) is None
    assert list(tmp_path.iterdir()) == []


def test_a_layer_past_the_depth_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"layer_indices holds 15, but this LlamaForCausalLM has 3 layers \(0 to 2\)"
    ):
        attached("llama", tmp_path, layers=(2, 15))
    assert list(tmp_path.iterdir()) == []


def test_attaching_twice_and_detaching_nothing_are_refused(tmp_path):
    model = attached("llama", tmp_path)
    with pytest.raises(ValueError, match="attached already"):
        attach_engram(model, tiny_config(tmp_path))
    detach_engram(model)
    with pytest.raises(ValueError, match="no memory attached"):
        detach_engram(model)
    with pytest.raises(ValueError, match="no memory attached"):
        memory_of(model)


def test_without_a_map_and_a_tokenizer_the_way_out_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shadow map.*tokenizer=.*sense-engram setup"):
        attach_engram(tiny_model("llama"), tiny_config(tmp_path))


def test_memories_of_two_tokenizers_or_layouts_do_not_meet_in_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    open_place = {"storage_path": None, "shadow_map_path": None}
    places = set()
    for tokenizer, name, changes in (
        (tiny_tokenizer(), "tiny", {}),
        (other, "other", {}),
        (tiny_tokenizer(), "tiny", {"seed": 5}),
    ):
        config = tiny_config(tmp_path, tokenizer_name=name, **open_place, **changes)
        model = attach_engram(tiny_model("llama"), config, tokenizer)
        table = memory_of(model).storage.path
        assert table.parent.parent == tmp_path / "data"
        assert Path(memory_of(model).config.storage_path).absolute() == table
        assert (table.parent / "shadow_map.npy").exists()
        places.add(table)
        detach_engram(model)
    assert len(places) == 3
    # The same again is the same table; that it isn't a fresh one is said.
    config = tiny_config(tmp_path, tokenizer_name="tiny", **open_place)
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    memory_of(model).storage.write(torch.tensor([0]), torch.ones(1, 8))
    memory_of(model).storage.commit(step=7)
    detach_engram(model)
    with pytest.warns(UserWarning, match=r"was trained before, up to step 7.*storage_path names another"):
        model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    assert memory_of(model).storage.path in places
    detach_engram(model)


def test_a_map_of_another_vocabulary_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"covers 96 token ids, the model embeds 90"):
        attach_engram(tiny_model("llama", vocabulary=90), tiny_config(tmp_path), tiny_tokenizer())
    assert not (tmp_path / "engram_table.dat").exists()
    with pytest.raises(ValueError, match=r"covers 96 token ids, the model embeds 2000"):
        attach_engram(tiny_model("llama", vocabulary=2000), tiny_config(tmp_path), tiny_tokenizer())


def test_spare_rows_of_an_embedding_have_ids_of_their_own(tmp_path):
    """They can be sampled. Tokens have the ids that they have without them; a copy knows the spare ones, too."""
    model = attach_engram(tiny_model("llama", vocabulary=128), tiny_config(tmp_path), tiny_tokenizer())
    ids = some_ids()
    layer = model.engram.layers["1"]
    plain = EngramTokenizer(tmp_path / "shadow_map.npy")
    assert torch.equal(layer.tokenizer(ids), plain(ids))
    spare = torch.arange(96, 128)[None]
    assert torch.equal(layer.tokenizer(spare)[0], plain.compressed_vocab_size + torch.arange(32))
    for row_ids_BTH in (layer.row_ids(spare), copy.deepcopy(layer).row_ids(spare)):
        assert len(torch.unique(row_ids_BTH[..., 0])) > 24
        assert (row_ids_BTH >= 0).all()
        assert (row_ids_BTH < layer.hasher.num_rows).all()
    assert model(spare).logits.isfinite().all()
    with pytest.raises(IndexError, match=r"96 token ids"):
        plain(spare)


def test_a_tokenizer_may_have_a_token_more_than_the_embedding(tmp_path):
    model = attach_engram(tiny_model("llama", vocabulary=95), tiny_config(tmp_path), tiny_tokenizer())
    model(torch.tensor([[3, 94]]))


def test_a_map_of_another_tokenizer_of_equal_size_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    other = tiny_tokenizer(VOCABULARY + 1)
    vocabulary = other.get_vocab()
    assert len(vocabulary) == VOCABULARY + 1
    from tokenizers import Tokenizer, models

    tokens = ["<pad>", *(f"other{i}" for i in range(VOCABULARY - 1))]
    other = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<pad>"))
    EngramTokenizerBuilder(other).build_mapping(config.shadow_map_path)
    with pytest.raises(ValueError, match=r"was not made from this tokenizer"):
        attach_engram(tiny_model("llama"), config, tiny_tokenizer())


def test_a_map_of_another_normalization_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(config.shadow_map_path)
    with pytest.raises(ValueError, match=r"normalization = 'nfkc', but the shadow map .* 'deepseek'"):
        attach_engram(tiny_model("llama"), config)


def test_a_map_without_its_json_warns(tmp_path):
    config = tiny_config(tmp_path)
    EngramTokenizerBuilder(tiny_tokenizer()).build_mapping(config.shadow_map_path)
    (tmp_path / "shadow_map.json").unlink()
    with pytest.warns(UserWarning, match=r"shadow_map\.json"):
        attach_engram(tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seed": 3}, r"seed is 0, asked for 3"),
        ({"engram_dim": 64}, r"width is 8, asked for 16"),
        ({"table_size": 1_600}, r"rows is 1\d\d\d, asked for 1\d\d\d"),
        ({"dtype": "bfloat16"}, r"dtype is 'float32', asked for 'bfloat16'"),
        ({"variant": "paper"}, r"variant is 'sense', asked for 'paper'"),
        ({"ngram_orders": [2, 4]}, r"layout\.ngram_orders is \[2, 3\], asked for \[2, 4\]"),
        ({"layer_indices": [2]}, r"layout\.layer_ids is \[1\], asked for \[2\]"),
    ],
)
def test_a_table_that_does_not_match_is_refused_by_field_and_kept(tmp_path, change, error):
    detach_engram(attached("llama", tmp_path))
    before = (tmp_path / "engram_table.dat").read_bytes()
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=rf"engram_table\.json describes another table: .*{error}"):
        attach_engram(model, tiny_config(tmp_path, **change))
    assert (tmp_path / "engram_table.dat").read_bytes() == before
    assert attached_memory(model) is None


def test_a_vocabulary_resized_after_attaching_is_an_error(tmp_path):
    model = attached("llama", tmp_path)
    model.resize_token_embeddings(VOCABULARY + 4)
    with pytest.raises(ValueError, match=r"resized from 96 to 100"):
        model(some_ids())


def test_embeddings_without_ids_are_an_error_and_ids_can_come_along(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids()
    embedded = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="engram_input_ids"):
        model(inputs_embeds=embedded)
    out = model(inputs_embeds=embedded, engram_input_ids=ids)
    assert torch.equal(out.logits, model(ids).logits)


def test_a_prepared_mask_is_an_error(tmp_path):
    model, ids = attached("llama", tmp_path), some_ids()
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9))


def test_a_layer_called_on_its_own_says_what_to_call(tmp_path):
    model = attached("llama", tmp_path)
    with pytest.raises(ValueError, match="call the model, not its layers"):
        model.model.layers[1](torch.randn(1, 3, 32))


def test_two_models_have_nothing_in_common(tmp_path):
    first, second = attached("llama", tmp_path / "a"), attached("llama", tmp_path / "b", seed=7)
    ids = some_ids()
    before = first(ids).logits
    with torch.no_grad():
        second.engram.storage.weight.zero_()
    assert torch.equal(first(ids).logits, before)
    assert isinstance(next(iter(first.engram)), EngramFusionLayer)


# --- one forward ---


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_a_fusion_layer_fire_once_a_call(tmp_path, name):
    model, ids = attached(name, tmp_path, layers=(0, 2)), some_ids()
    before = model(ids, use_cache=False).logits if name != "bert" else model(ids).logits
    fired, handles = [], []
    for number in ("0", "2"):
        fusion = model.engram.layers[number]
        enter = lambda module, args, kwargs, n=number: fired.append(("enter", n, args[0].shape))  # noqa: E731
        leave = lambda module, args, kwargs, out, n=number: fired.append(("leave", n, out.shape))  # noqa: E731
        handles.append(fusion.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(fusion.register_forward_hook(leave, with_kwargs=True))
    model(ids)
    shape = (2, 9, 32)
    assert fired == [(what, number, shape) for number in ("0", "2") for what in ("enter", "leave")]
    for handle in handles:
        handle.remove()
    doubled = lambda module, args, out: args[0] + 2 * (out - args[0])  # noqa: E731
    model.engram.layers["0"].register_forward_hook(doubled)
    assert not torch.equal(model(ids).logits, before)


def test_a_replaced_forward_of_a_fusion_layer_is_used(tmp_path):
    """An object's own, as accelerate's hooks put it there, and a subclass's."""
    model, ids = attached("llama", tmp_path), some_ids()
    bare = tiny_model("llama")(ids).logits
    assert not torch.equal(model(ids).logits, bare)
    fusion = model.engram.layers["1"]
    own = fusion.forward
    fusion.forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert torch.equal(model(ids).logits, bare)
    fusion.forward = own

    class Off(EngramFusionLayer):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    off = Off(fusion.config, 32, 1, tokenizer=fusion.tokenizer, storage=fusion.storage)
    model.engram.layers["1"] = off
    assert torch.equal(model(ids).logits, bare)


def test_both_entrances_of_a_fusion_layer_give_the_same(tmp_path):
    (fusion,) = attached("llama", tmp_path).engram
    ids, hidden = some_ids(), torch.randn(2, 9, 32)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = fusion(hidden, ids, mask)
    row_ids = fusion.row_ids(ids, attention_mask=mask)
    assert torch.equal(fusion(hidden, row_ids_BTH=row_ids, valid_BT=mask != 0), expected)
    memory = fusion.lookup(row_ids, mask != 0)
    assert torch.equal(fusion(hidden, memory=memory, valid_BT=mask != 0), expected)
    with pytest.raises(TypeError, match="input_ids, row_ids_BTH or memory"):
        fusion(hidden)
