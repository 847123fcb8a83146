"""`fit`: against a loop with a resident nn.Embedding, what it must leave alone, and how it ends."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer
from torch import nn
from transformers import TrainerCallback

from sense_v2.core.config import TrainConfig
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.data.corpus import Batches
from sense_v2.hf.experiments.controls import freeze_rows
from sense_v2.hf.insight.evaluation import Evaluation
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training import fit as fit_module
from sense_v2.hf.training.fit import History, fit, rate_factor, row_rate_factor


def settings(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "batch_size": 2, "sequence_length": 12, "warmup_steps": 2, **changes})


def repeating(period=40, repeats=12, seed=0) -> np.ndarray:
    """A stretch of random tokens, again and again: an n-gram decides what follows."""
    generator = np.random.default_rng(seed)
    return np.tile(generator.integers(3, VOCABULARY, period), repeats)


def make_batches(config: TrainConfig, **corpus) -> Batches:
    return Batches(
        repeating(**corpus),
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )


def with_memory(folder, *, model="llama", **changes):
    torch.manual_seed(1)
    return attach_engram(tiny_model(model), tiny_config(folder, **changes), tiny_tokenizer())


def table_bytes(model) -> bytes:
    return memory_of(model).storage.path.read_bytes()


def weights_of(model) -> dict[str, torch.Tensor]:
    """Without the checksum of the rows, which aren't weights."""
    return {name: value.clone() for name, value in model.state_dict().items() if name != "engram._extra_state"}


def same(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the weights that are bit for bit what they were."""
    return {name for name, value in weights_of(model).items() if torch.equal(value, before[name])}


# --- the schedule ---


def test_the_schedule_at_its_corners():
    rates = [rate_factor(step, warmup_steps=4, steps=11) for step in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "rates"),
    [
        (0, 1, [1.0]),
        (0, 2, [1.0, 0.1]),
        (1, 1, [0.5]),
        (1, 2, [0.5, 1.0]),
        (2, 2, [1 / 3, 2 / 3]),
        (9, 3, [0.1, 0.2, 0.3]),
    ],
)
def test_the_schedule_of_short_runs(warmup_steps, steps, rates):
    found = [rate_factor(step, warmup_steps=warmup_steps, steps=steps) for step in range(steps)]
    assert found == pytest.approx(rates)


def test_the_schedule_past_its_end_stays_at_a_tenth():
    assert rate_factor(50, warmup_steps=2, steps=10) == pytest.approx(0.1)


# --- the same as with the table in memory ---


class ResidentTable(nn.Module):
    """What a fusion layer asks of its storage, from an ordinary embedding."""

    def __init__(self, path, width: int, sparse: bool) -> None:
        super().__init__()
        rows = torch.from_numpy(np.fromfile(path, dtype="<f4").reshape(-1, width))
        self.embedding = nn.Embedding(*rows.shape, sparse=sparse)
        with torch.no_grad():
            self.embedding.weight.copy_(rows)
        self.embedding_dim, self.dtype, self.rows_require_grad = width, torch.float32, True

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(row_ids)


def resident_run(folder, config: TrainConfig, batches, initial, *, sparse: bool, **memory):
    """losses, norms, model, rows of a loop of its own over the same model, its rows in an nn.Embedding."""
    model = with_memory(folder, **memory)
    model.load_state_dict(initial)
    storage = memory_of(model).storage
    table = ResidentTable(storage.path, storage.embedding_dim, sparse)
    for layer in memory_of(model):
        layer.storage = table
    rows = table.embedding.weight
    dense = {name: p for name, p in model.named_parameters() if p is not rows}
    backbone_matrices = [p for name, p in dense.items() if "engram" not in name and "norm" not in name]
    norms_and_biases = [p for name, p in dense.items() if "engram" not in name and "norm" in name]
    fusion = [p for name, p in dense.items() if "engram" in name]
    weights = torch.optim.AdamW(
        [
            {"params": backbone_matrices, "weight_decay": config.weight_decay},
            {"params": norms_and_biases, "weight_decay": 0.0},
            {"params": fusion, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.99),
    )
    adam = torch.optim.SparseAdam([rows], lr=config.row_learning_rate) if sparse else None
    sums = torch.zeros(len(rows), 1)
    losses, norms = [], []
    model.train()
    for number, token_ids_BT in zip(range(config.steps), batches, strict=False):
        if number < config.warmup_steps:
            factor = row_factor = (number + 1) / (config.warmup_steps + 1)
        else:
            row_factor = 1.0
            angle = math.pi * (number - config.warmup_steps) / (config.steps - config.warmup_steps - 1)
            factor = 0.55 + 0.45 * math.cos(angle)
        logits = model(input_ids=token_ids_BT, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), token_ids_BT[:, 1:].reshape(-1))
        weights.zero_grad()
        rows.grad = None
        loss.backward()
        row_gradient = rows.grad.coalesce() if sparse else rows.grad
        row_values = row_gradient.values() if sparse else row_gradient
        squares = sum(float(p.grad.double().square().sum()) for p in dense.values())
        norm = math.sqrt(squares + float(row_values.double().square().sum()))
        scale = min(1.0, config.max_grad_norm / norm)
        for p in dense.values():
            p.grad.mul_(scale)
        for group in weights.param_groups:
            group["lr"] = config.learning_rate * factor
        weights.param_groups[-1]["lr"] = config.fusion_learning_rate * factor
        weights.step()
        if adam is not None:
            rows.grad = row_gradient * scale
            adam.param_groups[0]["lr"] = config.row_learning_rate * row_factor
            adam.step()
        else:
            with torch.no_grad():
                gradient = row_gradient * scale
                sums += gradient.square().mean(1, keepdim=True)
                rows -= config.row_learning_rate * row_factor * gradient / (sums.sqrt() + 1e-10)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, model, rows.detach().numpy()


@pytest.mark.parametrize("row_optimizer", ["adam", "adagrad"])
def test_equal_to_a_loop_with_the_rows_in_an_embedding(tmp_path, row_optimizer):
    """Clipping bites in every step, and the rows' share of the norm decides how hard."""
    config = settings(steps=10, max_grad_norm=0.7, row_optimizer=row_optimizer, row_learning_rate=0.03)
    memory = {"layer_indices": [0, 2]}
    model = with_memory(tmp_path / "mapped", **memory)
    with torch.no_grad():
        for layer in memory_of(model):
            layer.W_v.weight.normal_(0, 2.0, generator=torch.Generator().manual_seed(layer.layer_id))
    losses, norms, resident, rows = resident_run(
        tmp_path / "resident",
        config,
        make_batches(config),
        weights_of(model),
        sparse=row_optimizer == "adam",
        **memory,
    )
    history = fit(model, make_batches(config), config)
    assert history.train_loss == pytest.approx(losses, abs=1e-5)
    assert min(norms) > config.max_grad_norm
    np.testing.assert_allclose(memory_of(model).storage.mmap, rows, atol=1e-5)
    expected = resident.state_dict()
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0)


def watched(monkeypatch, **events):
    """Calls `events` when the Trainer that `fit` makes has the event of that name."""
    added = type("Watching", (TrainerCallback,), {name: staticmethod(call) for name, call in events.items()})
    init = fit_module.EngramTrainer.__init__

    def watching_init(trainer, *args, **kwargs):
        init(trainer, *args, **kwargs)
        trainer.add_callback(added())

    monkeypatch.setattr(fit_module.EngramTrainer, "__init__", watching_init)


def groups_of(model, config, monkeypatch) -> dict[str, dict]:
    """The optimizer's groups of one step of `fit`, by each parameter's name."""
    found = {}

    def look(args, state, control, model=None, optimizer=None, **_):
        names = {parameter: name for name, parameter in model.named_parameters()}
        found.update({names[p]: dict(group) for group in optimizer.param_groups for p in group["params"]})

    watched(monkeypatch, on_pre_optimizer_step=look)
    fit(model, make_batches(config), config)
    return found


def test_weights_and_rows_are_clipped_to_one_norm(tmp_path, monkeypatch):
    config = settings(steps=1, max_grad_norm=1e-3)
    model = with_memory(tmp_path)
    with torch.no_grad():
        memory_of(model).layers["1"].W_v.weight.normal_(0, 3.0, generator=torch.Generator().manual_seed(0))
    squares = {}

    def measure(*_, **__) -> None:
        squares["rows"] = float(memory_of(model).storage.gradients()[1].square().sum())
        squares["weights"] = sum(
            float(p.grad.square().sum())
            for name, p in model.named_parameters()
            if p.grad is not None and name != "engram.rows.gradients"
        )

    watched(monkeypatch, on_pre_optimizer_step=measure)
    fit(model, make_batches(config), config)
    assert math.sqrt(squares["rows"] + squares["weights"]) == pytest.approx(1e-3, rel=1e-2)
    assert squares["rows"] > 0.1 * squares["weights"]


# --- it learns, the same way each time ---


@pytest.mark.parametrize("row_optimizer", ["adam", "adagrad"])
def test_the_loss_falls(tmp_path, row_optimizer):
    config = settings(steps=40, learning_rate=5e-3, row_optimizer=row_optimizer)
    model = with_memory(tmp_path)
    before = np.array(memory_of(model).storage.mmap)
    history = fit(model, make_batches(config), config)
    assert history.train_loss[-1] < 0.5 * history.train_loss[0]
    moved = (memory_of(model).storage.mmap != before).any(axis=1)
    assert 50 < moved.sum() < 400  # the rows of the few n-grams there are, of 1,500
    assert (tmp_path / f"engram_table.{row_optimizer}.dat").exists()


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = settings(seed=seed)
        model = with_memory(tmp_path / name)
        history = fit(model, make_batches(config), config)
        runs.append((history.train_loss, table_bytes(model), weights_of(model)))
        assert history.steps == list(range(1, 7))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(runs[0][2][name], runs[1][2][name]) for name in runs[0][2])
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] != runs[2][1]


def test_fresh_memory_begins_with_the_plain_models_loss(tmp_path):
    config = settings()
    plain = fit(tiny_model("llama"), make_batches(config), config).train_loss
    remembering = fit(with_memory(tmp_path), make_batches(config), config).train_loss
    assert remembering[0] == plain[0]
    assert remembering[2] != plain[2]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_other_models_train(tmp_path, name):
    config = settings(steps=20, learning_rate=5e-3)
    model = with_memory(tmp_path, model=name, causal=name != "bert")
    history = fit(model, make_batches(config), config)
    assert np.mean(history.train_loss[-3:]) < 0.9 * np.mean(history.train_loss[:3])


def test_a_backbone_of_bfloat16_trains(tmp_path):
    config = settings(steps=20, learning_rate=5e-3)
    torch.manual_seed(1)
    model = attach_engram(tiny_model("llama").bfloat16(), tiny_config(tmp_path), tiny_tokenizer())
    history = fit(model, make_batches(config), config)
    assert history.train_loss[-1] < 0.9 * history.train_loss[0]


# --- what is trained ---


def test_decay_is_on_the_backbones_matrices_only(tmp_path, monkeypatch):
    model = with_memory(tmp_path)
    names = {name for name, _ in model.named_parameters()}
    found = groups_of(model, settings(weight_decay=0.3), monkeypatch)
    rows = found.pop("engram.rows.gradients")
    assert set(found) == names
    matrices = ("proj.weight", "embed_tokens.weight", "lm_head.weight")
    decayed = {name for name, group in found.items() if group["weight_decay"] == 0.3}
    assert decayed == {name for name in names if name.endswith(matrices)}
    assert {group["weight_decay"] for name, group in found.items() if name not in decayed} == {0.0}
    assert not any(name.startswith("engram.") for name in decayed)
    rates = {name: group["initial_lr"] for name, group in found.items()}
    assert {rate for name, rate in rates.items() if name.startswith("engram.")} == {1e-2}
    assert {rate for name, rate in rates.items() if not name.startswith("engram.")} == {3e-3}
    assert rows["weight_decay"] == 0.0
    assert all(group["betas"] == (0.9, 0.99) for group in found.values())


def test_w_v_in_front_of_rows_of_zeros_has_a_rate_of_its_own(tmp_path, monkeypatch):
    model = with_memory(tmp_path, init_std=0.0)
    rates = {name: group["initial_lr"] for name, group in groups_of(model, settings(), monkeypatch).items()}
    assert rates.pop("engram.layers.1.W_v.weight") == 1e-3
    del rates["engram.rows.gradients"]
    assert {rate for name, rate in rates.items() if name.startswith("engram.")} == {1e-2}
    # Decided by how the table began, not by what it holds now: a run that goes on has the rates that it had.
    assert not memory_of(model).storage.is_new
    assert groups_of(model, settings(), monkeypatch)["engram.layers.1.W_v.weight"]["initial_lr"] == 1e-3


def test_the_rows_get_their_own_rate_at_each_step(tmp_path, monkeypatch):
    rates = []

    def note(args, state, control, logs=None, **_):
        if "loss" in logs:
            rates.append(logs["engram/row_learning_rate"])

    watched(monkeypatch, on_log=note)
    fit(with_memory(tmp_path), make_batches(settings()), settings(warmup_steps=2, row_learning_rate=0.3))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])


def test_any_schedule_of_the_trainers_can_be_chosen(tmp_path, monkeypatch):
    rates = []
    watched(monkeypatch, on_log=lambda args, state, control, logs=None, **_: rates.append(logs.get("learning_rate")))
    fit(
        with_memory(tmp_path),
        make_batches(settings()),
        settings(warmup_steps=0),
        trainer={"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "bf16": True},
    )
    assert rates[:6] == pytest.approx([3e-3] * 6)


def test_a_batch_in_parts_is_the_same_step(tmp_path):
    histories = [
        fit(with_memory(tmp_path / str(parts)), make_batches(settings()), settings(), trainer=trainer)
        for parts, trainer in ((1, {}), (2, {"gradient_accumulation_steps": 2}))
    ]
    assert histories[0].train_loss == pytest.approx(histories[1].train_loss, rel=1e-4)
    assert histories[0].steps == histories[1].steps == list(range(1, 7))


def test_the_rows_rate_warms_up_and_stays():
    rates = [row_rate_factor(step, warmup_steps=4, steps=11) for step in range(11)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 7])


def test_rows_that_are_not_met_stay_whatever_the_decay(tmp_path):
    config = settings(weight_decay=0.9, steps=8)
    model = with_memory(tmp_path)
    batches = make_batches(config)
    before = np.array(memory_of(model).storage.mmap)
    met = set()
    for token_ids_BT, _ in zip(batches, range(config.steps), strict=False):
        met |= set(memory_of(model).layers["1"].row_ids(token_ids_BT).flatten().tolist())
    fit(model, batches, config)
    moved = set(np.flatnonzero((memory_of(model).storage.mmap != before).any(axis=1)).tolist())
    assert moved <= met
    assert len(moved) > 0.9 * len(met)


def test_without_the_backbone_only_memory_learns(tmp_path):
    config = settings(train_backbone=False, steps=60, learning_rate=1e-2)
    model = with_memory(tmp_path)
    before, rows = weights_of(model), table_bytes(model)
    backbone = {name for name in before if not name.startswith("engram.")}
    asked = []  # for a gradient, which would cost time and count in the norm
    model.register_forward_pre_hook(
        lambda *_: asked.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    )
    history = fit(model, make_batches(config), config)
    assert all(names.isdisjoint(backbone) and len(names - {"engram.rows.gradients"}) == 7 for names in asked)
    assert same(before, model) & set(before) == backbone
    assert table_bytes(model) != rows
    assert history.train_loss[-1] < 0.9 * history.train_loss[0]
    # And the backbone isn't left frozen for what comes after.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_weight_that_the_user_froze_stays(tmp_path):
    model = with_memory(tmp_path)
    frozen = ["engram.layers.1.W_k.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = weights_of(model)
    fit(model, make_batches(settings()), settings())
    assert same(before, model) == set(frozen)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(frozen)


def test_frozen_rows_stay_byte_identical(tmp_path):
    model = with_memory(tmp_path)
    freeze_rows(memory_of(model))
    before, rows = weights_of(model), table_bytes(model)
    fit(model, make_batches(settings()), settings())
    assert table_bytes(model) == rows
    assert not list(tmp_path.glob("*.ada*.dat"))
    assert "engram.layers.1.W_v.weight" not in same(before, model)


def test_rows_alone_can_learn(tmp_path):
    model = with_memory(tmp_path)
    with torch.no_grad():
        memory_of(model).layers["1"].W_v.weight.normal_(0, 0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, rows = weights_of(model), table_bytes(model)
    fit(model, make_batches(settings()), settings())
    assert same(before, model) == set(before)
    assert table_bytes(model) != rows


def test_nothing_to_train_is_an_error(tmp_path):
    config = settings(train_backbone=False)
    with pytest.raises(ValueError, match=r"train_backbone is False.*no memory is attached"):
        fit(tiny_model("llama"), make_batches(config), config)
    model = with_memory(tmp_path)
    freeze_rows(memory_of(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train, .* its memory is frozen"):
        fit(model, make_batches(config), settings())


def test_gradients_from_before_reach_no_update(tmp_path):
    losses = []
    for name, stale in (("clean", False), ("stale", True)):
        model = with_memory(tmp_path / name, init_std=0.5)
        with torch.no_grad():
            memory_of(model).layers["1"].W_v.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        if stale:
            ids = torch.arange(3, 15)[None]
            (1000 * model.train()(input_ids=ids, labels=ids, use_cache=False).loss).backward()
        losses.append(fit(model, make_batches(settings()), settings()).train_loss)
        assert memory_of(model).storage.gradients() is None
    assert losses[0] == losses[1]


# --- loss or gradient that isn't finite ---


def poison(model, what: str) -> None:
    if what == "loss":
        with torch.no_grad():
            model.lm_head.weight[5, 0] = math.nan
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("attached", [True, False])
def test_what_is_not_finite_reaches_neither_weights_nor_rows(tmp_path, what, attached):
    model = with_memory(tmp_path) if attached else tiny_model("llama")
    state = {}

    def after(history: History) -> None:
        if history.steps[-1] == 3:
            poison(model, what)
            state.update(weights=weights_of(model), files={p: p.read_bytes() for p in tmp_path.iterdir()})

    message = (
        rf"the {what}.* is (nan|inf) at step 4: the weights and rows are those of step 3; "
        "lower learning_rate or row_learning_rate"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(model, make_batches(settings()), settings(), on_step=after)
    for name, value in weights_of(model).items():
        assert torch.equal(value.nan_to_num(), state["weights"][name].nan_to_num()), name
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == state["files"]
    assert all(parameter.grad is None for parameter in model.parameters())
    if attached:
        assert memory_of(model).storage.gradients() is None


def test_a_model_that_begins_broken_is_told_so():
    model = tiny_model("llama")
    poison(model, "loss")
    with pytest.raises(FloatingPointError, match=r"nan at step 1: nothing was updated yet.*began with"):
        fit(model, make_batches(settings()), settings())


# --- steps, evaluations, stops ---


def count_events(model, config: TrainConfig, **arguments) -> list[str]:
    events: list[str] = []

    def evaluate(model) -> Evaluation:
        events.append("evaluate")
        model.eval()  # what a callable leaves behind must not turn training off
        return Evaluation(2.0, 10, 0)

    def on_step(history: History) -> None:
        events.append(f"step {history.steps[-1]}")
        assert model.training

    fit(model, make_batches(config), config, evaluate=evaluate, on_step=on_step, **arguments)
    return events


@pytest.mark.parametrize(
    ("eval_every", "steps", "evaluated"),
    [(3, 8, [3, 6, 8]), (4, 8, [4, 8]), (0, 3, [3]), (1, 2, [1, 2]), (9, 2, [2])],
)
def test_when_evaluate_and_on_step_are_called(eval_every, steps, evaluated):
    config = settings(eval_every=eval_every, steps=steps)
    expected = []
    for step in range(1, steps + 1):
        expected += ["evaluate"] * (step in evaluated) + [f"step {step}"]
    assert count_events(tiny_model("llama"), config) == expected


def test_what_the_history_holds():
    config = settings(eval_every=2, steps=3)
    history = fit(
        tiny_model("llama"), make_batches(config), config, evaluate=lambda model: Evaluation(math.log(7), 10, 0)
    )
    assert history.steps == [1, 2, 3]
    assert len(history.train_loss) == 3
    assert history.seconds == sorted(history.seconds)
    assert history.step_seconds() == pytest.approx(np.diff([0.0, *history.seconds]))
    assert [(one["step"], one["loss"]) for one in history.evals] == [(2, math.log(7)), (3, math.log(7))]
    assert [one["seconds"] for one in history.evals] == history.seconds[1:]
    assert history.evals[0]["perplexity"] == pytest.approx(7)
    assert history.stopped is False
    assert History().step_seconds() == []


def test_seconds_are_the_steps_own(monkeypatch):
    """On a clock that only moves where the test says: a second a forward, much more for anything else."""
    now = [0.0]
    monkeypatch.setattr(fit_module.time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: pass_time(1))
    config = settings(eval_every=1, steps=4)

    def batches():
        for token_ids_BT in make_batches(config):
            pass_time(10_000)
            yield token_ids_BT

    def evaluate(model) -> Evaluation:
        pass_time(1_000)
        return Evaluation(1.0, 1, 0)

    history = fit(model, batches(), config, evaluate=evaluate, on_step=lambda _: pass_time(100))
    assert history.seconds == [1, 2, 3, 4]


def test_a_stop_comes_between_steps_and_flushes(tmp_path):
    model = with_memory(tmp_path / "stopped")
    asked = []

    def should_stop() -> bool:
        asked.append(len(asked))
        return len(asked) > 3

    events = []
    history = fit(
        model,
        make_batches(settings()),
        settings(),
        evaluate=lambda model: events.append("evaluate"),
        should_stop=should_stop,
    )
    assert (history.steps, history.stopped, events) == ([1, 2, 3], True, [])
    assert len(asked) == 4
    whole = with_memory(tmp_path / "whole")
    rows = []
    fit(
        whole,
        make_batches(settings()),
        settings(),
        on_step=lambda history: rows.append(table_bytes(whole)),
    )
    assert table_bytes(model) == rows[2]
    assert json.loads((tmp_path / "stopped" / "engram_table.json").read_text())["step"] == 3


def test_a_stop_before_the_first_step_changes_nothing(tmp_path):
    model = with_memory(tmp_path)
    before, rows = weights_of(model), table_bytes(model)
    called = []
    history = fit(
        model,
        make_batches(settings()),
        settings(),
        on_step=lambda history: called.append(1),
        should_stop=lambda: True,
    )
    assert (history.steps, history.train_loss, history.evals, history.stopped) == ([], [], [], True)
    assert called == []
    assert same(before, model) == set(before)
    assert table_bytes(model) == rows
    assert memory_of(model).storage.committed_step is None


def test_a_stop_before_the_first_step_keeps_the_tables_step(tmp_path):
    model = with_memory(tmp_path)
    fit(model, make_batches(settings()), settings())
    fit(model, make_batches(settings()), settings(), should_stop=lambda: True)
    assert memory_of(model).storage.committed_step == 6


def test_the_end_is_committed(tmp_path):
    model = with_memory(tmp_path)
    fit(model, make_batches(settings()), settings())
    rows = table_bytes(model)
    memory_of(model).storage.close()
    torch.manual_seed(1)
    again = attach_engram(tiny_model("llama"), tiny_config(tmp_path))
    storage = memory_of(again).storage
    assert storage.committed_step == 6
    assert storage.manifest.states["adagrad"].step == 6
    assert storage.manifest.generation == 1
    assert table_bytes(again) == rows
    detach_engram(again)


def test_batches_that_end_early_end_the_run_with_a_warning(tmp_path):
    config = settings()
    batches = [token_ids_BT for token_ids_BT, _ in zip(make_batches(config), range(2), strict=False)]
    model = with_memory(tmp_path)
    with pytest.warns(UserWarning, match="the batches ended after 2 of 6 steps") as warned:
        history = fit(model, batches, config)
    assert warned[0].filename == __file__
    assert (history.steps, history.stopped) == ([1, 2], True)
    assert memory_of(model).storage.committed_step == 2


def test_no_batch_more_than_the_steps_is_taken():
    config = settings(steps=2)
    taken = []

    def batches():
        for token_ids_BT in make_batches(config):
            taken.append(1)
            yield token_ids_BT

    fit(tiny_model("llama"), batches(), config)
    assert len(taken) == 2


def test_a_table_open_to_read_is_refused(tmp_path):
    detach_engram(with_memory(tmp_path))
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), mode="r")
    with pytest.raises(ValueError, match="open read-only"):
        fit(model, make_batches(settings()), settings())


@pytest.mark.parametrize(("commit_every", "steps"), [(2, [2, 4, 5]), (0, [5]), (9, [5])])
def test_commits_come_every_so_often_and_at_the_end(tmp_path, monkeypatch, commit_every, steps):
    model = with_memory(tmp_path)
    storage = memory_of(model).storage
    commit, flush = storage.commit, storage.flush
    committed = []
    monkeypatch.setattr(storage, "commit", lambda step, **_: (commit(step=step), committed.append(step)))
    monkeypatch.setattr(storage, "flush", lambda step: (flush(step=step), committed.append(step)))
    config = settings(steps=5, commit_every=commit_every, durability="power")
    fit(model, make_batches(config), config)
    assert committed == steps
    assert storage.durability == "power"


def test_a_run_that_fails_leaves_the_table_of_its_last_commit(tmp_path):
    config = settings(steps=6, commit_every=2)
    model = with_memory(tmp_path / "a")
    rows = {}

    def fail_after_five(history: History) -> None:
        rows[len(history.steps)] = table_bytes(model)
        if len(history.steps) == 5:
            raise RuntimeError("the cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        fit(model, make_batches(config), config, on_step=fail_after_five)
    assert rows[5] != rows[4]
    storage = memory_of(model).storage
    path = storage.path
    with pytest.warns(UserWarning, match="1 updates since its last commit"):
        storage.close()
    with pytest.warns(UserWarning, match="put back"):
        again = MMapEmbeddingStorage(storage.num_embeddings, storage.embedding_dim, path)
    assert again.committed_step == 4
    assert path.read_bytes() == rows[4]


# --- rows on their way from the disk ---


@pytest.mark.parametrize("cold", [True, False])
def test_the_next_batchs_rows_are_asked_for_and_change_nothing(tmp_path, monkeypatch, cold):
    config = settings()
    plain = with_memory(tmp_path / "plain")
    monkeypatch.setattr(MMapEmbeddingStorage, "reads_the_disk", False)
    expected = fit(plain, make_batches(config), config)
    model = with_memory(tmp_path / "asked")
    storage, asked, trained = memory_of(model).storage, [], []
    monkeypatch.setattr(MMapEmbeddingStorage, "reads_the_disk", cold)
    prefetch, forward = storage.prefetch, storage.forward
    monkeypatch.setattr(storage, "prefetch", lambda ids: (asked.append(ids.clone()), prefetch(ids)))
    monkeypatch.setattr(storage, "forward", lambda ids: (trained.append(ids.clone()), forward(ids))[1])
    history = fit(model, make_batches(config), config)
    assert history.train_loss == expected.train_loss
    assert table_bytes(model) == table_bytes(plain)
    assert len(trained) == config.steps
    # Before each batch the next one's, and its own when its token ids are known.
    expected_ids = [ids for own, following in pairwise(trained) for ids in (following, own)] + trained[-1:]
    assert len(asked) == (len(expected_ids) if cold else 0)
    assert all(torch.equal(*ids) for ids in zip(asked, expected_ids, strict=cold))
