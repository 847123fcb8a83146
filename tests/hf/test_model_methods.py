"""transformers' own methods on a model with memory: `save_pretrained`, `push_to_hub`; and what a copy has of them."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_save import in_place, logits, with_memory
from test_sharing import hub  # noqa: F401  # a fixture
from test_trainer import arguments, blocks, history, table_on_disk
from test_trainer import with_memory as trainable
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.trainer import EngramTrainer


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_models_own_method_saves_what_the_function_does(tmp_path):
    model = with_memory(tmp_path / "table")
    save_pretrained(model, tmp_path / "one" / "saved")
    model.save_pretrained(tmp_path / "two" / "saved")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    # Each saving is a commit of its own, which the table's manifest names.
    assert [name for name in one if one[name] != two[name]] in ([], ["saved/engram/engram_table.json"])
    for opening in (from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(opening(tmp_path / "two" / "saved")), logits(model))


def test_a_table_in_the_folder_stays_there(tmp_path):
    model = in_place(tmp_path)
    before = memory_of(model).storage.path.stat()
    model.save_pretrained(str(tmp_path))
    assert memory_of(model).storage.path.stat().st_ino == before.st_ino
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_what_it_is_told_reaches_transformers(tmp_path):
    model = with_memory(tmp_path / "table")
    model.save_pretrained(tmp_path / "saved", max_shard_size=30_000, variant="small")
    assert len(list((tmp_path / "saved").glob("model.small-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(from_pretrained(tmp_path / "saved", variant="small")), logits(model))
    save_pretrained(model, tmp_path / "function", max_shard_size=30_000)
    assert len(list((tmp_path / "function").glob("model-*-of-*.safetensors"))) > 1


def test_a_state_dict_is_saved_in_place_of_the_models_weights(tmp_path, recwarn):
    """As accelerate and DeepSpeed gather one: the fusion layers' weights are in it as well."""
    model = with_memory(tmp_path / "table")
    gathered = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=gathered)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(name.startswith("engram.") for name in saved)
    assert torch.equal(saved["lm_head.weight"], gathered["lm_head.weight"])
    loaded = memory_of(from_pretrained(tmp_path / "saved")).layers.state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, gathered[f"engram.layers.{name}"]), name
    assert not [one for one in recwarn if issubclass(one.category, UserWarning)]


def test_another_process_than_the_main_one_writes_nothing(tmp_path):
    with_memory(tmp_path / "table").save_pretrained(tmp_path / "saved", is_main_process=False)
    assert files(tmp_path / "saved") == {}


def test_a_distributed_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"distributed_checkpoint.*no memory"):
        with_memory(tmp_path / "table").save_pretrained(tmp_path / "saved", distributed_checkpoint=True)
    assert not (tmp_path / "saved").exists()


def test_detaching_gives_the_class_its_methods_back(tmp_path):
    model = tiny_model("llama")
    own = lambda folder, **_: Path(folder).mkdir()  # noqa: E731  # another library's
    model.save_pretrained = own
    with_memory(tmp_path / "table", model=model)
    assert model.save_pretrained is not own
    detach_engram(model)
    assert model.save_pretrained is own
    del model.save_pretrained
    detach_engram(with_memory(tmp_path / "table", model=model))
    assert not {"save_pretrained", "prepare_inputs_for_generation"} & set(vars(model))
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "engram").exists()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "plain")), logits(model))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(tmp_path, how):
    (tmp_path / "table").mkdir()
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path / "table"), tiny_tokenizer())
    with torch.no_grad():
        memory_of(model).layers["1"].W_v.weight.normal_()
    memory_of(model).storage.commit()
    copied = how(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
        memory_of(copied).layers["1"].W_v.weight.mul_(2)
    copied.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(copied))
    assert not torch.equal(logits(copied), logits(model))
    new = copied.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert new.shape == (1, 6)
    detach_engram(copied)
    assert "save_pretrained" not in vars(copied)


# --- the hub ---


def test_pushed_while_it_is_saved(tmp_path, hub):  # noqa: F811
    model = with_memory(tmp_path / "table")
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/model", commit_message="all of it")
    found = from_pretrained("someone/model", cache_dir=hub, local_files_only=True)
    assert torch.equal(logits(found), logits(model))
    with pytest.raises(TypeError, match="max_shards"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/model", max_shards=2)


def test_the_model_object_is_pushed_with_its_memory(tmp_path, monkeypatch):
    sent = {}

    def create_commit(self, *, operations, **_):
        sent.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", create_commit)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: type("Repo", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = with_memory(tmp_path / "table")
    model.push_to_hub("someone/model")
    for name, content in sent.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "got")), logits(model))


# --- a Trainer's checkpoints ---


class SavesOnce(TrainerCallback):
    """Whether a checkpoint's table was copied more than once."""

    def __init__(self, monkeypatch):
        self.copies = []
        copy_to = MMapEmbeddingStorage.copy_to
        monkeypatch.setattr(
            MMapEmbeddingStorage,
            "copy_to",
            lambda storage, to, **how: (self.copies.append(to), copy_to(storage, to, **how)),
        )


@pytest.mark.parametrize("kind", [Trainer, EngramTrainer])
def test_a_checkpoint_opens_with_the_auto_class(tmp_path, monkeypatch, caplog, kind):
    saves = SavesOnce(monkeypatch)
    model = trainable(tmp_path)
    trainer = kind(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=blocks(),
        callbacks=[EngramCallback()],
    )
    trainer.train()
    assert [path.parts[-3] for path in saves.copies] == ["checkpoint-3", "checkpoint-6"]
    checkpoint = tmp_path / "run" / "checkpoint-6"
    for opening in (AutoModelForCausalLM.from_pretrained, from_pretrained):
        opened, report = opening(checkpoint, output_loading_info=True)
        assert torch.equal(logits(opened), logits(model))
        assert type(opened) is LlamaForCausalLM
        assert not any(report.values()), report
    assert "engram" not in caplog.text

    trainer.save_model(tmp_path / "final")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), logits(model))
    rows = np.fromfile(tmp_path / "final" / "engram" / "engram_table.dat", dtype="<f4")
    assert rows.tobytes() == table_on_disk(model).tobytes()
    assert not torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(tmp_path / "final")))
    # A checkpoint's name is like any other once training is over.
    model.save_pretrained(tmp_path / "run" / "checkpoint-9")
    assert torch.equal(logits(from_pretrained(tmp_path / "run" / "checkpoint-9")), logits(model))
    # It goes on from what it was announced as.
    again = kind(
        model,
        arguments(tmp_path, max_steps=7),
        train_dataset=blocks(),
        callbacks=[EngramCallback()],
    )
    again.train(resume_from_checkpoint=str(checkpoint))
    assert len(history(again)) == 7


def test_a_checkpoint_by_reference_opens_with_the_auto_class(tmp_path):
    model = trainable(tmp_path)
    settings = arguments(tmp_path, save_strategy="steps", save_steps=6)
    callbacks = [EngramCallback(checkpoints="reference")]
    EngramTrainer(model, settings, train_dataset=blocks(), callbacks=callbacks).train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "sense_engram"
    assert not list(checkpoint.rglob("*.dat"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint)), logits(model))
