"""A run on a model that was there before: memory that suits its shape, beside a LoRA, named and not copied."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_model, write_corpus
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.hf.backbones import open_trained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fresh_model import late_memory_for, memory_for, train_bpe
from sense_v2.hf.training.run import RunWatcher, default_config, resume_training, train_on_corpus


@pytest.fixture
def plain(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    tokenizer = train_bpe([path.read_text() for path in corpus.iterdir()])
    model = tiny_model("llama", vocabulary=tokenizer.get_vocab_size())
    model.save_pretrained(tmp_path / "plain")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def settings(**train):
    memory = EngramConfig(table_size=4000, engram_dim=64, num_heads=2, layer_indices=[1], init_std=0.0)
    shape = {"steps": 6, "batch_size": 2, "sequence_length": 16, "eval_sequences": 4, "warmup_steps": 1}
    return Config(memory, TrainConfig(**{**shape, "commit_every": 2, "eval_every": 0, **train}))


def trained(plain, config, **more):
    output = plain.parent / "trained"
    result = train_on_corpus(config, model=str(plain), corpus=[plain.parent / "corpus"], output=output, **more)
    return result, output


def test_an_adapter_learns_faster_than_a_backbone():
    rates = [default_config("some/model", rank).train.learning_rate for rank in (0, 8)]
    assert rates == [1e-4, 3e-3]


def test_memory_for_a_model_stands_at_a_quarter_and_at_two_thirds_of_its_depth():
    shapes = {(30, 576): ([8, 20], 512), (2, 64): ([1], 128), (1, 64): ([0], 128), (80, 8192): ([22, 54], 512)}
    for (layers, width), (places, dim) in shapes.items():
        model = tiny_model("llama", layers=1)
        model.config.num_hidden_layers, model.config.hidden_size = layers, width
        suited = memory_for(model, EngramConfig())
        assert (suited.layer_indices, suited.engram_dim, suited.num_heads) == (places, dim, 4)


def test_counted_rows_stand_late():
    model = tiny_model("llama", layers=1)
    for layers, place in {30: 25, 2: 1, 1: 0, 80: 67}.items():
        model.config.num_hidden_layers, model.config.hidden_size = layers, 576
        suited = late_memory_for(model, EngramConfig())
        assert (suited.layer_indices, suited.engram_dim, suited.num_heads) == ([place], 512, 4)


def test_a_frozen_backbone_is_named_and_its_damage_told(plain):
    config = settings(train_backbone=False, row_learning_rate=0.5)
    result, output = trained(plain, config, suits_model=True)
    assert not list(output.glob("model*"))
    assert json.loads((output / "engram/backbone.json").read_text())["reference"]["model"] == str(plain)
    model, _ = open_trained(output)
    assert memory_of(model).config.layer_indices == [1, 2]
    assert result["damage"]["tokens"] > 0 < result["damage"]["divergence"]
    fusion = sum(parameter.numel() for parameter in memory_of(model).parameters())
    assert result["trainable"] == {"backbone": 0, "fusion": fusion, "rows": result["memory"]["rows"] * 16}
    state = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_trained_backbone_is_saved_whole(plain):
    result, output = trained(plain, settings())
    assert (output / "model.safetensors").is_file()
    assert result["damage"] is None
    assert result["trainable"]["backbone"] == tiny_model_size(plain)


def tiny_model_size(plain):
    return AutoModelForCausalLM.from_pretrained(plain).num_parameters()


def test_a_lora_trains_beside_the_memory_and_is_opened_with_it(plain):
    result, output = trained(plain, settings(train_backbone=False, lora_rank=2, learning_rate=1e-2))
    assert (output / "adapter_config.json").is_file()
    assert not list(output.glob("model*"))
    model, _ = open_trained(output)
    lora = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert lora
    assert all(value.any() for value in lora)
    assert memory_of(model).storage.weight.any()
    assert result["perplexity"]["after"] < result["perplexity"]["before"]
    assert result["damage"]["divergence"] > 0
    assert result["trainable"]["backbone"] == sum(value.numel() for value in lora) * 2


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[False, True], ids=["whole backbone", "frozen backbone"])
def first(request, plain):
    """A model that was trained with memory, and the settings to train it further."""
    config = settings(train_backbone=not request.param, row_learning_rate=0.5)
    result, output = trained(plain, config)
    return result, output.rename(plain.parent / "first"), config


def test_a_model_with_memory_is_trained_further_from_a_copy(first, plain):
    result, folder, config = first
    before = files(folder)
    more, output = trained(folder, config)
    assert files(folder) == before
    assert more["perplexity"]["before"] == result["perplexity"]["after"]
    assert more["perplexity"]["after"] < more["perplexity"]["before"]
    assert more["memory"] == result["memory"]
    model, tokenizer = open_trained(output)
    source, _ = open_trained(folder)
    assert not torch.equal(memory_of(model).storage.weight, memory_of(source).storage.weight)
    assert len(tokenizer) == model.config.vocab_size
    if not config.train.train_backbone:
        reference = json.loads((output / "engram/backbone.json").read_text())["reference"]
        assert reference["model"] == str(plain)


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_run_on_a_frozen_backbone_resumes_bit_for_bit(plain):
    """Its checkpoints have the weights that are trained, and no others."""
    config = settings(train_backbone=False, row_learning_rate=0.5)
    whole, output = trained(plain, config)
    output.rename(plain.parent / "whole")
    stopped, output = trained(plain, config, watcher=Stops())
    assert stopped["stopped"]
    assert resume_training(output)["train_loss"] == whole["train_loss"]
    for name in ("engram/engram_table.dat", "engram/fusion.safetensors"):
        assert (output / name).read_bytes() == (plain.parent / "whole" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_run_on_a_model_with_memory_resumes_bit_for_bit(first):
    _, folder, config = first
    whole, output = trained(folder, config)
    output.rename(folder.parent / "whole")
    stopped, output = trained(folder, config, watcher=Stops())
    assert stopped["stopped"]
    result = resume_training(output)
    assert (result["train_loss"], result["perplexity"]) == (whole["train_loss"], whole["perplexity"])
    for name in ("engram/engram_table.dat", "engram/fusion.safetensors"):
        assert (output / name).read_bytes() == (folder.parent / "whole" / name).read_bytes(), name


def test_what_cannot_be_trained_further_is_refused(plain):
    config = settings(train_backbone=False, lora_rank=2, learning_rate=1e-2)
    _, output = trained(plain, config)
    adapted = output.rename(plain.parent / "adapted")
    with pytest.raises(CommandError, match=r"an adapter beside its memory.*merge"):
        trained(adapted, settings())
    _, output = trained(plain, settings())
    folder = output.rename(plain.parent / "first")
    config = settings()
    config.engram.enabled = False
    with pytest.raises(CommandError, match="has a memory, and this run is to have none"):
        trained(folder, config)


class Stops(RunWatcher):
    def training(self, settings):
        taken = []
        return nullcontext((lambda history: taken.append(history.steps[-1]), lambda: 4 in taken))


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_run_with_a_lora_resumes_bit_for_bit(plain):
    config = settings(train_backbone=False, lora_rank=2, learning_rate=1e-2)
    whole, output = trained(plain, config)
    output.rename(plain.parent / "whole")
    stopped, output = trained(plain, config, watcher=Stops())
    assert stopped["stopped"]
    result = resume_training(output)
    assert result["train_loss"] == whole["train_loss"]
    for name in ("adapter_model.safetensors", "engram/engram_table.dat", "engram/fusion.safetensors"):
        assert (output / name).read_bytes() == (plain.parent / "whole" / name).read_bytes(), name


def test_a_lora_without_memory_trains_to_be_compared_with(plain):
    config = settings(train_backbone=False, lora_rank=2, learning_rate=1e-2)
    config.engram.enabled = False
    result, output = trained(plain, config)
    assert result["memory"] is None
    assert result["damage"]["divergence"] > 0
    model, tokenizer = open_trained(output)
    assert any("lora_B" in name for name, _ in model.named_parameters())
    assert len(tokenizer) == model.config.vocab_size


def test_a_lora_of_a_fresh_model_is_refused(tmp_path):
    with pytest.raises(CommandError, match=r"lora_rank.*--model"):
        train_on_corpus(settings(lora_rank=2), corpus=[write_corpus(tmp_path / "corpus")], output=tmp_path / "out")


def counting(**train):
    return settings(train_backbone=False, row_learning_rate=0.03, **train)


def test_rows_are_counted_and_then_trained_on_other_text(plain):
    told = []

    class Watcher(RunWatcher):
        def counted(self, counted):
            told.append(counted)

    result, output = trained(plain, counting(), counts=True, suits_model=True, watcher=Watcher())
    (counted,) = told
    assert result["counted"] == vars(counted)
    assert counted.loss_after <= counted.loss_before
    model, _ = open_trained(output)
    assert memory_of(model).config.layer_indices == [2]
    assert counted.rows <= int(memory_of(model).storage.weight.any(1).sum())
    assert not list(output.glob("model*"))


def test_counting_alone_is_a_run(plain):
    some, _ = trained(plain, counting(), counts=True)
    result, output = trained(plain, counting(steps=0), counts=True, force=True)
    assert result["counted"]["tokens"] > some["counted"]["tokens"]  # what is trained on isn't counted
    assert (result["steps"], result["stopped"], result["train_loss"]) == (0, False, None)
    assert result["perplexity"]["after"] < result["perplexity"]["before"]
    model, _ = open_trained(output)
    assert memory_of(model).storage.weight.any(1).sum() == result["counted"]["rows"]
    assert not (output.parent / ".trained.partial").exists()


def test_a_counted_run_goes_on_bit_for_bit(plain):
    whole, output = trained(plain, counting(), counts=True)
    expected = output.rename(plain.parent / "whole")

    class Stopping(RunWatcher):
        def training(self, settings):
            steps = []
            return nullcontext((steps.append, lambda: len(steps) == 3))

    stopped, _ = trained(plain, counting(), counts=True, watcher=Stopping())
    assert stopped["stopped"]
    result = resume_training(output)
    assert {**result["counted"], "seconds": 0} == {**whole["counted"], "seconds": 0}
    assert (output / "engram/engram_table.dat").read_bytes() == (expected / "engram/engram_table.dat").read_bytes()
    assert result["perplexity"] == whole["perplexity"]


def test_a_lora_trains_beside_counted_rows(plain):
    result, output = trained(plain, counting(lora_rank=2, learning_rate=1e-2), counts=True)
    assert result["counted"]["rows"] > 0
    model, _ = open_trained(output)
    assert all(value.any() for name, value in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            {"init_std": 0.02},
            {},
            r"^rows can't be counted: init_std = 0\.02, so the rows begin as noise; --begin-with zeros$",
        ),
        ({"enabled": False}, {}, r"^rows can't be counted: this run is to have no memory; --begin-with zeros$"),
        (
            {},
            {"model": None},
            r"^rows can't be counted: a fresh model's embeddings mean nothing yet; --begin-with zeros$",
        ),
    ],
)
def test_what_cant_be_counted_is_said_at_once(plain, changes, more, message):
    config = counting()
    config.engram = dataclasses.replace(config.engram, **changes)
    call = {"model": str(plain), "corpus": [plain.parent / "corpus"], "output": plain.parent / "out", **more}
    with pytest.raises(CommandError, match=message):
        train_on_corpus(config, counts=True, **call)
    assert not (plain.parent / "out").exists()


def test_no_steps_and_no_counts_are_nothing(plain):
    with pytest.raises(
        CommandError, match=r"^steps = 0, and no rows are counted: nothing would be learned; more --steps$"
    ):
        trained(plain, counting(steps=0))
