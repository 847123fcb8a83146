"""The controls: what they take away, and that nothing else changes."""

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.core.config import TrainConfig
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.corpus import Batches
from sense_v2.hf.experiments.controls import freeze_rows, permute_rows
from sense_v2.hf.insight.evaluation import rows_touched
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fit import fit

SETTINGS = TrainConfig(steps=30, batch_size=2, sequence_length=12, warmup_steps=2, learning_rate=5e-3)


def with_memory(folder, **changes):
    torch.manual_seed(1)
    return attach_engram(tiny_model("llama"), tiny_config(folder, **changes), tiny_tokenizer())


def ids(batch=3, length=11) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def batches() -> Batches:
    tokens = np.tile(np.random.default_rng(0).integers(3, VOCABULARY, 40), 12)
    return Batches(tokens, batch_size=2, sequence_length=12, seed=0)


def by_position(row_ids_BTH: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(rows) for rows in row_ids_BTH.flatten(0, 1).tolist()]


@pytest.fixture
def layer_and_true_rows(tmp_path):
    memory = memory_of(with_memory(tmp_path))
    (layer,) = memory
    true = layer.row_ids(ids())
    permute_rows(memory, seed=7)
    return layer, true


def test_permuted_rows_are_the_same_rows_at_other_positions(layer_and_true_rows):
    layer, true = layer_and_true_rows
    found = layer.row_ids(ids())
    assert found.shape == true.shape
    assert found.dtype == torch.int64
    # Whole positions are dealt: each head keeps its own range, and n-grams of one position stay together.
    assert sorted(by_position(found)) == sorted(by_position(true))
    in_place = sum(a == b for a, b in zip(by_position(found), by_position(true), strict=True))
    assert in_place < 6
    # Across sequences, not only within each.
    assert sorted(by_position(found[:1])) != sorted(by_position(true[:1]))


def test_rows_are_dealt_anew_at_each_call(layer_and_true_rows):
    layer, _ = layer_and_true_rows
    calls = [tuple(by_position(layer.row_ids(ids()))) for _ in range(5)]
    assert len(set(calls)) == 5


def test_the_seed_decides_how_rows_are_dealt(tmp_path):
    calls = []
    for number, seed in enumerate([7, 7, 8]):
        memory = memory_of(with_memory(tmp_path / str(number), layer_indices=[0, 2]))
        permute_rows(memory, seed)
        calls.append([by_position(layer.row_ids(ids())) for _ in range(3) for layer in memory])
    assert calls[0] == calls[1]
    assert all(a != b for a, b in zip(calls[0], calls[2], strict=True))


def test_two_layers_are_dealt_differently(tmp_path):
    memory = memory_of(with_memory(tmp_path, layer_indices=[0, 2]))
    true = [by_position(layer.row_ids(ids())) for layer in memory]
    permute_rows(memory, 7)
    found = [by_position(layer.row_ids(ids())) for layer in memory]
    orders = [[one.index(rows) for rows in other] for one, other in zip(true, found, strict=True)]
    assert orders[0] != orders[1]


def test_padding_takes_and_gives_no_rows(layer_and_true_rows):
    layer, _ = layer_and_true_rows
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, 8:] = 0
    true = layer.hasher.hasher(layer.tokenizer(ids()), attention_mask=mask)
    found = layer.row_ids(ids(), attention_mask=mask)
    valid = mask.bool()
    assert torch.equal(found[~valid], true[~valid])
    assert sorted(map(tuple, found[valid].tolist())) == sorted(map(tuple, true[valid].tolist()))
    assert not torch.equal(found[valid], true[valid])


def test_permuting_shows_in_the_model_and_touches_the_same_rows(tmp_path):
    model = with_memory(tmp_path)
    wake(memory_of(model))
    with torch.no_grad():
        true, touched = model(ids()).logits, rows_touched(model, [ids()])
        permute_rows(memory_of(model), 0)
        once, twice = model(ids()).logits, model(ids()).logits
        mask = torch.ones_like(ids())
        mask[0, :3] = 0
        assert model(ids(), attention_mask=mask).logits.isfinite().all()
    assert (once - true).abs().max() > 1e-3
    assert (once - twice).abs().max() > 1e-3
    assert rows_touched(model, [ids()]) == touched


def test_frozen_rows_keep_their_noise_while_the_fusion_learns(tmp_path):
    model = with_memory(tmp_path)
    memory = memory_of(model)
    freeze_rows(memory)
    before, w_v = memory.storage.path.read_bytes(), memory.layers["1"].W_v.weight.clone()
    fit(model, batches(), SETTINGS)
    assert memory.storage.path.read_bytes() == before
    assert (memory.layers["1"].W_v.weight - w_v).abs().max() > 1e-3
    assert not memory.storage(torch.tensor([1, 2])).requires_grad


def test_neither_control_learns_as_much_as_the_memory(tmp_path):
    """A backbone that can't learn, and a text whose n-grams say all: only the right rows, trained, can tell."""
    config = TrainConfig(**{**SETTINGS.to_dict(), "train_backbone": False, "steps": 60, "learning_rate": 1e-2})
    losses = {}
    for name in ("memory", "frozen", "permuted"):
        model = with_memory(tmp_path / name)
        if name == "frozen":
            freeze_rows(memory_of(model))
        elif name == "permuted":
            permute_rows(memory_of(model), 0)
        losses[name] = float(np.mean(fit(model, batches(), config).train_loss[-10:]))
    assert losses["memory"] < losses["frozen"] - 0.2
    assert losses["memory"] < losses["permuted"] - 0.2


def test_permuted_rows_are_trained(tmp_path):
    model = with_memory(tmp_path)
    permute_rows(memory_of(model), 0)
    before = np.array(memory_of(model).storage.mmap)
    fit(model, batches(), SETTINGS)
    assert (memory_of(model).storage.mmap != before).any(axis=1).sum() > 50
