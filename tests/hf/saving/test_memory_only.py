"""A memory saved without its backbone: loaded onto the backbone that the caller has, as an adapter is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_save import logits, snapshot, with_memory
from test_sharing import hub  # noqa: F401  # a fixture
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sense_v2.hf import EngramConfig, detach_engram, from_pretrained, memory_of, push_to_hub, save_pretrained

MEMORY = {
    "backbone.json",
    "config.json",
    "engram_table.dat",
    "engram_table.json",
    "fusion.safetensors",
    "shadow_map.json",
    "shadow_map.npy",
}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["function", "method"])
def test_a_memory_alone_goes_onto_a_backbone(tmp_path, way):
    model = with_memory(tmp_path / "table")
    save = model.save_pretrained if way == "method" else lambda *args, **more: save_pretrained(model, *args, **more)
    save(tmp_path / "memory", memory_only=True)
    assert files(tmp_path / "memory") == {"README.md", *(f"engram/{name}" for name in MEMORY)}
    again = from_pretrained(tmp_path / "memory", backbone=tiny_model("llama"))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(tiny_model("llama")))
    with pytest.raises(FileNotFoundError, match=r"a memory, and no model there.*backbone="):
        from_pretrained(tmp_path / "memory")
    assert EngramConfig.from_pretrained(tmp_path / "memory").layer_indices == memory_of(model).config.layer_indices


def test_a_memory_is_saved_over_an_earlier_one(tmp_path):
    for seed in (1, 2):
        model = with_memory(tmp_path / f"table{seed}", seed=seed)
        save_pretrained(model, tmp_path / "memory", memory_only=True)
        again = from_pretrained(tmp_path / "memory", backbone=tiny_model("llama"))
        assert torch.equal(logits(again), logits(model))
    assert files(tmp_path / "memory") - {"engram/engram_table.lock"} == {
        "README.md",
        *(f"engram/{name}" for name in MEMORY),
    }


def test_a_memory_trains_on_where_it_was_saved(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "named", memory_only=True, table="reference")
    assert not (tmp_path / "named/engram/engram_table.dat").exists()
    named = from_pretrained(tmp_path / "named", backbone=tiny_model("llama"))
    assert torch.equal(logits(named), logits(model))
    save_pretrained(model, tmp_path / "copy", memory_only=True)
    model = from_pretrained(tmp_path / "copy", backbone=tiny_model("llama"), mode="r+")
    memory_of(model).storage.write(torch.arange(500), torch.ones(500, 8))
    save_pretrained(model, tmp_path / "copy", memory_only=True, tokenizer=tiny_tokenizer())
    again = from_pretrained(tmp_path / "copy", backbone=tiny_model("llama"))
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "copy/tokenizer.json").exists()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_memory_alone_is_not_laid_beside_a_model(tmp_path, name):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).write_text("{}")
    before = snapshot(tmp_path / "saved")
    with pytest.raises(FileExistsError, match=rf"saved.*{name}.*choose another folder"):
        save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved", memory_only=True)
    assert snapshot(tmp_path / "saved") == before


def test_what_makes_no_memory_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no memory attached.*attach_engram"):
        save_pretrained(tiny_model("llama"), tmp_path / "memory", memory_only=True)
    with pytest.raises(ValueError, match=r"memory_only.*backbone=.*leave one of the two out"):
        save_pretrained(with_memory(tmp_path / "table"), tmp_path / "memory", memory_only=True, backbone={})
    assert not (tmp_path / "memory").exists()


@pytest.mark.filterwarnings("error:.*trained on another backbone")
def test_a_memory_beside_an_adapter_is_saved_by_itself(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapper = get_peft_model(with_memory(tmp_path / "table", model=tiny_model("llama")), lora)
    save_pretrained(wrapper, tmp_path / "memory", memory_only=True)
    wrapper.save_pretrained(tmp_path / "both")
    both = from_pretrained(tmp_path / "both", backbone=tiny_model("llama"))
    assert torch.equal(logits(both), logits(wrapper))
    adapter_alone = detach_engram(both)
    assert torch.equal(logits(from_pretrained(tmp_path / "memory", backbone=adapter_alone)), logits(wrapper))
    alone = from_pretrained(tmp_path / "memory", backbone=tiny_model("llama"))
    with wrapper.disable_adapter():
        assert torch.equal(logits(alone), logits(wrapper))


def test_the_card_says_how_a_memory_is_opened(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "hub" / "models--someone--base" / "snapshots" / "abc")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub" / "models--someone--base" / "snapshots" / "abc")
    save_pretrained(with_memory(tmp_path / "table", model=model), tmp_path / "memory", memory_only=True)
    card = (tmp_path / "memory" / "README.md").read_text()
    assert 'from_pretrained("memory", backbone=AutoModelForCausalLM.from_pretrained("someone/base"))' in card
    assert "pipeline(" not in card


def test_a_memory_alone_goes_to_the_hub(tmp_path, hub):  # noqa: F811
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "memory", memory_only=True)
    push_to_hub(tmp_path / "memory", "someone/memory")
    options = {"cache_dir": hub, "local_files_only": True}
    again = from_pretrained("someone/memory", backbone=tiny_model("llama"), **options)
    assert torch.equal(logits(again), logits(model))
    assert EngramConfig.from_pretrained("someone/memory", **options).table_size == memory_of(model).config.table_size
