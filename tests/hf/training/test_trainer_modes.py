"""The Trainer's ways to train, each against the plain one: mixed precision, checkpointed activations, adapters,
packed documents, TRL; and what reporters get."""

import gc
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import InOrder, arguments, blocks, check_resumes_bit_for_bit, history, table_on_disk, with_memory
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer
from transformers.integrations import TensorBoardCallback

from sense_v2.engram.optim import RowWiseAdagrad, clip_grad_norm_
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.trainer import EngramTrainer, EngramTraining


def trained(folder, *, model=None, kind=EngramTrainer, **changes):
    """A trainer after 6 steps on the tiny model."""
    folder.mkdir(exist_ok=True)
    model = with_memory(folder) if model is None else model
    trainer = kind(model, arguments(folder, warmup_steps=0, **changes), train_dataset=blocks())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """losses, norms, rows of a run with nothing special about it."""
    trainer = trained(tmp_path_factory.mktemp("plain"))
    return history(trainer), history(trainer, "grad_norm"), table_on_disk(trainer.model)


# --- precision ---


def test_bf16_autocast_equals_a_loop_with_torchs_own(tmp_path, plain):
    trainer = trained(
        tmp_path / "ours",
        kind=lambda *args, **kwargs: InOrder(*args, fusion_rate=1.0, **kwargs),
        bf16=True,
        lr_scheduler_type="constant",
        average_tokens_across_devices=False,
    )
    (tmp_path / "theirs").mkdir()
    model = with_memory(tmp_path / "theirs").train()
    storage = memory_of(model).storage
    weights, rows = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), RowWiseAdagrad(storage, lr=0.06)
    losses = []
    for first in range(0, 12, 2):
        chosen = [blocks()[number]["input_ids"] for number in trainer.order[first : first + 2]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.tensor(chosen), labels=torch.tensor(chosen), use_cache=False).loss
        loss.backward()
        assert storage.gradients()[1].dtype == torch.float32
        clip_grad_norm_(model.parameters(), storage, 1.0)
        for optimizer in (weights, rows):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert history(trainer) == pytest.approx(losses, rel=1e-3)
    assert history(trainer) != plain[0]
    np.testing.assert_allclose(table_on_disk(trainer.model), storage.weight.numpy(), atol=2e-3)


class Scaled(EngramTrainer):
    """fp16 with its gradient scaler, as accelerate has it on a GPU only; on a CPU it takes no notice of fp16=True."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_fp16_unscales_the_rows_before_they_are_clipped(tmp_path, optim, max_grad_norm):
    changes = {"optim": optim, "max_grad_norm": max_grad_norm}
    expected = trained(tmp_path / "plain", **changes)
    found = trained(tmp_path / "scaled", kind=Scaled, **changes)
    assert found.accelerator.scaler.get_scale() == 2.0**10
    assert history(found) == pytest.approx(history(expected), rel=1e-3)
    assert history(found) != history(expected)
    # Of gradients that are still scaled it would be a thousand times as much.
    assert history(found, "grad_norm") == pytest.approx(history(expected, "grad_norm"), rel=1e-2)
    np.testing.assert_allclose(table_on_disk(found.model), table_on_disk(expected.model), atol=2e-2)


class Overflows(Scaled):
    """Whose third backward gives the rows, and nothing else, an infinite gradient."""

    num_steps = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.num_steps += 1
        if self.num_steps == 3:
            self.before = table_on_disk(self.model), {n: p.clone() for n, p in self.model.state_dict().items()}
            self.engram.memory.storage.gradients()[1][0, 0] = torch.inf
        elif self.num_steps == 4:
            weights = self.model.state_dict()
            self.skipped = (table_on_disk(self.model) == self.before[0]).all() and all(
                torch.equal(value, weights[name]) for name, value in self.before[1].items()
            )
        return loss


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_whose_rows_overflow_skips_weights_and_rows(tmp_path, optim):
    trainer = trained(tmp_path, kind=Overflows, optim=optim)
    assert trainer.skipped
    assert trainer.accelerator.scaler.get_scale() == 2.0**9
    assert (table_on_disk(trainer.model) != trainer.before[0]).any(), "and went on"


# --- activations ---


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path, plain, use_reentrant):
    trainer = trained(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert trainer.model.is_gradient_checkpointing
    losses, norms, rows = plain
    assert history(trainer) == losses
    assert history(trainer, "grad_norm") == norms
    assert (table_on_disk(trainer.model) == rows).all()


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(tmp_path, plain):
    torch._dynamo.reset()
    trainer = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert history(trainer) == pytest.approx(plain[0], rel=1e-5)
    np.testing.assert_allclose(table_on_disk(trainer.model), plain[2], atol=1e-5)
    torch._dynamo.reset()


# --- adapters ---


def lora(model, targets=("q_proj", "v_proj"), **settings):
    torch.manual_seed(2)
    settings = {"r": 4, "target_modules": targets, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(model, LoraConfig(**settings))


def adapted_after(folder):
    return lora(with_memory(folder))


def attached_after(folder):
    model = lora(tiny_model("llama"))
    torch.manual_seed(1)
    return attach_engram(model, tiny_config(folder), tiny_tokenizer())


@pytest.mark.parametrize("make", [adapted_after, attached_after])
@pytest.mark.parametrize("kind", [EngramTrainer, Trainer])
def test_memory_and_a_lora_train_together(tmp_path, make, kind):
    model = make(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = table_on_disk(model)
    callbacks = [EngramCallback()]
    kind(model, arguments(tmp_path, max_steps=4), train_dataset=blocks(), callbacks=callbacks).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in changed)
    assert any("engram.layers.1.W_v" in name for name in changed)
    assert all("lora_" in name or "engram." in name for name in changed)
    assert (table_on_disk(model) != rows).any()


def test_detaching_from_under_an_adapter(tmp_path):
    model = attached_after(tmp_path)
    names = set(model.state_dict())
    detach_engram(model)
    assert {name for name in names if "engram" not in name} == set(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_run_with_a_lora_resumes_bit_for_bit(tmp_path, monkeypatch):
    check_resumes_bit_for_bit(tmp_path, monkeypatch, lambda folder, **_: adapted_after(folder))


def test_an_adapter_that_reaches_into_the_memory_is_refused(tmp_path):
    model = lora(with_memory(tmp_path), "all-linear")
    with pytest.raises(ValueError, match=r"reaches into the memory \(.*W_k.*exclude_modules"):
        EngramTrainer(model, arguments(tmp_path), train_dataset=blocks())
    del model
    gc.collect()
    kept = lora(with_memory(tmp_path), "all-linear", exclude_modules=r"(.*\.)?engram\..*")
    EngramTrainer(kept, arguments(tmp_path, max_steps=1), train_dataset=blocks()).train()


# --- packed documents ---


def documents():
    """Documents of several lengths, as a packing collator wants them."""
    generator = np.random.default_rng(3)
    return [{"input_ids": generator.integers(3, VOCABULARY, 3 + number % 5).tolist()} for number in range(24)]


class Looking(EngramTraining):
    """Notes the rows that its batches look up, and the documents in each batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        ids, positions = inputs["input_ids"][0], inputs["position_ids"][0]
        starts = [*torch.nonzero(positions == 0)[:, 0].tolist(), len(ids)]
        apart = [ids[a:b] for a, b in itertools.pairwise(starts)]
        self.seen = [*getattr(self, "seen", []), (apart, self.engram.memory.storage.gradients()[0].tolist())]
        return loss


class LookingTrainer(Looking, Trainer):
    pass


def rows_apart(model, apart):
    """Row ids of documents that are looked up one at a time."""
    (layer,) = memory_of(model)
    return sorted({row for document in apart for row in layer.row_ids(document[None]).flatten().tolist()})


def test_flattened_documents_look_up_what_each_would_alone(tmp_path):
    trainer = LookingTrainer(
        with_memory(tmp_path),
        arguments(tmp_path, per_device_train_batch_size=4),
        train_dataset=documents(),
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    assert len(trainer.seen) == 6
    for apart, looked_up in trainer.seen:
        assert len(apart) == 4
        assert looked_up == rows_apart(trainer.model, apart)


def hf_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="<pad>", eos_token="word0")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_trls_trainer_trains_memory(tmp_path, packing):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Both(Looking if packing else EngramTraining, SFTTrainer):
        pass

    words = [{"text": " ".join(f"word{token % 30}" for token in one["input_ids"])} for one in documents()]
    settings = arguments(tmp_path, warmup_steps=0).to_dict()
    kept = ("output_dir", "per_device_train_batch_size", "learning_rate", "max_steps", "logging_steps", "use_cpu")
    config = SFTConfig(
        **{name: settings[name] for name in kept},
        save_strategy="no",
        report_to="none",
        max_length=16,
        packing=packing,
        bf16=False,
        disable_tqdm=True,
    )
    found = []
    for number, kind in enumerate((SFTTrainer, Both)):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = with_memory(folder)
        rows = table_on_disk(model)
        trainer = kind(
            model,
            config,
            train_dataset=Dataset.from_list(words),
            processing_class=hf_tokenizer(),
            callbacks=[EngramCallback()],
        )
        trainer.train()
        assert history(trainer)[-1] < history(trainer)[0]
        assert (table_on_disk(model) != rows).any()
        found.append(trainer)
    assert "engram/gate_layer_1" in found[1].state.log_history[0]
    for apart, looked_up in found[1].seen if packing else ():
        assert len(apart) > 2
        assert looked_up == rows_apart(found[1].model, apart)


# --- what reporters get ---


@pytest.mark.parametrize("kind", [EngramTrainer, Trainer])
def test_tensorboard_gets_gates_and_rows(tmp_path, kind):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A plain Trainer's own reporters come before its callbacks.
    own = kind is EngramTrainer
    settings = arguments(tmp_path, report_to="tensorboard" if own else "none")
    callbacks = [EngramCallback(), *([] if own else [TensorBoardCallback()])]
    trainer = kind(with_memory(tmp_path), settings, train_dataset=blocks(), callbacks=callbacks)
    names = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    assert len(names) == len(set(names)) > 3
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    for name in ("engram/gate_layer_1", "engram/rows_touched", "engram/row_learning_rate"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(step + 1, pytest.approx(value)) for step, value in enumerate(history(trainer, name))]
    assert all(0 < value < 1 for value in history(trainer, "engram/gate_layer_1"))


def test_rows_touched_are_those_of_the_batch(tmp_path):
    model = with_memory(tmp_path)
    trainer = InOrder(model, arguments(tmp_path), train_dataset=blocks())
    trainer.train()
    (layer,) = memory_of(model)
    for step, touched in enumerate(history(trainer, "engram/rows_touched")):
        chosen = [blocks()[number]["input_ids"] for number in trainer.order[2 * step : 2 * step + 2]]
        assert touched == len(layer.row_ids(torch.tensor(chosen)).unique())
    rates = history(trainer, "engram/row_learning_rate")
    assert rates == pytest.approx([20 * rate for rate in history(trainer, "learning_rate")])
