"""EngramTrainer and EngramCallback: against a loop of its own with the table in an nn.Embedding, checkpoints that
continue bit for bit, and what is refused."""

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.trainer import EngramTrainer

RATE = 3e-3


def with_memory(folder, *, model="llama", dropout=0.0, **changes):
    torch.manual_seed(1)
    extra = {"attention_dropout": dropout} if dropout else {}
    return attach_engram(tiny_model(model, **extra), tiny_config(folder, **changes), tiny_tokenizer())


def blocks(count=24, length=12, seed=0) -> list[dict[str, list[int]]]:
    """A stretch of random tokens again and again, cut into blocks: an n-gram decides what follows."""
    stream = np.tile(np.random.default_rng(seed).integers(3, VOCABULARY, 40), count)[: count * length]
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in stream.reshape(count, length)]


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "max_steps": 6,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**settings, **changes})


def history(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def table_on_disk(model) -> np.ndarray:
    storage = memory_of(model).storage
    return np.fromfile(storage.path, dtype="<f4").reshape(-1, storage.embedding_dim)


def state_on_disk(model, name="adagrad") -> np.ndarray:
    path = memory_of(model).storage.path
    return np.fromfile(path.with_name(f"{path.stem}.{name}.dat"), dtype="<f4")


# --- the same as with the table in memory ---


class ResidentTable(nn.Module):
    """What a fusion layer asks of its storage, from an ordinary embedding."""

    reads_the_disk = False

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.from_numpy(rows.copy()), freeze=False)
        self.embedding_dim, self.dtype, self.rows_require_grad = rows.shape[1], torch.float32, True
        self.met: set[int] = set()

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        self.met.update(row_ids.flatten().tolist())
        return self.embedding(row_ids)


def oracle(folder, *, accumulation, max_norm, row_optimizer, fusion_rate, row_rate, decay, order, steps=6):
    """losses, norms, model and rows of a plain loop: nn.Embedding, torch.optim.AdamW, and Adagrad or SparseAdam."""
    model = with_memory(folder)
    table = ResidentTable(table_on_disk(model))
    for layer in memory_of(model):
        layer.storage = table
    weight = table.embedding.weight
    named = {name: p for name, p in model.named_parameters() if p is not weight}
    fusion = [p for name, p in named.items() if "engram" in name]
    matrices = [p for name, p in named.items() if "engram" not in name and "norm" not in name]
    others = [p for name, p in named.items() if "engram" not in name and "norm" in name]
    weights = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
            {"params": fusion, "weight_decay": 0.0, "lr": RATE * fusion_rate},
        ],
        lr=RATE,
    )
    sums = torch.zeros(len(weight), 1)
    averages, squares = torch.zeros_like(weight), torch.zeros_like(weight)
    data, at = [torch.tensor(block["input_ids"]) for block in blocks()], 0
    losses, norms = [], []
    model.train()
    for step in range(steps):
        factor = (
            step / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / (steps - 2)))
        )  # warm-up over 2 steps from 0, then a cosine to 0
        batches = [torch.stack([data[order[at + 2 * i]], data[order[at + 2 * i + 1]]]) for i in range(accumulation)]
        at += 2 * accumulation
        count = sum(batch[:, 1:].numel() for batch in batches)
        total = 0.0
        weights.zero_grad()
        weight.grad = None
        for batch in batches:
            logits = model(input_ids=batch, use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / count).backward()
            total += loss.item() / count
        gradients = [p.grad for p in named.values() if p.grad is not None] + [weight.grad]
        norm = torch.sqrt(sum(g.double().square().sum() for g in gradients))
        if max_norm:
            for gradient in gradients:
                gradient.mul_(min(1.0, max_norm / (norm.item() + 1e-6)))
        for group, rate in zip(weights.param_groups, (1, 1, fusion_rate), strict=True):
            group["lr"] = RATE * rate * factor
        # Looked up: a sequence's last position gets no gradient, which moments notice, as in SparseAdam.
        met = torch.zeros(len(weight), 1)
        met[sorted(table.met)] = 1
        table.met.clear()
        with torch.no_grad():
            gradient, rate = weight.grad, RATE * factor * row_rate
            if row_optimizer == "adagrad":
                sums += gradient.square().mean(dim=1, keepdim=True)
                weight -= met * rate * gradient / (sums.sqrt() + 1e-10)
            else:  # Adam whose moments stay where a row isn't met
                averages += met * 0.1 * (gradient - averages)
                squares += met * 0.001 * (gradient.square() - squares)
                size = rate * np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                weight -= met * size * averages / (squares.sqrt() + 1e-8)
        weights.step()
        losses.append(total)
        norms.append(norm.item())
    return losses, norms, model, weight.detach().numpy()


class InOrder(EngramTrainer):
    """Keeps the order of its samples for the oracle."""

    order: list[int]

    def _get_train_sampler(self, *args):
        sampler = super()._get_train_sampler(*args)
        seen = self.order = []

        class Noting:
            def __iter__(self):
                for number in sampler:
                    seen.append(number)
                    yield number

            def __len__(self):
                return len(sampler)

        return Noting()


@pytest.mark.parametrize("row_optimizer", ["adagrad", "adam"])
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, 0.5), (2, 0.3), (2, 0.0)])
def test_training_equals_a_loop_with_a_resident_embedding(tmp_path, row_optimizer, accumulation, max_norm):
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    model = with_memory(tmp_path / "ours")
    before = table_on_disk(model)
    settings = {"fusion_rate": 2.0, "row_rate": 10.0}
    trainer = InOrder(
        model,
        arguments(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=max_norm, weight_decay=0.1),
        train_dataset=blocks(),
        fusion_rate=settings["fusion_rate"],
        callbacks=[EngramCallback(row_rate=settings["row_rate"], row_optimizer=row_optimizer)],
    )
    trainer.train()
    losses, norms, expected, rows = oracle(
        tmp_path / "theirs",
        accumulation=accumulation,
        max_norm=max_norm,
        row_optimizer=row_optimizer,
        decay=0.1,
        order=trainer.order,
        **settings,
    )
    assert history(trainer) == pytest.approx(losses, rel=2e-4)
    assert history(trainer, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert not max_norm or max(norms) > max_norm, "nothing was clipped"
    found = table_on_disk(model)
    np.testing.assert_allclose(found, rows, atol=3e-5)
    assert (found != before).any(axis=1).sum() > 50
    weights = expected.state_dict()
    for name, value in model.state_dict().items():
        if name == "engram._extra_state":  # of the rows, which were compared
            continue
        torch.testing.assert_close(value, weights[name], atol=3e-5, rtol=1e-3)


def test_the_plain_trainer_with_the_callback_does_the_same(tmp_path):
    """With every weight at the base rate, as a plain Trainer has it."""
    results = []
    for kind, extra in ((Trainer, {}), (EngramTrainer, {"fusion_rate": 1.0})):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        model = with_memory(folder)
        callback = EngramCallback(row_rate=10.0)
        trainer = kind(
            model,
            arguments(folder, gradient_accumulation_steps=2, max_grad_norm=0.3, max_steps=4),
            train_dataset=blocks(),
            callbacks=[callback],
            **extra,
        )
        trainer.train()
        results.append((history(trainer), history(trainer, "grad_norm"), table_on_disk(model), model.state_dict()))
        assert "engram/rows_touched" in trainer.state.log_history[0]
    (plain, norms, rows, weights), (losses, engram_norms, engram_rows, engram_weights) = results
    assert plain == losses
    assert norms == engram_norms
    assert (rows == engram_rows).all()
    assert all(torch.equal(value, engram_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("train_backbone", [True, False])
def test_what_trains_is_a_choice(tmp_path, train_backbone):
    model = with_memory(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = table_on_disk(model)
    EngramTrainer(
        model,
        arguments(tmp_path, max_steps=4, warmup_steps=0),
        train_dataset=blocks(),
        callbacks=[EngramCallback(train_backbone=train_backbone)],
    ).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed >= {"engram.layers.1.W_v.weight", "engram.layers.1.conv.weight"}
    assert ("model.embed_tokens.weight" in changed) is train_backbone
    assert train_backbone or all(name.startswith("engram.") for name in changed)
    assert (table_on_disk(model) != rows).any()


def test_frozen_rows_stay(tmp_path):
    model = with_memory(tmp_path)
    memory_of(model).storage.requires_grad_(False)
    rows = table_on_disk(model)
    EngramTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=blocks()).train()
    assert (table_on_disk(model) == rows).all()


def test_an_optimizer_of_ones_own_gets_the_rows(tmp_path):
    model = with_memory(tmp_path)
    rows = table_on_disk(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=blocks(),
        callbacks=[EngramCallback()],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert (table_on_disk(model) != rows).any()


# --- checkpoints ---


def run(folder, *, dropout=0.1, callback=None, stop_at=None, resume=None, kind=EngramTrainer, data=None, **changes):
    """A Trainer's run of 8 steps, checkpoints every 2, in which order and dropout are random."""
    gc.collect()  # a run that crashed has let go of the table by then
    model = with_memory(folder, dropout=dropout)
    trainer = kind(
        model,
        arguments(
            folder,
            **{
                "max_steps": 8,
                "save_strategy": "steps",
                "save_steps": 2,
                "gradient_accumulation_steps": 2,
                **changes,
            },
        ),
        train_dataset=data or blocks(),
        eval_dataset=data if isinstance(data, EvalToo) else None,
        callbacks=[callback or EngramCallback(row_optimizer="adam")],
    )
    if stop_at is not None:
        trainer.add_callback(StopAt(stop_at))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    """Ends training as a crash would: what isn't committed is lost."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def crashed(folder, step, **changes):
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop_at=step, **changes)


def outcome(trainer):
    model = trainer.model
    state = trainer.optimizer.state_dict()["state"]
    return {
        "losses": history(trainer),
        "norms": history(trainer, "grad_norm"),
        "touched": history(trainer, "engram/rows_touched"),
        "gates": history(trainer, "engram/gate_layer_1"),
        "rows": table_on_disk(model).tobytes(),
        "moments": state_on_disk(model, "adam").tobytes(),
        "step": memory_of(model).storage.open_state("adam", 2 * 8).step,
        "updates": memory_of(model).storage.updates,
        "weights": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "optimizer": {
            number: {name: value.numpy().tobytes() for name, value in one.items()} for number, one in state.items()
        },
    }


def check_resumes_bit_for_bit(folder, monkeypatch, attached):
    """A run of what `attached(folder, …)` gives, cut off and resumed, ends as an undisturbed one."""
    monkeypatch.setattr("test_trainer.with_memory", attached)
    for name in ("whole", "cut"):
        (folder / name).mkdir()
    expected = outcome(run(folder / "whole"))
    crashed(folder / "cut", 5)
    assert outcome(run(folder / "cut", resume=True)) == expected


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return outcome(run(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, undisturbed, resume):
    crashed(tmp_path, 5)
    checkpoint = resume if resume is True else str(tmp_path / "run" / resume)
    trainer = run(tmp_path, resume=checkpoint)
    assert outcome(trainer) == undisturbed
    assert len(undisturbed["losses"]) == 8


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_a_plain_trainer_resumes_bit_for_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    expected = outcome(run(tmp_path / "whole", kind=Trainer))
    crashed(tmp_path / "cut", 5, kind=Trainer)
    assert outcome(run(tmp_path / "cut", kind=Trainer, resume=True)) == expected


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_rows_that_changed_later_do_not_leak_into_an_older_checkpoint(tmp_path):
    trainer = run(tmp_path)
    later = table_on_disk(trainer.model)
    copy = tmp_path / "run" / "checkpoint-2" / "engram" / "engram_table.dat"
    assert (np.fromfile(copy, dtype="<f4").reshape(later.shape) != later).any()
    assert json.loads(copy.with_suffix(".json").read_text())["step"] == 2


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
def test_by_reference_the_last_checkpoint_resumes_and_an_older_one_is_refused(tmp_path, undisturbed):
    def by_reference():
        return EngramCallback(row_optimizer="adam", checkpoints="reference", commit_steps=1)

    crashed(tmp_path, 5, callback=by_reference())
    assert not list((tmp_path / "run").glob("checkpoint-*/engram/*.dat"))
    with pytest.raises(ValueError, match=r"as committed at step 2.* has gone on since then \(step 4\)"):
        run(tmp_path, callback=by_reference(), resume=str(tmp_path / "run" / "checkpoint-2"))
    assert outcome(run(tmp_path, callback=by_reference(), resume=True)) == undisturbed


def test_the_best_model_comes_back_with_its_rows(tmp_path):
    trainer = run(
        tmp_path,
        dropout=0.0,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the other way round, so that it isn't the last
        max_steps=6,
        data=EvalToo(blocks()),
    )
    losses = history(trainer, "eval_loss")
    best = int(np.argmax(losses))
    assert best != len(losses) - 1, losses
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{2 * (best + 1)}")
    copy = tmp_path / "run" / f"checkpoint-{2 * (best + 1)}" / "engram" / "engram_table.dat"
    assert copy.read_bytes() == memory_of(trainer.model).storage.path.read_bytes()
    assert trainer.evaluate()["eval_loss"] == losses[best]


class EvalToo(list):
    """Training blocks that a run evaluates on as well."""


def test_a_checkpoint_without_memory_is_refused_by_name(tmp_path):
    run(tmp_path, max_steps=2)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2" / "engram")
    with pytest.raises(FileNotFoundError, match="without an EngramCallback, or saving was cut off"):
        run(tmp_path, max_steps=4, resume=True)


def test_a_checkpoint_is_a_model_that_loads(tmp_path):
    trainer = run(tmp_path, max_steps=2, dropout=0.0)
    tokens = torch.tensor([blocks()[0]["input_ids"]])
    with torch.no_grad():
        expected = trainer.model.eval()(tokens, use_cache=False).logits
        found = from_pretrained(tmp_path / "run" / "checkpoint-2", mode="r")(tokens, use_cache=False).logits
    assert torch.equal(found, expected)


def test_another_folder_than_the_trainers_is_noticed(tmp_path):
    run(tmp_path, max_steps=2, kind=Trainer)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run" / "checkpoint-2", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="resumed from another folder"):
        run(tmp_path, max_steps=4, kind=Trainer, resume=str(other))
    callback = EngramCallback(row_optimizer="adam", resume_from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere isn't there"):
        run(tmp_path, max_steps=4, kind=Trainer, callback=callback, resume=str(tmp_path / "run" / "checkpoint-2"))


# --- what is refused ---


def test_settings_that_make_no_sense_are_named():
    for settings, message in (
        ({"row_optimizer": "sgd"}, "row_optimizer = 'sgd'"),
        ({"checkpoints": "link"}, "checkpoints = 'link'"),
        ({"durability": "no"}, "durability = 'no'"),
        ({"row_rate": -1.0}, "row_rate = -1.0"),
        ({"row_rate": float("nan")}, "row_rate = nan"),
        ({"commit_steps": -1}, "commit_steps = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            EngramCallback(**settings)


def test_a_model_without_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no memory attached"):
        EngramTrainer(tiny_model("llama"), arguments(tmp_path), train_dataset=blocks())


def test_a_table_open_to_read_is_refused(tmp_path):
    detach_engram(with_memory(tmp_path))
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), mode="r")
    with pytest.raises(ValueError, match="open read-only"):
        EngramTrainer(model, arguments(tmp_path), train_dataset=blocks())


def test_a_plain_trainer_in_several_processes_is_refused(tmp_path):
    callback = EngramCallback()
    trainer = Trainer(with_memory(tmp_path), arguments(tmp_path), train_dataset=blocks(), callbacks=[callback])
    callback._num_ranks = 2
    with pytest.raises(ValueError, match="use EngramTrainer, or put EngramTraining before your Trainer's class"):
        trainer.train()


def test_the_best_model_by_reference_is_refused(tmp_path):
    changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(ValueError, match="goes back to earlier rows"):
        EngramTrainer(
            with_memory(tmp_path),
            arguments(tmp_path, **changes),
            train_dataset=blocks(),
            eval_dataset=blocks(),
            callbacks=[EngramCallback(checkpoints="reference")],
        )


def test_a_gradient_that_is_no_number_does_not_reach_the_table(tmp_path):
    model = with_memory(tmp_path)
    before = table_on_disk(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="isn't finite at step 1; the rows are those of step 0"):
        EngramTrainer(model, arguments(tmp_path), train_dataset=blocks()).train()
    assert (table_on_disk(model) == before).all()


def test_the_model_is_left_as_it_was(tmp_path):
    model = with_memory(tmp_path)
    names = set(model.state_dict())
    trainer = EngramTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=blocks())
    trainer.train()
    assert set(model.state_dict()) == names
    assert memory_of(model).storage.gradients() is None
    trainer.train()  # and can be trained again
    assert not any(layer.gate._forward_hooks for layer in memory_of(model))


@pytest.mark.parametrize("kind", [EngramTrainer, Trainer])
def test_a_second_training_in_one_process_opens_the_table_that_the_first_let_go(tmp_path, kind):
    def train():
        model = with_memory(tmp_path)
        callbacks = [EngramCallback()] if kind is Trainer else []
        trainer = kind(model, arguments(tmp_path, max_steps=1), train_dataset=blocks(), callbacks=callbacks)
        trainer.train()
        return trainer

    gc.disable()  # so that the collector comes by when it is called, and not by chance
    try:
        trainer = train()
        with pytest.raises(BlockingIOError, match=r"close\(\) it first \(a model has it as model\.engram\.storage\)"):
            with_memory(tmp_path)
        del trainer
        train()
    finally:
        gc.enable()
