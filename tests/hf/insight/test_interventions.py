"""A memory changed for a while: each change held to the same made by hand in the table's file, and no trace after."""

import hashlib

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.insight.ablation import ablate, ablations, looked_up, most_looked_up, num_passes, paired_bootstrap
from sense_v2.hf.insight.evaluation import token_losses
from sense_v2.hf.insight.interventions import (
    gate_forced,
    heads_off,
    memory_off,
    noise_rows,
    one_row_per_head,
    rows_of_noise,
    rows_shuffled,
)
from sense_v2.hf.memory import memory_of

WIDTH = 8


def with_memory(folder, **changes):
    """Memory before layers 0 and 2 with a table that isn't noise any more."""
    torch.manual_seed(1)
    config = tiny_config(folder, **{"layer_indices": [0, 2], **changes})
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    wake(memory_of(model))
    memory_of(model).storage.flush()
    return model


def ids(batch=4, length=9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def on_disk(model) -> np.ndarray:
    return np.fromfile(memory_of(model).storage.path, dtype="<f4").reshape(-1, WIDTH)


def losses_with_rows(model, rows_ND) -> torch.Tensor:
    """The losses with other rows in the table itself; the old ones are put back."""
    table_ND = memory_of(model).storage.weight
    before = table_ND.clone()
    table_ND.copy_(torch.from_numpy(rows_ND))
    try:
        return token_losses(model, ids())
    finally:
        table_ND.copy_(before)


def head_rows(model, layer: int, head: int) -> slice:
    layout = memory_of(model).layers[str(layer)].hasher.layout
    number = layout.layer_ids.index(layer)
    first = layout.offsets_LH[number][head]
    return slice(first, first + layout.primes_LH[number][head])


def state(model) -> tuple:
    """Everything that a change could have left behind."""
    memory = memory_of(model)
    digest = hashlib.sha256(memory.storage.path.read_bytes())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    attributes = [
        (name, sorted(vars(module)), {key: id(value) for key, value in vars(module).items() if key == "hasher"})
        for name, module in model.named_modules()
    ]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return digest.hexdigest(), attributes, hooks, model.training


@pytest.fixture
def model(tmp_path):
    return with_memory(tmp_path)


def test_memory_off_is_the_model_without_memory(model, tmp_path):
    with memory_off(memory_of(model)):
        found = token_losses(model, ids())
    assert not torch.equal(found, token_losses(model, ids()))
    assert torch.equal(found, token_losses(detach_engram(model), ids()))


@pytest.mark.parametrize("variant", [{}, {"variant": "paper", "table_size": 60}])
def test_a_shut_gate_is_memory_off(tmp_path, variant):
    model = with_memory(tmp_path, **variant)
    with gate_forced(memory_of(model), 0.0):
        shut = token_losses(model, ids())
    with memory_off(memory_of(model)):
        assert torch.equal(shut, token_losses(model, ids()))


def test_an_open_gate_adds_the_whole_value(model):
    seen = []
    hook = memory_of(model).layers["0"].gate.register_forward_hook(lambda gate, inputs, alpha: seen.append(alpha))
    with gate_forced(memory_of(model), 1.0):
        opened = token_losses(model, ids())
    hook.remove()
    assert seen[0].shape == (4, 9, 1)
    assert seen[0].eq(1).all()
    # A score of 40 in float32 is a gate of exactly 1.
    with torch.no_grad():
        for fusion in memory_of(model):
            fusion.gate.query_norm.weight.zero_()
            fusion.gate.forward = lambda hidden, key, gate=fusion.gate: torch.full(hidden.shape[:-1], 40.0).sigmoid()
    assert torch.equal(opened, token_losses(model, ids()))


def test_one_layer_off_leaves_the_others_on(model):
    with memory_off(memory_of(model), [0]):
        first_off = token_losses(model, ids())
    with torch.no_grad():
        # Nothing comes through a layer whose W_v is zero.
        memory_of(model).layers["0"].W_v.weight.zero_()
        memory_of(model).layers["0"].W_v.bias.zero_()
    assert torch.equal(first_off, token_losses(model, ids()))
    with (
        pytest.raises(ValueError, match="layer 1 has no memory; layers 0, 2 have"),
        memory_off(memory_of(model), [1]),
    ):
        pass


def test_a_head_off_is_a_head_whose_rows_are_zeros(model):
    for layer, heads in ((0, [0]), (2, [2, 3])):
        rows = on_disk(model).copy()
        for head in heads:
            rows[head_rows(model, layer, head)] = 0
        with heads_off(memory_of(model), layer, heads):
            found = token_losses(model, ids())
        assert not torch.equal(found, token_losses(model, ids()))
        assert torch.equal(found, losses_with_rows(model, rows))


def test_capacity_one_is_a_table_whose_heads_hold_one_row(model):
    hottest_LH = most_looked_up(looked_up(memory_of(model), ids()))
    rows = on_disk(model).copy()
    for number, layer in enumerate((0, 2)):
        for head in range(4):
            where = head_rows(model, layer, head)
            assert where.start <= hottest_LH[number, head] < where.stop
            rows[where] = rows[hottest_LH[number, head]]
    with one_row_per_head(memory_of(model), hottest_LH):
        found = token_losses(model, ids())
    assert torch.equal(found, losses_with_rows(model, rows))


def test_the_most_looked_up_row_is_counted_right():
    row_ids = np.array([[[5, 1], [3, 9], [5, 9], [3, 9]]])
    assert most_looked_up(row_ids).tolist() == [[3, 9]]


def test_a_table_of_noise_is_a_table_filled_with_it(model):
    std_LH = torch.tensor([[0.5, 1.0, 1.5, 2.0], [0.1, 0.2, 0.3, 0.4]])
    rows = noise_rows(np.arange(1500), WIDTH, seed=3)
    for number, layer in enumerate((0, 2)):
        for head in range(4):
            rows[head_rows(model, layer, head)] *= std_LH[number, head].numpy()
    with rows_of_noise(memory_of(model), std_LH, seed=3):
        found = token_losses(model, ids())
    assert torch.equal(found, losses_with_rows(model, rows))


def test_noise_is_normal_and_of_its_seed():
    noise = noise_rows(np.arange(5000), 32, seed=1)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01
    assert np.array_equal(noise_rows(np.array([7, 4999]), 32, seed=1), noise[[7, 4999]])
    assert not np.array_equal(noise_rows(np.arange(2), 32, seed=2), noise[:2])


def test_shuffled_rows_are_the_same_rows_elsewhere(model):
    memory = memory_of(model)
    before = looked_up(memory, ids())
    with rows_shuffled(memory, seed=4):
        after = looked_up(memory, ids())
        first = token_losses(model, ids())
    with rows_shuffled(memory, seed=4):
        looked_up(memory, ids())
        assert torch.equal(first, token_losses(model, ids()))
    assert not np.array_equal(before, after)
    for one, other in zip(before, after, strict=True):
        assert sorted(map(tuple, one)) == sorted(map(tuple, other))


def test_nothing_stays_changed(model):
    before, losses = state(model), token_losses(model, ids())
    result = ablate(model, ids(), resamples=50)
    assert state(model) == before
    assert torch.equal(token_losses(model, ids()), losses)
    assert len(result["ablations"]) + 1 == num_passes(memory_of(model)) == 1 + 6 + 2 + 4 + 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_changed_after_an_interruption(model, error):
    before = state(model)
    for ablation in ablations(memory_of(model), ids()):

        def interrupt(module, inputs, output):
            raise error

        hook = model.lm_head.register_forward_hook(interrupt)
        with pytest.raises(error), ablation.change():
            token_losses(model, ids())
        hook.remove()
        assert state(model) == before, ablation.name


def test_numbers_of_an_ablation_are_those_of_the_losses(model):
    result = ablate(model, ids(), resamples=200, batch_size=3)
    with_memory_B = token_losses(model, ids()).mean(dim=1).numpy()
    assert result["loss"] == pytest.approx(with_memory_B.mean())
    assert (result["blocks"], result["tokens"]) == (4, 32)
    by_name = {one["name"]: one for one in result["ablations"]}
    assert len(by_name) == len(result["ablations"])
    with heads_off(memory_of(model), 2, [3]):
        changed_B = token_losses(model, ids()).mean(dim=1).numpy()
    one = by_name["layer_2_order_3_head_1_off"]
    assert (one["group"], one["layer"], one["order"], one["head"]) == ("head", 2, 3, 1)
    assert one["change"] == pytest.approx((changed_B - with_memory_B).mean(), abs=1e-6)
    assert one["low"] <= one["change"] <= one["high"]
    off = by_name["memory_off"]
    assert all(by_name["gate_shut"][name] == off[name] for name in ("loss", "change", "low", "high"))
    for one in result["ablations"]:
        assert one["kept"] is None if off["change"] <= 0 else one["kept"] == 1 - one["change"] / off["change"]


def test_single_heads_can_be_left_out(model):
    result = ablate(model, ids(), resamples=10, single_heads=False)
    assert {one["group"] for one in result["ablations"]} == {"memory", "rows", "gate", "layer", "order"}
    assert len(result["ablations"]) + 1 == num_passes(memory_of(model), single_heads=False)


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = paired_bootstrap(generator.exponential(size=60), resamples=400, seed=trial)
        covered += low <= 1 <= high
    # 95 % of 400 is 380; a bootstrap of 60 skewed values covers a little less often.
    assert 360 <= covered <= 395


def test_a_bootstrap_repeats_and_needs_two_blocks():
    values = np.random.default_rng(1).normal(size=30)
    first = paired_bootstrap(values, resamples=500, seed=[1, 2])
    assert first == paired_bootstrap(values, resamples=500, seed=[1, 2])
    # The standard error of the mean says the same.
    half = 1.96 * values.std() / np.sqrt(30)
    assert first == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08)
    assert np.isnan(paired_bootstrap(values[:1], resamples=10, seed=0)).all()
    assert paired_bootstrap(np.zeros(5), resamples=10, seed=0) == (0.0, 0.0)
