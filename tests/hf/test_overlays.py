"""Models whose table lies under an overlay: saved, loaded, copied, trained and resumed."""

import copy
import dataclasses
import shutil

import pytest
import torch
from test_attach_released import attached, awake
from test_attach_released import released as released_checkpoint
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import TrainingArguments

from sense_v2.cli.main import main
from sense_v2.core.config import TrainConfig
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.teach_facts import teach_facts
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay, load_overlay, remove_overlay
from sense_v2.hf.saving.convert_model import convert_trained
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.fit import fit
from sense_v2.hf.training.teaching import teach
from sense_v2.hf.training.trainer import EngramTrainer

checkpoint = released_checkpoint
IDS = torch.arange(1, 65).reshape(2, 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = attach_engram(tiny_model("llama"), tiny_config(folder / "table"), tiny_tokenizer())
    wake(memory_of(model), 0.1)
    # As `wake` has stored around the journal, the manifest doesn't know these rows; they are stored once more.
    storage = memory_of(model).storage
    rows = storage.weight.clone()
    storage.weight.div_(50)
    storage.write(torch.arange(1_500), rows)
    storage.commit()
    save_pretrained(model, folder / "model")
    detach_engram(model)
    return folder / "model"


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def table_bytes(folder):
    return (folder / "engram" / "engram_table.dat").read_bytes()


def change(model, *row_ids):
    memory_of(model).storage.write(torch.tensor(row_ids), torch.full((len(row_ids), 8), 3.0))


def all_rows(model):
    return memory_of(model).storage.eval()(torch.arange(1_500))


# Saved and loaded


@pytest.mark.parametrize("table", ["copy", "reference"])
def test_a_model_is_saved_with_its_overlay_and_loaded_with_it(folder, tmp_path, table):
    model = from_pretrained(folder)
    plain = logits(model)
    add_overlay(model)
    change(model, *range(0, 1_500, 2))
    changed = logits(model)
    assert not torch.equal(changed, plain)
    save_pretrained(model, tmp_path / "changed", table=table)
    assert read_delta(tmp_path / "changed" / "engram" / "overlay.safetensors").row_ids_U.tolist()[:2] == [0, 2]
    again = from_pretrained(tmp_path / "changed")
    assert torch.equal(logits(again), changed)
    assert torch.equal(logits(from_pretrained(folder)), plain)
    with pytest.raises(ValueError, match=r"would be a second one\. Make them one: sense-engram delta merge"):
        from_pretrained(tmp_path / "changed", overlay=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="Put it into the table first: sense-engram delta apply"):
        convert_trained(tmp_path / "changed", tmp_path / "int8", "int8")


def test_a_model_saved_where_it_lies_keeps_table_and_overlay_and_then_neither(folder):
    before = table_bytes(folder)
    model = from_pretrained(folder)
    add_overlay(model, folder / "engram" / "overlay.safetensors")
    change(model, 7)
    changed = logits(model)
    save_pretrained(model, folder)
    detach_engram(model)
    model = from_pretrained(folder, mode="r+")
    assert torch.equal(logits(model), changed)
    assert memory_of(model).storage.mode == "r+"
    detach_engram(model)
    (folder / "engram" / "overlay.safetensors").unlink()
    model = from_pretrained(folder)
    save_pretrained(model, folder)
    assert not (folder / "engram" / "overlay.safetensors").exists()
    assert table_bytes(folder) == before


def test_an_overlay_is_named_when_a_model_is_loaded_and_made_where_there_is_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no delta there"):
        from_pretrained(folder, overlay=tmp_path / "facts.safetensors")
    model = from_pretrained(folder, overlay=tmp_path / "facts.safetensors", mode="r+")
    change(model, 3)
    memory_of(model).storage.commit()
    changed = logits(model)
    detach_engram(model)
    model = from_pretrained(folder, overlay=tmp_path / "facts.safetensors")
    assert torch.equal(logits(model), changed)
    with pytest.raises(PermissionError):
        change(model, 4)
    (tmp_path / "plain").mkdir()
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no memory that"):
        from_pretrained(tmp_path / "plain", overlay=tmp_path / "facts.safetensors")


def test_overlays_lie_on_each_other_and_are_saved_as_one(folder, tmp_path):
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path, rows in zip(files, ([3, 5], [5, 7]), strict=True):
        model = from_pretrained(folder, overlay=path, mode="r+")
        change(model, *rows)
        memory_of(model).storage.commit()
        detach_engram(model)
    model = from_pretrained(folder, overlay=files)
    changed = logits(model)
    assert memory_of(model).storage.changed_ids.tolist() == [3, 5, 7]
    save_pretrained(model, tmp_path / "changed")
    assert torch.equal(logits(from_pretrained(tmp_path / "changed")), changed)
    assert read_delta(tmp_path / "changed" / "engram" / "overlay.safetensors").row_ids_U.tolist() == [3, 5, 7]
    other = copy.deepcopy(model)
    remove_overlay(model)
    assert memory_of(model).storage.path == files[0]
    remove_overlay(other), remove_overlay(other)
    with pytest.raises(FileNotFoundError, match="no delta there"):
        add_overlay(other, [tmp_path / "none.safetensors", files[0]])
    assert memory_of(other).storage is memory_of(other).table
    assert torch.equal(logits(other), logits(from_pretrained(folder)))


def test_a_copy_of_a_model_has_its_changes_and_is_a_model_of_its_own(folder, tmp_path):
    model = from_pretrained(folder)
    add_overlay(model)
    change(model, 5)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    change(other, 6)
    assert memory_of(model).storage.changed_ids.tolist() == [5]
    model = from_pretrained(folder, overlay=tmp_path / "facts.safetensors", mode="r+")
    change(model, 9)
    memory_of(model).storage.commit()
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    assert memory_of(other).storage.mode == "r"
    detach_engram(model)


# Trained


@pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
def test_rows_are_trained_and_taught_on_top_of_a_released_table(checkpoint, tmp_path):
    folder, _ = checkpoint
    before = {path: path.read_bytes() for path in folder.iterdir()}
    table = open_released_table(folder, 1)
    config = dataclasses.replace(table.config, shadow_map_path=str(tmp_path / "map.npy"))
    overlay = OverlayStorage(table, tmp_path / "facts.safetensors")
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer(), storage=overlay)
    for layer in memory_of(model):
        torch.nn.init.normal_(layer.W_v.weight, std=0.02)
    fit(
        model,
        [IDS] * 3,
        TrainConfig(batch_size=2, steps=3, warmup_steps=1, train_backbone=False, row_learning_rate=0.1),
    )
    assert len(overlay.changed_ids) > 0
    assert overlay.dtype == torch.bfloat16
    assert overlay.committed_step == 3
    overlay.forget(overlay.changed_ids)
    taught = teach(model, tiny_tokenizer(), "word3 word1", prompt="word5 word6", steps=5)
    assert taught.losses[-1] < taught.losses[0]
    assert taught.overlay is overlay
    taught.undo()
    assert len(overlay.changed_ids) == 0
    detach_engram(model)
    overlay.close()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def changes(seed, *row_ids):
    ids = torch.tensor(row_ids)
    return ids, torch.randn(len(ids), 256, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
def test_one_overlay_lies_on_the_tables_of_all_layers(checkpoint, tmp_path, capsys):
    """The oracle has an overlay on each table by itself, attached with them."""
    folder, _ = checkpoint
    before = {path: path.read_bytes() for path in folder.iterdir()}
    every = {layer: len(rows[0]) for layer, rows in checkpoint[1].items()}
    own = {layer: changes(layer, *range(0, count, 2)) for layer, count in every.items()}
    tables = {place: open_released_table(folder, layer) for place, layer in ((1, 1), (2, 14))}
    config = dataclasses.replace(tables[1].config, shadow_map_path=str(tmp_path / "map.npy"))
    overlays = {place: OverlayStorage(table) for place, table in tables.items()}
    oracle = attach_engram(tiny_model("llama"), config, tiny_tokenizer(), storage=overlays)
    for place, layer in ((1, 1), (2, 14)):
        overlays[place].write(*own[layer])
    model, _ = attached(checkpoint, tmp_path, {1: 1, 2: 14})
    awake(oracle), awake(model)
    plain, expected = logits(model), logits(oracle)
    assert not torch.equal(plain, expected)

    overlay = add_overlay(model, tmp_path / "facts.safetensors")
    assert torch.equal(logits(model), plain)
    overlay.write(own[1][0], own[1][1])
    assert not torch.equal(logits(model), expected)  # the other table's are missing
    overlay.write(own[14][0] + every[1], own[14][1])
    assert torch.equal(logits(model), expected)
    other = copy.deepcopy(model)
    overlay.commit()
    base = read_delta(tmp_path / "facts.safetensors").info.base
    assert [(one["layer"], one["rows"]) for one in base.provenance["tables"]] == list(every.items())
    assert len({one["digest"] for one in base.provenance["tables"]}) == 2
    assert main(["delta", "show", str(tmp_path / "facts.safetensors")]) == 0
    said = capsys.readouterr().out
    assert all(f"layer {layer:<3}{len(ids):,} rows of its own table" in said for layer, (ids, _) in own.items())
    remove_overlay(model)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(other), expected)
    load_overlay(model, "facts", tmp_path / "facts.safetensors")
    with torch.no_grad():
        found = model(IDS, overlay=["facts", None]).logits
    assert torch.equal(found, torch.stack([expected[0], plain[1]]))
    detach_engram(model)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    (tmp_path / "one").mkdir()
    alone, _ = attached(checkpoint, tmp_path / "one", {1: 1})
    with pytest.raises(ValueError, match="was made on another table than"):
        add_overlay(alone, tmp_path / "facts.safetensors")


@pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
def test_rows_of_all_layers_are_taught(checkpoint, tmp_path):
    folder, rows = checkpoint
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model, _ = attached(checkpoint, tmp_path, {1: 1, 2: 14})
    for layer in memory_of(model):
        torch.nn.init.normal_(layer.W_v.weight, std=0.02)
    plain = logits(model)
    taught = teach(model, tiny_tokenizer(), "word3 word1", prompt="word5 word6", steps=5)
    assert taught.losses[-1] < taught.losses[0]
    num_first = len(rows[1][0])
    assert (taught.row_ids_U < num_first).any()
    assert (taught.row_ids_U >= num_first).any()
    taught.undo()
    assert torch.equal(logits(model), plain)
    facts = [Fact("word7 word8", "word9", wordings=("{subject} word3",))]
    done = teach_facts(model, tiny_tokenizer(), facts, neutral=[[5, 6, 7, 8]], steps=2, lr=0.1)
    moved = done.taught.row_ids_U
    assert (moved < num_first).any()
    assert (moved >= num_first).any()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_training_loop_trains_the_overlay_and_leaves_the_table(folder, tmp_path):
    before = table_bytes(folder)
    model = from_pretrained(folder, overlay=tmp_path / "facts.safetensors", mode="r+")
    history = fit(
        model,
        [IDS] * 4,
        TrainConfig(batch_size=2, steps=4, warmup_steps=1, train_backbone=False, row_learning_rate=0.1),
    )
    assert history.train_loss[-1] < history.train_loss[0]
    assert memory_of(model).storage.committed_step == 4
    detach_engram(model)
    delta = read_delta(tmp_path / "facts.safetensors")
    assert len(delta.row_ids_U) > 100
    assert delta.states.keys() == {"adagrad"}
    assert table_bytes(folder) == before


def test_a_trainer_on_an_overlay_is_resumed_bit_for_bit(folder, tmp_path):
    def trained(name, resume=None, **changes):
        model = from_pretrained(folder, overlay=tmp_path / f"{name}.safetensors", mode="r+")
        settings = {"per_device_train_batch_size": 1, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}
        arguments = TrainingArguments(
            str(tmp_path / name), report_to="none", disable_tqdm=True, use_cpu=True, seed=1, **{**settings, **changes}
        )
        blocks = [{"input_ids": ids, "labels": ids} for ids in torch.stack([*IDS, *IDS.flip(1)])]
        trainer = EngramTrainer(
            model, arguments, train_dataset=blocks, callbacks=[EngramCallback(row_optimizer="adam")]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(memory_of(model).storage, OverlayStorage)
        rows, weights = all_rows(model), {name: value.clone() for name, value in model.state_dict().items()}
        detach_engram(model)
        return rows, weights, read_delta(tmp_path / f"{name}.safetensors").states["adam"].clone()

    before = table_bytes(folder)
    whole = trained("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2" / "engram"
    assert sorted(file.name for file in checkpoint.iterdir() if "table" in file.name) == []
    resumed = trained("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[2], resumed[2])
    assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())
    assert table_bytes(folder) == before
