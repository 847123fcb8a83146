"""Saving over what is there, ended at every moment: the folder is as it was, or as it was to be."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from test_save import in_place, logits, with_memory
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sense_v2.engram.table import disk
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.saving import publishing
from sense_v2.hf.saving.convert_model import convert_trained
from sense_v2.hf.saving.save import save_pretrained


class KilledError(BaseException):
    pass


class Watched:
    """A module, of which the calls that change a folder count; from the `last` on each ends in an error: once, as a
    disk's, or from then on, as after a kill."""

    def __init__(self, module, calls):
        self.module, self.calls = module, calls

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if name not in ("replace", "unlink", "rmtree", "open", "fsync", "pwrite"):
            return value
        if name == "rmtree" and not self.calls.is_kill:  # it is told to ignore errors
            return value

        def call(*args, **more):
            self.calls.count += 1
            if self.calls.count > self.calls.last and (self.calls.is_kill or self.calls.count == self.calls.last + 1):
                raise KilledError if self.calls.is_kill else OSError("the disk's")
            return value(*args, **more)

        return call


class Calls:
    def __init__(self, last, is_kill):
        self.count, self.last, self.is_kill = 0, last, is_kill


def interrupted(monkeypatch, last, is_kill, save):
    """Whether the save ended at that call, and how many there were."""
    calls = Calls(last, is_kill)
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "os", Watched(os, calls))
        patched.setattr(publishing, "shutil", Watched(shutil, calls))
        patched.setattr(disk, "os", Watched(os, calls))
        try:
            save()
        except (KilledError, OSError):
            return True
    return False


@pytest.fixture
def models(tmp_path):
    """A model that was saved, another one, and what the two say."""
    other, model = with_memory(tmp_path / "other", seed=2), with_memory(tmp_path / "table")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    save_pretrained(other, tmp_path / "first")
    memory_of(model).storage.commit()
    return model, logits(other), logits(model)


def read(folder):
    return (folder / "config.json").read_text()


def which(folder, old, new):
    found = logits(from_pretrained(folder))
    assert torch.equal(found, old) or torch.equal(found, new)
    return "new" if torch.equal(found, new) else "old"


@pytest.mark.parametrize("is_kill", [True, False])
def test_over_another_model_ended_at_every_call(tmp_path, models, monkeypatch, is_kill):
    model, old, new = models
    # Where the calls that publish begin is found from behind: what comes before has the same end.
    calls = Calls(10**9, False)
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    with monkeypatch.context() as patched:
        for module, name, real in ((publishing, "os", os), (publishing, "shutil", shutil), (disk, "os", os)):
            patched.setattr(module, name, Watched(real, calls))
        save_pretrained(model, tmp_path / "counted")
    outcomes = []
    for last in [*range(0, calls.count - 36, 30), *range(calls.count - 36, calls.count, 3)]:
        folder = tmp_path / str(last)
        shutil.copytree(tmp_path / "first", folder)
        was_interrupted = interrupted(monkeypatch, last, is_kill, lambda to=folder: save_pretrained(model, to))
        assert was_interrupted or not is_kill
        if list(folder.glob(".saving-*/.publishing.json")) and "moves the rest" in read(folder):
            for opens in (LlamaForCausalLM, AutoModelForCausalLM):
                with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
                    opens.from_pretrained(folder)
        outcomes.append(which(folder, old, new))
        shutil.rmtree(folder)
    if is_kill:
        assert outcomes == sorted(outcomes, reverse=True)
        assert {*outcomes} == {"old", "new"}


@pytest.mark.parametrize("is_kill", [True, False])
def test_a_memory_alone_over_another_ended_at_every_call(tmp_path, monkeypatch, is_kill):
    outcomes = []
    for seed, name in ((1, "memory"), (2, "new")):
        save_pretrained(with_memory(tmp_path / f"table{seed}", seed=seed), tmp_path / name, memory_only=True)
    # Only read: a save's commit that ends early would close a table that trains.
    old, new = (from_pretrained(tmp_path / name, backbone=tiny_model("llama")) for name in ("memory", "new"))
    for last in range(0, 120, 5):
        folder = tmp_path / str(last)
        shutil.copytree(tmp_path / "memory", folder)
        interrupted(monkeypatch, last, is_kill, lambda to=folder: save_pretrained(new, to, memory_only=True))
        found = logits(from_pretrained(folder, backbone=tiny_model("llama")))
        outcomes.append("new" if torch.equal(found, logits(new)) else "old")
        assert torch.equal(found, logits({"new": new, "old": old}[outcomes[-1]]))
        shutil.rmtree(folder)
    assert {*outcomes} == {"old", "new"}
    assert outcomes == sorted(outcomes, reverse=True) or not is_kill


def test_over_its_own_folder_ended_while_it_is_published(tmp_path, monkeypatch):
    model = in_place(tmp_path / "saved")
    save_pretrained(model, tmp_path / "saved")
    old = logits(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        memory_of(model).layers["1"].W_v.weight.mul_(1.5)
    new = logits(model)
    own = publishing.publish
    for is_kill in (True, False):
        for last in range(0, 60, 7):

            def ends(*args, last=last, is_kill=is_kill, **gate):
                calls = Calls(last, is_kill)
                with monkeypatch.context() as patched:
                    patched.setattr(publishing, "os", Watched(os, calls))
                    patched.setattr(disk, "os", Watched(os, calls))
                    own(*args, **gate)

            with monkeypatch.context() as patched:
                patched.setattr("sense_v2.hf.saving.save.publish", ends)
                with contextlib.suppress(KilledError, OSError):
                    save_pretrained(model, tmp_path / "saved")
            which(tmp_path / "saved", old, new)
    save_pretrained(model, tmp_path / "saved")
    assert which(tmp_path / "saved", old, new) == "new"
    assert not list((tmp_path / "saved").glob(".saving-*"))


def test_a_new_folder_is_whole_or_not_there(tmp_path, models, monkeypatch):
    model, _, new = models

    def fails(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("sense_v2.hf.saving.save.save_memory", fails)
        with pytest.raises(OSError, match="no room"):
            save_pretrained(model, tmp_path / "deep" / "new")
    assert not (tmp_path / "deep").exists()
    save_pretrained(model, tmp_path / "deep" / "new")
    assert torch.equal(logits(from_pretrained(tmp_path / "deep" / "new")), new)


def test_shards_of_the_model_before_leave(tmp_path, models):
    model, _, new = models
    save_pretrained(tiny_model("llama", layers=2), tmp_path / "plain", max_shard_size="20KB")
    assert list((tmp_path / "plain").glob("model-*-of-*"))
    save_pretrained(model, tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(from_pretrained(tmp_path / "plain")), new)


@pytest.mark.parametrize("name", ["../victim", "/tmp/victim"])
def test_a_plan_that_names_files_outside_of_its_folder_is_refused(tmp_path, name):
    staging = tmp_path / "model" / ".saving-x"
    staging.mkdir(parents=True)
    (staging / ".publishing.json").write_text(json.dumps({"new": ["config.json"], "old": [name]}))
    with pytest.raises(ValueError, match=r"names a file outside of its folder \('.*victim'\); remove .*\.saving-x"):
        from_pretrained(tmp_path / "model")


def test_a_converted_model_killed_at_every_call_is_no_model_before_it_is_whole(tmp_path, monkeypatch):
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path / "table"), tiny_tokenizer())
    with torch.no_grad():
        memory_of(model).layers["1"].W_v.weight.normal_()
    save_pretrained(model, tmp_path / "saved")
    kinds, last, is_ended = set(), 0, True
    while is_ended:
        folder = tmp_path / f"converted-{last}"
        is_ended = interrupted(
            monkeypatch, last, True, lambda to=folder: convert_trained(tmp_path / "saved", to, "bfloat16")
        )
        kind = "none"
        if (folder / "config.json").exists():
            kind = "notice" if "moves the rest" in read(folder) else "whole"
        assert kind != "none" or not (folder / "model.safetensors").exists()
        if kind == "notice":
            with pytest.raises(OSError, match=r"config\.json.*not a valid JSON"):
                LlamaForCausalLM.from_pretrained(folder)
        convert_trained(tmp_path / "saved", folder, "bfloat16")
        torch.testing.assert_close(logits(from_pretrained(folder)), logits(model), atol=0.02, rtol=0)
        kinds.add(kind)
        shutil.rmtree(folder)
        last += 8
    assert kinds == {"none", "notice", "whole"}
