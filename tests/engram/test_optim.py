"""Row optimizers against plain NumPy, torch.optim.Adagrad and torch.optim.SparseAdam; files read back raw."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from sense_v2.engram.optim import RowAdam, RowWiseAdagrad, clip_grad_norm_, rowwise_adagrad
from sense_v2.engram.storage import MMapEmbeddingStorage

ROWS, WIDTH = 40, 6


def make_storage(folder, width=WIDTH, **changes) -> MMapEmbeddingStorage:
    return MMapEmbeddingStorage(ROWS, width, folder / "engram_table.dat", init_std=1.0, **changes)


def raw_rows(storage, width=WIDTH) -> np.ndarray:
    return np.fromfile(storage.path, dtype="<f4").reshape(-1, width)


def batches(seed=0, steps=6, size=12):
    """Row ids with repeats, and a target for each: the same for whoever asks."""
    generator = np.random.default_rng(seed)
    return [(generator.integers(0, ROWS, size), generator.normal(size=size)) for _ in range(steps)]


def loss_of(rows_BD: torch.Tensor, targets_B: np.ndarray) -> torch.Tensor:
    """Not linear in the rows, so that a gradient depends on where they are."""
    return ((rows_BD.float().sin().sum(-1) - torch.tensor(targets_B, dtype=torch.float32)) ** 2).sum()


def run(storage, optimizer, steps=6):
    storage.train()
    for row_ids, targets in batches(steps=steps):
        loss_of(storage(torch.tensor(row_ids)), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def numpy_gradient(table, row_ids, targets):
    """Sum over the batch of d loss / d row, by hand."""
    gradient = np.zeros_like(table)
    for row_id, target in zip(row_ids, targets, strict=True):
        row = table[row_id]
        gradient[row_id] += 2 * (np.sin(row).sum() - target) * np.cos(row)
    return gradient


# --- equal to others ---


def test_rowwise_adagrad_equals_plain_numpy(tmp_path):
    storage = make_storage(tmp_path)
    table, sums = raw_rows(storage).astype(np.float64), np.zeros(ROWS)
    run(storage, RowWiseAdagrad(storage, lr=0.3, eps=1e-8))
    for row_ids, targets in batches():
        gradient = numpy_gradient(table, row_ids, targets)
        sums += (gradient**2).mean(axis=1)
        table -= 0.3 * gradient / (np.sqrt(sums)[:, None] + 1e-8)
    np.testing.assert_allclose(raw_rows(storage), table, atol=1e-6)
    state = np.fromfile(tmp_path / "engram_table.adagrad.dat", dtype="<f4")
    np.testing.assert_allclose(state, sums, rtol=1e-5)


def test_rowwise_adagrad_rounds_as_its_formula_does():
    """Bit for bit, in NumPy's float32: a table trained by one release goes on with the next."""
    generator = np.random.default_rng(0)
    rows, grads, sums = (generator.normal(size=shape).astype("<f4") for shape in ((7, 6), (7, 6), (7, 1)))
    sums = sums**2
    tensors = [torch.tensor(values) for values in (rows, grads, sums)]
    rowwise_adagrad(*tensors, lr=0.3, eps=1e-8)
    means = torch.tensor(grads).square().mean(dim=1, keepdim=True).numpy()  # a mean's order of adding is torch's
    sums = sums + means
    rows = rows - np.float32(0.3) * grads / (np.sqrt(sums) + np.float32(1e-8))
    np.testing.assert_array_equal(tensors[0].numpy(), rows)
    np.testing.assert_array_equal(tensors[2].numpy(), sums)


def test_at_width_one_rowwise_adagrad_is_torchs_adagrad(tmp_path):
    storage = make_storage(tmp_path, width=1)
    embedding = torch.nn.Embedding.from_pretrained(torch.tensor(raw_rows(storage, 1)), freeze=False)
    reference = torch.optim.Adagrad(embedding.parameters(), lr=0.3, eps=1e-10)
    for row_ids, targets in batches():
        loss_of(embedding(torch.tensor(row_ids)), targets).backward()
        reference.step()
        reference.zero_grad()
    run(storage, RowWiseAdagrad(storage, lr=0.3))
    np.testing.assert_allclose(raw_rows(storage, 1), embedding.weight.detach().numpy(), atol=1e-6)


def test_row_adam_equals_torchs_sparse_adam(tmp_path):
    storage = make_storage(tmp_path)
    embedding = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
    embedding.weight.data.copy_(torch.tensor(raw_rows(storage)))
    reference = torch.optim.SparseAdam(embedding.parameters(), lr=0.1, betas=(0.8, 0.95), eps=1e-7)
    for row_ids, targets in batches():
        loss_of(embedding(torch.tensor(row_ids)), targets).backward()
        reference.step()
        reference.zero_grad()
    run(storage, RowAdam(storage, lr=0.1, betas=(0.8, 0.95), eps=1e-7))
    np.testing.assert_allclose(raw_rows(storage), embedding.weight.detach().numpy(), atol=1e-6)


@given(st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=8), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_repeats_and_micro_batches_are_summed_before_the_square(tmp_path_factory, micro_batches):
    """However the same lookups are cut into forwards and backwards, one step gives the same rows."""
    results = []
    for cut in (False, True):
        storage = make_storage(tmp_path_factory.mktemp("table")).train()
        optimizer = RowWiseAdagrad(storage, lr=0.3)
        parts = micro_batches if cut else [[row_id for part in micro_batches for row_id in part]]
        for row_ids in parts:
            storage(torch.tensor(row_ids)).square().sum().backward()
        optimizer.step()
        results.append(raw_rows(storage))
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


# --- rows that were not met ---


@pytest.mark.parametrize("kind", [RowWiseAdagrad, RowAdam])
def test_rows_that_were_not_met_stay_as_they_are_bit_for_bit(tmp_path, kind):
    storage = make_storage(tmp_path).train()
    before = raw_rows(storage)
    optimizer = kind(storage, lr=0.5)
    storage(torch.tensor([3, 7, 3])).sum().backward()
    optimizer.step()
    after = raw_rows(storage)
    changed = (before != after).any(axis=1).nonzero()[0]
    assert changed.tolist() == [3, 7]
    state = np.fromfile(optimizer.state_file.path, dtype="<f4").reshape(ROWS, -1)
    assert state.any(axis=1).nonzero()[0].tolist() == [3, 7]


@pytest.mark.parametrize("kind", [RowWiseAdagrad, RowAdam])
def test_a_step_without_gradients_changes_nothing(tmp_path, kind):
    storage = make_storage(tmp_path).train()
    optimizer = kind(storage, lr=0.5)
    before = storage.path.read_bytes()
    optimizer.step()
    storage(torch.tensor([1])).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert storage.path.read_bytes() == before
    assert optimizer.state_file.step == 0


# --- state on disk ---


@pytest.mark.parametrize("kind", [RowWiseAdagrad, RowAdam])
def test_a_run_cut_in_two_by_closing_equals_one_run(tmp_path, kind):
    whole = make_storage(tmp_path / "whole").train()
    run(whole, kind(whole, lr=0.1))
    for part in (slice(0, 3), slice(3, 6)):
        storage = make_storage(tmp_path / "cut").train()
        optimizer = kind(storage, lr=0.1)
        for row_ids, targets in batches()[part]:
            loss_of(storage(torch.tensor(row_ids)), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        storage.flush()
        storage.close()
    np.testing.assert_array_equal(np.fromfile(tmp_path / "cut/engram_table.dat", "<f4"), raw_rows(whole).ravel())
    manifest = json.loads((tmp_path / "cut/engram_table.json").read_text())
    (entry,) = manifest["states"].values()
    assert entry["step"] == 6


def test_state_is_one_float_a_row_or_two_rows_a_row(tmp_path):
    storage = make_storage(tmp_path)
    RowWiseAdagrad(storage)
    RowAdam(storage)
    assert (tmp_path / "engram_table.adagrad.dat").stat().st_size == ROWS * 4
    assert (tmp_path / "engram_table.adam.dat").stat().st_size == ROWS * 2 * WIDTH * 4


# --- with the rest of torch ---


def test_a_scheduler_drives_the_rate(tmp_path):
    storage = make_storage(tmp_path).train()
    optimizer = RowWiseAdagrad(storage, lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    before = storage.path.read_bytes()
    storage(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert storage.path.read_bytes() == before, "a rate of 0 moves nothing"
    schedule.step()
    optimizer.step()
    assert storage.path.read_bytes() != before


def test_clipping_counts_the_rows_in_the_norm(tmp_path):
    storage = make_storage(tmp_path).train()
    weight = torch.nn.Parameter(torch.ones(WIDTH))
    embedding = torch.nn.Parameter(torch.tensor(raw_rows(storage)))
    row_ids, targets = batches()[0]
    loss_of(storage(torch.tensor(row_ids)) * weight, targets).backward()
    ours = clip_grad_norm_([weight], storage, 0.5)
    found, dense = storage.gradients(), weight.grad.clone()
    weight.grad = None
    loss_of(embedding[torch.tensor(row_ids)] * weight, targets).backward()
    reference = torch.nn.utils.clip_grad_norm_([weight, embedding], 0.5)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(dense, weight.grad)
    torch.testing.assert_close(found[1], embedding.grad[found[0]])


def test_clipping_works_without_row_gradients_and_below_the_limit(tmp_path):
    storage = make_storage(tmp_path).train()
    weight = torch.nn.Parameter(torch.ones(WIDTH))
    weight.grad = torch.full((WIDTH,), 0.01)
    clip_grad_norm_([weight], storage, 1.0)
    assert torch.equal(weight.grad, torch.full((WIDTH,), 0.01))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_micro_batches_train_like_plain_ones(tmp_path, use_reentrant):
    results = []
    for checkpointed in (False, True):
        storage = make_storage(tmp_path / str(checkpointed)).train()
        optimizer = RowWiseAdagrad(storage, lr=0.3)
        scale = torch.ones(WIDTH, requires_grad=True)
        block = lambda ids, scale, storage=storage: storage(ids) * scale  # noqa: E731
        # Both forwards before the first backward: each must keep its own rows.
        losses = []
        for row_ids, targets in batches(steps=2):
            ids = torch.tensor(row_ids)
            if checkpointed:
                rows = torch.utils.checkpoint.checkpoint(block, ids, scale, use_reentrant=use_reentrant)
            else:
                rows = block(ids, scale)
            losses.append(loss_of(rows, targets))
        for loss in losses:
            loss.backward()
        optimizer.step()
        results.append(raw_rows(storage))
    np.testing.assert_array_equal(results[0], results[1])


def test_a_forward_without_a_backward_keeps_nothing_alive(tmp_path):
    storage = make_storage(tmp_path).train()
    rows = storage(torch.arange(ROWS))
    node = rows.grad_fn
    while not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    leaf = weakref.ref(node.variable)
    assert leaf().shape == (ROWS, WIDTH)
    del rows, node
    gc.collect()
    assert leaf() is None
    assert storage.gradients() is None


def test_closures_and_state_dicts(tmp_path):
    storage = make_storage(tmp_path).train()
    optimizer = RowAdam(storage, lr=0.1)

    def closure():
        loss = storage(torch.tensor([1])).square().sum()
        loss.backward()
        return loss.item()

    before = raw_rows(storage)
    assert optimizer.step(closure) == pytest.approx(float((before[1] ** 2).sum()))
    assert (raw_rows(storage)[1] != before[1]).all()
    optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": [{**optimizer.param_groups[0], "lr": 0.7}]})
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_half_rows_take_the_rounded_float32_update(tmp_path):
    storage = make_storage(tmp_path, dtype="float16").train()
    before = storage.weight[:4].float().clone()
    optimizer = RowWiseAdagrad(storage, lr=0.25)
    (storage(torch.arange(4)) * 3).sum().backward()
    optimizer.step()
    assert torch.equal(storage.weight[:4], (before - 0.25 * 3 / 3).half())


def test_bfloat16_rows_take_one_of_the_two_values_beside_the_float32_update(tmp_path):
    """Which of them is chance: rounded to the nearest, updates below half a step of bfloat16 would be lost."""
    storage = make_storage(tmp_path, dtype="bfloat16").train()
    before = storage.weight.float().clone()
    optimizer = RowWiseAdagrad(storage, lr=0.25)
    (storage(torch.arange(ROWS)) * 3).sum().backward()
    optimizer.step()
    expected = (before - 0.25 * 3 / 3).numpy()
    # Towards zero, and one step of bfloat16 away from it, by the bits.
    lower = expected.view(np.uint32) & 0xFFFF0000
    found = storage.weight.float().numpy().view(np.uint32)
    steps = (found.astype(np.int64) - lower) >> 16
    exact = expected.view(np.uint32) == lower
    assert set(steps[~exact]) == {0, 1}
    assert not steps[exact].any()


def test_bfloat16_rows_follow_updates_smaller_than_their_steps(tmp_path):
    """64 updates of a sixteenth of a step each: rounded to the nearest, no row would ever move."""
    storage = make_storage(tmp_path, dtype="bfloat16").train()
    storage.write(torch.arange(ROWS), torch.ones(ROWS, WIDTH))
    rows, step = torch.arange(ROWS), 2.0**-7
    for _ in range(64):
        storage.write(rows, storage.gather(rows) + step / 16, stochastic=True)
    moved = (storage.weight.float() - 1).mean().item()
    # A sum of 64 draws with variance (1/16)(15/16) steps²; five standard errors of the mean of 240 values.
    assert abs(moved - 64 * step / 16) < 5 * step * (64 * 15 / 256 / (ROWS * WIDTH)) ** 0.5


def test_a_run_in_bfloat16_repeats_with_its_seed(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        storage = make_storage(tmp_path / name, dtype="bfloat16", seed=seed)
        storage.write(torch.arange(ROWS), torch.ones(ROWS, WIDTH))
        run(storage, RowAdam(storage, lr=0.01))
        runs.append(storage.path.read_bytes())
    assert runs[0] == runs[1] != runs[2]


# --- bad input ---


def test_a_read_only_table_is_refused(tmp_path):
    make_storage(tmp_path).close()
    with pytest.raises(ValueError, match="read-only"):
        RowAdam(make_storage(tmp_path, mode="r"))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RowWiseAdagrad, {"lr": -1.0}, "lr = -1.0"),
        (RowAdam, {"eps": -1.0}, "eps = -1.0"),
        (RowAdam, {"betas": (1.0, 0.9)}, "betas"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(make_storage(tmp_path), **arguments)


# --- the stand-in: rows where only parameters are known ---


def test_torchs_own_clipping_counts_and_scales_the_rows(tmp_path):
    storage = make_storage(tmp_path)
    optimizer = RowWiseAdagrad(storage)
    dense = torch.nn.Parameter(torch.tensor([3.0]))
    row_ids, targets = batches()[0]
    (loss_of(storage.train()(torch.tensor(row_ids)), targets) + dense.sum() * 5).backward()
    gradient = numpy_gradient(raw_rows(storage), row_ids, targets)
    norm = torch.nn.utils.clip_grad_norm_([dense, *optimizer.param_groups[0]["params"]], 1.0)
    expected = np.sqrt(25 + (gradient.astype(np.float64) ** 2).sum())
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    ids_U, grads_UD = storage.gradients()
    np.testing.assert_allclose(grads_UD, gradient[ids_U] / (expected + 1e-6), rtol=1e-4, atol=1e-7)
    assert dense.grad.item() == pytest.approx(5 / expected, rel=1e-5)


@pytest.mark.parametrize("kind", [RowWiseAdagrad, RowAdam])
def test_a_gradient_scaler_unscales_the_rows_and_skips_what_overflowed(tmp_path, kind):
    (tmp_path / "plain").mkdir()
    plain = make_storage(tmp_path / "plain")
    run(plain, kind(plain, lr=0.1), steps=3)
    storage = make_storage(tmp_path).train()
    optimizer, scaler = kind(storage, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for row_ids, targets in batches(steps=3):
        scaler.scale(loss_of(storage(torch.tensor(row_ids)), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert storage.path.read_bytes() == plain.path.read_bytes()  # a power of two scales without rounding
    scaler.scale(loss_of(storage(torch.tensor([1])), [1.0]) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert storage.path.read_bytes() == plain.path.read_bytes()


def test_the_stand_in_takes_no_gradient_and_none_forgets_them(tmp_path):
    storage = make_storage(tmp_path).train()
    stand_in = RowWiseAdagrad(storage).param_groups[0]["params"][0]
    assert stand_in.grad is None
    storage(torch.tensor([1])).sum().backward()
    assert stand_in.grad.shape == (1, WIDTH)
    with pytest.raises(ValueError, match="come from backward"):
        stand_in.grad = torch.ones(1, WIDTH)
    stand_in.grad = None
    assert storage.gradients() is None


def test_a_reader_collects_gradients_where_it_is_told_to(tmp_path):
    make_storage(tmp_path).close()
    reader = make_storage(tmp_path, mode="r").train()
    assert not reader(torch.tensor([1])).requires_grad
    reader.collects_gradients = True
    reader(torch.tensor([1, 1])).sum().backward()
    ids_U, grads_UD = reader.gradients()
    assert ids_U.tolist() == [1]
    assert grads_UD.tolist() == [[2.0] * WIDTH]
