"""A model with memory, saved and loaded: bit for bit the same, whole or refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.data.corpus import Batches
from sense_v2.hf.experiments.controls import permute_rows
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import attached_memory, memory_of
from sense_v2.hf.saving.folder import memory_paths
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.fit import fit
from sense_v2.hf.training.fresh_model import train_bpe

SETTINGS = TrainConfig(steps=3, batch_size=2, sequence_length=12, warmup_steps=1, row_optimizer="adagrad")


def with_memory(folder, name="llama", *, seed=1, model=None, **changes):
    """A model whose memory, in `folder`, shows in its logits."""
    torch.manual_seed(seed)
    model = tiny_model(name) if model is None else model
    attach_engram(model, tiny_config(folder, causal=name != "bert", seed=seed, **changes), tiny_tokenizer())
    wake(memory_of(model))
    return model


def in_place(folder, **changes):
    """The same, where `save_pretrained(model, folder)` leaves the table."""
    table, shadow_map = map(str, memory_paths(folder))
    return with_memory(folder, storage_path=table, shadow_map_path=shadow_map, **changes)


def ids(length=10) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def batches() -> Batches:
    tokens = np.tile(np.random.default_rng(0).integers(3, VOCABULARY, 40), 6)
    return Batches(tokens, batch_size=2, sequence_length=12, seed=0)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- there and back ---


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gemma", {}),
        ("qwen3", {}),
        ("mistral", {}),
        ("bert", {}),
    ],
)
def test_a_saved_model_loads_bit_for_bit(tmp_path, name, extra):
    model = with_memory(tmp_path / "table", name, model=tiny_model(name, **extra))
    plain = logits(tiny_model(name, **extra))
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), plain)
    if extra:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(detach_engram(loaded)), plain)


@pytest.mark.parametrize("changes", [{"layer_indices": [0, 2]}, {"dtype": "bfloat16"}, {"normalization": "deepseek"}])
def test_other_memories(tmp_path, changes):
    model = with_memory(tmp_path / "table", **changes)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_backbone_of_bfloat16_stays_one(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "plain")
    model = with_memory(tmp_path / "table", model=AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    assert model.dtype == torch.bfloat16
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert memory_of(loaded).layers["1"].W_v.weight.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_what_was_trained_is_what_is_saved(tmp_path):
    model = with_memory(tmp_path / "table")
    fit(model, batches(), SETTINGS)
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert memory_of(loaded).storage.committed_step == 3
    assert np.array_equal(memory_of(loaded).storage.mmap, memory_of(model).storage.mmap)


def test_the_folder_can_be_moved(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved")
    expected = logits(model)
    shutil.rmtree(tmp_path / "table")
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert torch.equal(logits(from_pretrained(tmp_path / "moved")), expected)
    config = EngramConfig.load(tmp_path / "moved" / "engram" / "config.json")
    assert (config.storage_path, config.shadow_map_path) == ("engram_table.dat", "shadow_map.npy")


def test_a_model_without_memory(tmp_path):
    model = tiny_model("llama")
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert attached_memory(loaded) is None
    assert torch.equal(logits(loaded), logits(model))
    assert not (tmp_path / "engram").exists()


def test_the_pad_token_is_the_one_the_hashes_were_made_with(tmp_path):
    """Most models get their pad token late. The n-grams at the start of a text must still find their rows."""
    model = tiny_model("llama")
    model.config.pad_token_id = None
    model = with_memory(tmp_path / "table", model=model)
    expected = logits(model)
    model.config.pad_token_id = 7
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert loaded.config.pad_token_id == 7
    assert torch.equal(logits(loaded), expected)


def test_a_pad_token_that_the_configuration_names_is_kept(tmp_path):
    model = with_memory(tmp_path / "table", pad_token_id=5)
    save_pretrained(model, tmp_path / "saved")
    assert EngramConfig.load(tmp_path / "saved" / "engram" / "config.json").pad_token_id == 5
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_permuted_control_is_saved_as_an_ordinary_model(tmp_path):
    model = with_memory(tmp_path / "table")
    expected = logits(model)
    permute_rows(memory_of(model), 0)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), expected)


# --- the backbone alone ---


@pytest.mark.parametrize("extra", [{}, {"tie_word_embeddings": True}])
def test_the_backbone_opens_with_transformers_alone(tmp_path, extra):
    backbone = tiny_model("llama", **extra)
    backbone.generation_config.update(use_cache=True, max_new_tokens=17)
    backbone.save_pretrained(tmp_path / "plain")
    expected = logits(backbone)
    model = with_memory(tmp_path / "table", model=backbone)
    save_pretrained(model, tmp_path / "saved")

    opened, report = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(opened), expected)
    assert opened.generation_config.use_cache is True
    assert opened.generation_config.max_new_tokens == 17
    generation, plain_generation, config, plain_config = (
        json.loads((tmp_path / folder / name).read_text())
        for name in ("generation_config.json", "config.json")
        for folder in ("saved", "plain")
    )
    assert generation == plain_generation
    # It says what the folder is, and is the backbone's otherwise.
    assert (config.pop("model_type"), config.pop("architectures")) == ("sense_engram", ["AutoModelForCausalLM"])
    config["model_type"], config["architectures"] = (
        config.pop("backbone_model_type"),
        config.pop("backbone_architectures"),
    )
    assert config == plain_config
    saved, plain = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "plain"))
    assert saved.keys() == plain.keys()


def test_nothing_is_pickled(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved", tokenizer=tiny_tokenizer())
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".npy", ".dat", ".md"}
    np.load(tmp_path / "saved" / "engram" / "shadow_map.npy", allow_pickle=False)
    assert sorted(path.name for path in (tmp_path / "saved" / "engram").iterdir()) == [
        "backbone.json",
        "config.json",
        "engram_table.dat",
        "engram_table.json",
        "fusion.safetensors",
        "shadow_map.json",
        "shadow_map.npy",
    ]


def test_nothing_is_unpickled(saved):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        from_pretrained(saved)


def test_weights_in_another_order_of_memory(tmp_path):
    model = with_memory(tmp_path / "table")
    weight = memory_of(model).layers["1"].W_v.weight
    weight.data = weight.data.t().contiguous().t()
    expected = logits(model)
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), expected)


# --- tokenizers ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma", "bert"])
def test_a_lone_tokenizer_is_found_again_by_transformers(tmp_path, name):
    save_pretrained(tiny_model(name), tmp_path, tokenizer=tiny_tokenizer())
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("word1 WORD2 word3")["input_ids"] == tiny_tokenizer().encode("word1 WORD2 word3").ids


@pytest.mark.parametrize("eos", [0, [0, 5], 5, None, []])
def test_a_lone_tokenizer_gets_the_models_special_tokens(tmp_path, eos):
    tokenizer = train_bpe(["some text"])
    model = tiny_model("llama", vocabulary=tokenizer.get_vocab_size())
    model.config.eos_token_id, model.config.pad_token_id = eos, 0
    save_pretrained(model, tmp_path, tokenizer=tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path)
    text = "some <|endoftext|>text, 漢  s"
    assert found(text)["input_ids"] == tokenizer.encode(text).ids
    # Token 5 is an ordinary one: made special, it would be cut out of texts.
    assert found.eos_token_id == (0 if eos in (0, [0, 5]) else None)
    assert found.pad_token_id == 0


def test_a_tokenizer_of_transformers(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(["some text"]), eos_token="<|endoftext|>")
    save_pretrained(tiny_model("qwen3"), tmp_path, tokenizer=tokenizer)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.eos_token_id == 0
    assert found("some text")["input_ids"] == tokenizer("some text")["input_ids"]


# --- where the table lies ---


def test_a_table_in_the_folder_stays_with_its_state(tmp_path):
    model = in_place(tmp_path)
    fit(model, batches(), SETTINGS)
    table, _ = memory_paths(tmp_path)
    before = table.stat()
    state = (tmp_path / "engram" / "engram_table.adagrad.dat").read_bytes()
    save_pretrained(model, tmp_path)
    after = table.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    expected = logits(model)
    detach_engram(model)
    loaded = from_pretrained(tmp_path, mode="r+")
    assert torch.equal(logits(loaded), expected)
    assert memory_of(loaded).storage.manifest.states["adagrad"].step == 3
    assert (tmp_path / "engram" / "engram_table.adagrad.dat").read_bytes() == state
    fit(loaded, batches(), SETTINGS)
    assert memory_of(loaded).storage.manifest.states["adagrad"].step == 6


def test_saving_commits_what_was_written(tmp_path):
    model = in_place(tmp_path)
    storage = memory_of(model).storage
    assert storage.manifest.generation == 0
    save_pretrained(model, tmp_path)
    assert storage.manifest.generation == 1


def test_a_save_in_place_that_fails_leaves_a_model(tmp_path, monkeypatch):
    model = in_place(tmp_path)
    save_pretrained(model, tmp_path)

    def fail(*_, **__) -> None:
        raise OSError("no room")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="no room"):
        save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path, mode="r")), logits(model))


def test_a_model_that_is_trained_in_place_is_its_tables_writer(tmp_path):
    """It saves there as often as it likes; beside it the folder can be read, and a second trainer is refused."""
    model = in_place(tmp_path)
    for _ in range(2):
        fit(model, batches(), SETTINGS)
        save_pretrained(model, tmp_path)
    reader = from_pretrained(tmp_path, mode="r")
    assert torch.equal(logits(reader), logits(model))
    with pytest.raises(BlockingIOError, match=r"engram_table\.dat is open for writing in this process already"):
        from_pretrained(tmp_path, mode="r+")
    expected = logits(detach_engram(model))
    again = from_pretrained(tmp_path, mode="r+")
    assert torch.equal(logits(again), logits(reader))
    assert torch.equal(logits(detach_engram(again)), expected)


def test_a_table_reached_through_a_link_is_in_place(tmp_path):
    detach_engram(in_place(tmp_path / "real"))
    (tmp_path / "link").symlink_to("real")
    model = in_place(tmp_path / "link")
    inode = memory_paths(tmp_path / "real")[0].stat().st_ino
    save_pretrained(model, tmp_path / "real")
    assert memory_paths(tmp_path / "real")[0].stat().st_ino == inode
    assert torch.equal(logits(from_pretrained(tmp_path / "link", mode="r")), logits(model))


def test_a_table_from_elsewhere_is_copied_without_its_optimizers_state(tmp_path):
    model = with_memory(tmp_path / "table")
    fit(model, batches(), SETTINGS)
    before = snapshot(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved")
    after = snapshot(tmp_path / "table")
    # One flush more, after which there is nothing to undo.
    assert {name for name in after if after[name] != before[name]} <= {"engram_table.json", "engram_table.journal"}
    assert after["engram_table.journal"][0] == b""
    assert not list((tmp_path / "saved").rglob("*.ada*.dat"))
    loaded = from_pretrained(tmp_path / "saved", mode="r+")
    assert memory_of(loaded).storage.manifest.states == {}
    fit(loaded, batches(), SETTINGS)  # a manifest that named the state it hasn't got would refuse
    assert memory_of(loaded).storage.manifest.states["adagrad"].step == 3
    # And the model that was saved goes on with its own table.
    expected = logits(model)
    assert not torch.equal(logits(loaded), expected)
    assert memory_of(model).storage.path == tmp_path / "table" / "engram_table.dat"


def test_saving_twice_gives_the_same_files(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved", tokenizer=tiny_tokenizer())
    first = {name: content for name, (content, _) in snapshot(tmp_path / "saved").items()}
    save_pretrained(model, tmp_path / "saved", tokenizer=tiny_tokenizer())
    second = {name: content for name, (content, _) in snapshot(tmp_path / "saved").items()}
    # The second save kept writers off the table that it replaced.
    assert second.keys() - first.keys() == {"engram/engram_table.lock"}
    assert {name for name in first if first[name] != second[name]} <= {"engram/engram_table.json"}
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_a_loaded_model_can_be_saved_where_it_came_from_and_elsewhere(tmp_path):
    model = with_memory(tmp_path / "table")
    expected = logits(model)
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    save_pretrained(loaded, tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)  # its weights weren't a mapping of the file that was written
    save_pretrained(loaded, tmp_path / "copy")
    for folder in ("saved", "copy"):
        assert torch.equal(logits(from_pretrained(tmp_path / folder, mode="r")), expected)


# --- over another model ---


def test_over_another_model_with_memory(tmp_path):
    other = in_place(tmp_path / "saved", seed=2, table_size=1_800, layer_indices=[0, 2])
    fit(other, batches(), SETTINGS)
    save_pretrained(other, tmp_path / "saved")
    reader = from_pretrained(tmp_path / "saved", mode="r")
    read_before = logits(reader)
    model = with_memory(tmp_path / "table")
    # Its next commit would put the old table's manifest beside the new one's rows.
    before = snapshot(tmp_path / "saved")
    with pytest.raises(BlockingIOError, match=r"saved/engram/engram_table\.dat is open for writing"):
        save_pretrained(model, tmp_path / "saved")
    assert snapshot(tmp_path / "saved") == before
    detach_engram(other)
    save_pretrained(model, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    # Who had the old table open still reads the old one.
    assert torch.equal(logits(reader), read_before)
    # The other's optimizer state isn't taken for this one's.
    assert not (tmp_path / "saved" / "engram" / "engram_table.adagrad.dat").exists()


@pytest.mark.filterwarnings("ignore:.*(was|were) put back")
def test_a_journal_of_the_table_before_is_not_undone_in_the_new_one(tmp_path):
    other = in_place(tmp_path / "saved", seed=2)
    save_pretrained(other, tmp_path / "saved")
    storage = memory_of(other).storage
    rows = torch.arange(storage.num_embeddings)
    storage.write(rows, torch.ones(len(rows), storage.embedding_dim))
    with pytest.warns(UserWarning, match="1 updates since its last commit"):
        storage.close()
    assert (tmp_path / "saved" / "engram" / "engram_table.journal").stat().st_size > 1_500 * 8 * 4
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


def test_state_left_by_a_table_of_the_same_size_is_not_taken_over(tmp_path):
    for name, seed in (("clean", None), ("used", 2)):
        if seed is not None:
            other = in_place(tmp_path / name, seed=seed)
            fit(other, batches(), SETTINGS)
            save_pretrained(other, tmp_path / name)
            detach_engram(other)
        save_pretrained(with_memory(tmp_path / f"table of {name}"), tmp_path / name)
    losses = [
        fit(from_pretrained(tmp_path / name, mode="r+"), batches(), SETTINGS).train_loss for name in ("clean", "used")
    ]
    assert losses[0] == losses[1]


def test_another_table_in_the_folder_is_left_alone(tmp_path):
    """A table of another name in the same folder is the live one: copied, not swept up as an old state."""
    model = with_memory(tmp_path, storage_path=str(tmp_path / "engram" / "engram_table.v2.dat"))
    fit(model, batches(), SETTINGS)
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    left = {path.name for path in (tmp_path / "engram").iterdir()}
    assert {"engram_table.v2.dat", "engram_table.v2.json", "engram_table.v2.adagrad.dat"} <= left


@pytest.mark.filterwarnings("ignore:.*has no manifest")
def test_a_live_table_without_a_manifest_is_no_state_either(tmp_path):
    live = tmp_path / "engram" / "engram_table.v2.dat"
    detach_engram(with_memory(tmp_path, storage_path=str(live)))
    live.with_suffix(".json").unlink()
    torch.manual_seed(1)
    config = tiny_config(tmp_path, storage_path=str(live), seed=1)
    model = attach_engram(tiny_model("llama"), config, mode="r")
    save_pretrained(model, tmp_path)
    assert live.read_bytes() == memory_paths(tmp_path)[0].read_bytes()


def test_without_memory_over_a_model_with_memory_is_refused(tmp_path):
    save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved")
    before = snapshot(tmp_path / "saved")
    with pytest.raises(FileExistsError, match=r"saved/engram is another model's memory.*remove it, or choose"):
        save_pretrained(tiny_model("gpt2"), tmp_path / "saved")
    assert snapshot(tmp_path / "saved") == before


def test_a_map_without_a_description_takes_none_from_the_model_before(tmp_path):
    save_pretrained(with_memory(tmp_path / "other", normalization="deepseek"), tmp_path / "saved")
    model = with_memory(tmp_path / "table")
    (tmp_path / "table" / "shadow_map.json").unlink()
    save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "engram" / "shadow_map.json").exists()
    with pytest.warns(UserWarning, match=r"has no shadow_map\.json"):
        loaded = from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))


def test_a_save_that_fails_leaves_no_half_model(tmp_path, monkeypatch):
    other = with_memory(tmp_path / "other", seed=2)
    save_pretrained(other, tmp_path / "saved")
    expected = logits(other)
    model = with_memory(tmp_path / "table")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"saved/\.saving-\w+/engram/engram_table\.dat needs 48000 bytes"):
            save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), expected)
    assert not list((tmp_path / "saved").glob(".saving-*"))
    save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))


# --- loading to serve ---


def test_loading_to_read_changes_nothing(tmp_path):
    model = with_memory(tmp_path / "table")
    fit(model, batches(), SETTINGS)
    save_pretrained(model, tmp_path / "saved")
    before = snapshot(tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved", mode="r")
    assert torch.equal(logits(loaded), logits(model))
    loaded.generate(ids(), max_new_tokens=3, do_sample=False)
    save_pretrained(loaded, tmp_path / "copy")  # it can still be copied
    detach_engram(loaded)
    assert snapshot(tmp_path / "saved") == before
    assert torch.equal(logits(from_pretrained(tmp_path / "copy")), logits(model))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "saved")
    paths = [tmp_path / "saved", *(tmp_path / "saved").rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert torch.equal(logits(from_pretrained(tmp_path / "saved", mode="r")), logits(model))
        with pytest.raises(OSError, match="mode='r' opens a table"):
            from_pretrained(tmp_path / "saved", mode="r+")
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


# --- what is missing or damaged ---


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pretrained(with_memory(tmp_path / "table"), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("engram_table.dat", "table is missing; copy it back"),
        ("shadow_map.npy", "shadow map is missing; copy it back, or make it from the tokenizer"),
        ("fusion.safetensors", "fusion layers' weights are missing; copy them back"),
        ("config.json", "configuration is missing: it was not saved to its end; save it again"),
    ],
)
def test_a_missing_part_is_named(saved, name, message):
    (saved / "engram" / name).unlink()
    before = snapshot(saved)
    with pytest.raises(FileNotFoundError, match=rf"saved/engram/{name}: the memory's {message}"):
        from_pretrained(saved, mode="r+")
    assert snapshot(saved) == before  # no new table, no new map in its place


def test_a_folder_without_a_model(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=rf"{folder}: no model there \(it has no config\.json\)"):
            from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_fusion_weights(saved, keep):
    path = saved / "engram" / "fusion.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"fusion\.safetensors can't be loaded \(SafetensorError: .*\); copy"):
        from_pretrained(saved)


@pytest.mark.parametrize("damage", ["shape", "missing", "unknown"])
def test_fusion_weights_of_another_model(saved, damage):
    path = saved / "engram" / "fusion.safetensors"
    weights = load_file(path)
    if damage == "shape":
        weights["1.W_v.weight"] = weights["1.W_v.weight"][:-1].contiguous()
    elif damage == "missing":
        del weights["1.W_v.weight"]
    else:
        weights["2.W_v.weight"] = weights["1.W_v.weight"].clone()
    save_file(weights, path)
    with pytest.raises(
        ValueError, match=r"fusion\.safetensors doesn't hold the fusion layers(.|\n)*W_v(.|\n)*; copy"
    ):
        from_pretrained(saved)


def test_a_truncated_table(saved):
    path = saved / "engram" / "engram_table.dat"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"engram_table\.dat: expected 48000 bytes .*, found 47996"):
        from_pretrained(saved, mode="r+")


def test_a_map_and_a_table_of_two_models(saved, tmp_path):
    other = with_memory(tmp_path / "other", normalization="deepseek")
    save_pretrained(other, tmp_path / "other saved")
    for name in ("shadow_map.npy", "shadow_map.json"):
        shutil.copy(tmp_path / "other saved" / "engram" / name, saved / "engram" / name)
    with pytest.raises(ValueError, match="normalization"):
        from_pretrained(saved, mode="r+")


def test_a_damaged_configuration_is_named(saved):
    (saved / "engram" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"engram/config\.json: not valid JSON"):
        from_pretrained(saved)
