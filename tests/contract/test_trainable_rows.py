"""What every table does when it is trained: one suite over all that are, against NumPy, an ordinary embedding and the
bytes in their files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from row_sources import (
    MAPPED,
    SHARDED,
    TRAINABLE,
    open_kind,
    rounded,
    rows_in_files,
    type_of,
)
from tables import D, N, in_a_fork
from torch import nn
from torch.utils.checkpoint import checkpoint

from sense_v2.engram.optim import RowAdam, RowWiseAdagrad

EVERY_ID = torch.arange(N)


@pytest.fixture(params=TRAINABLE)
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def table(kind: str, tmp_path: Path) -> Iterator[Any]:
    opened = open_kind(kind, tmp_path)
    yield opened
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened.close()


@pytest.fixture
def rows(kind: str, table: Any, tmp_path: Path) -> np.ndarray[Any, Any]:
    return rows_in_files(kind, tmp_path)


def look_up(table: Any, ids: torch.Tensor) -> torch.Tensor:
    table.begin(ids)
    found: torch.Tensor = table(ids)
    return found


def all_rows(table: Any) -> np.ndarray[Any, Any]:
    was_training = table.training
    found = look_up(table.eval(), EVERY_ID).float().numpy()
    table.train(was_training)
    return np.array(found)


def gradients_of(table: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows that this process stores to, over all ranks."""
    table.average_over_ranks()
    gradients: tuple[torch.Tensor, torch.Tensor] = table.own.gradients()
    assert gradients is not None
    return gradients


# Gradients


def test_gradients_are_those_of_a_resident_embedding(table: Any, rows: np.ndarray[Any, Any]) -> None:
    reference = nn.Embedding.from_pretrained(torch.from_numpy(rows.copy()), freeze=False)
    torch.manual_seed(0)
    for ids in (torch.randint(0, N, (3, 7)), torch.randint(0, N, (2, 1, 4)), torch.full((9,), 3)):
        weights = torch.randn(*ids.shape, rows.shape[1])
        # What a row's gradient passes through on its way into a narrow output.
        (reference(ids).to(table.dtype).float() * weights).sum().backward()
        (look_up(table, ids).float() * weights).sum().backward()
    ids_U, grads_UD = gradients_of(table)
    assert (ids_U.dtype, grads_UD.dtype) == (torch.int64, torch.float32)
    assert reference.weight.grad is not None
    touched = reference.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert torch.equal(ids_U, touched)
    torch.testing.assert_close(grads_UD, reference.weight.grad[touched], rtol=1e-5, atol=1e-6)
    # The coalesced gradients are what stays, until they are cleared.
    assert table.own.gradients()[1] is grads_UD
    assert table.num_rows_met == len(touched)
    assert table.gradient_norm() == pytest.approx(float(reference.weight.grad.norm()), rel=1e-5)
    table.clear_gradients()
    assert table.gradients() is None
    assert table.own.gradients() is None
    assert table.gradient_norm() == 0


def test_one_forwards_gradients_are_bit_for_bit_those_of_a_resident_embedding(
    table: Any, rows: np.ndarray[Any, Any]
) -> None:
    reference = nn.Embedding.from_pretrained(torch.from_numpy(rows.copy()), freeze=False)
    ids, weights = torch.randint(0, N, (200,)), torch.randn(200, rows.shape[1])
    (look_up(table, ids).float() * weights).sum().backward()
    (reference(ids).to(table.dtype).float() * weights).sum().backward()
    ids_U, grads_UD = gradients_of(table)
    assert reference.weight.grad is not None
    assert torch.equal(grads_UD, reference.weight.grad[ids_U])


def test_a_graph_that_is_walked_twice_counts_twice(table: Any) -> None:
    loss = look_up(table, torch.tensor([1, 1, 2])).float().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    ids_U, grads_UD = gradients_of(table)
    assert ids_U.tolist() == [1, 2]
    assert torch.equal(grads_UD, torch.tensor([[4.0], [2.0]]).expand(2, table.embedding_dim))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(table: Any, reentrant: bool) -> None:
    width = table.embedding_dim
    linear = nn.Linear(width, width)
    ids = torch.randint(0, N, (2, 9))
    hidden = torch.randn(2, 9, width, requires_grad=True)

    def layer(hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return hidden + linear(torch.tanh(table(ids).float() * 30) * hidden)

    results = []
    for wrapped in (False, True):
        out = hidden
        table.begin(ids)
        for _ in range(2):
            out = checkpoint(layer, out, ids, use_reentrant=reentrant) if wrapped else layer(out, ids)
        linear.weight.grad = None
        out.pow(2).sum().backward()
        ids_U, grads_UD = gradients_of(table)
        table.clear_gradients()
        results.append((ids_U, grads_UD, linear.weight.grad))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)


def test_no_gradients_where_none_are_wanted(table: Any) -> None:
    ids = torch.tensor([1])
    with torch.no_grad():
        assert not look_up(table, ids).requires_grad
    with torch.inference_mode():
        assert not look_up(table, ids).requires_grad
    assert not look_up(table.eval(), ids).requires_grad
    assert table.train().requires_grad_(False) is table
    assert not table.rows_require_grad
    assert not look_up(table, ids).requires_grad
    assert look_up(table.requires_grad_(), ids).requires_grad
    table.clear_gradients()
    look_up(table, ids)
    assert table.gradients() is None, "a forward without a backward"
    table.clear_gradients()
    look_up(table, torch.tensor([], dtype=torch.int64)).sum().backward()
    table.average_over_ranks()
    found = table.own.gradients()
    assert found is None or found[1].shape == (0, table.embedding_dim)


def test_a_step_updates_the_rows_that_have_a_gradient(kind: str, table: Any, rows: np.ndarray[Any, Any]) -> None:
    """Row-wise Adagrad as NumPy has it; the gradients were scaled by a half before."""
    optimizer = table.row_optimizer(RowWiseAdagrad, lr=0.5)
    expected, ids = rows.copy(), np.array([7, 2, 7])
    sums = np.zeros((N, 1), np.float32)
    for _ in range(2):
        look_up(table, torch.from_numpy(ids)).float().sum().backward()
        table.average_over_ranks()
        table.scale_gradients(0.5)
        table.step_rows(optimizer)
        assert table.gradients() is None
        for row_id, gradient in ((2, 0.5), (7, 1.0)):
            sums[row_id] += gradient**2
            expected[row_id] -= 0.5 * gradient / (np.sqrt(sums[row_id]) + 1e-10)
        if type_of(kind) == torch.float32:
            np.testing.assert_allclose(all_rows(table), expected, rtol=1e-6, atol=1e-6)
    found = all_rows(table)
    untouched = np.setdiff1d(np.arange(N), ids)
    assert np.array_equal(found[untouched], rows[untouched])
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)
    assert (table.updates > 0, table.is_new) == (True, False)
    state = table.open_state("adagrad", 1)
    assert np.array_equal(table.read_state(state, EVERY_ID).numpy(), sums)
    assert state.step == 2


@pytest.mark.parametrize("optimizer", [RowWiseAdagrad, RowAdam])
def test_a_table_alone_and_one_over_ranks_train_to_the_same_rows(tmp_path: Path, optimizer: Any) -> None:
    """Their files hold the same in the end, bit for bit."""
    found = {}
    for kind in ("float32", "ranks, one file", "ranks, shards"):
        table = open_kind(kind, tmp_path / kind.replace(", ", "-"))
        table.write(EVERY_ID, torch.arange(N * D).reshape(N, D).float())
        rows = table.row_optimizer(optimizer, lr=0.1)
        for ids in (torch.tensor([[1, 2, 2], [9, 1, 30]]), torch.tensor([9, 8, 7]), torch.tensor([2, 3])):
            look_up(table, ids).square().sum().backward()
            table.average_over_ranks()
            table.step_rows(rows)
        table.commit()
        table.close()
        found[kind] = rows_in_files(kind, tmp_path / kind.replace(", ", "-"))
    first = found["float32"]
    assert all(np.array_equal(first, other) for other in found.values())


# Writing


def test_write_changes_those_rows_and_no_other(
    kind: str, table: Any, rows: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    ids = torch.tensor([41, 0, 7], dtype=torch.int32)
    new = torch.randn(3, table.embedding_dim)
    updates = table.updates
    table.write(ids, new.requires_grad_())
    assert table.updates == updates + 1
    expected = rows.copy()
    expected[ids] = rounded(new.detach().numpy(), type_of(kind))
    assert np.array_equal(all_rows(table), expected)
    gathered = table.gather(ids)
    assert gathered.dtype == torch.float32
    assert np.array_equal(gathered.numpy(), expected[ids])
    gathered.zero_()  # memory of its own
    assert np.array_equal(all_rows(table), expected)
    table.write(torch.tensor([], dtype=torch.int64), torch.empty(0, table.embedding_dim))
    table.write(torch.tensor([5]), torch.ones(1, table.embedding_dim, dtype=torch.float64))
    expected[5] = 1
    assert np.array_equal(all_rows(table), expected)
    if kind in MAPPED or kind in SHARDED:  # other processes see it through the page cache
        assert np.array_equal(rows_in_files(kind, tmp_path), expected)
    table.commit()
    assert np.array_equal(rows_in_files(kind, tmp_path), expected)


def test_rows_of_another_shape_are_refused(table: Any, rows: np.ndarray[Any, Any]) -> None:
    width = table.embedding_dim
    for shape in ((2, width + 1), (1, width), (width,), (2, 1, width), (3, width)):
        with pytest.raises(ValueError, match=rf"rows have shape .*, not \[2, {width}\]"):
            table.write(torch.tensor([1, 2]), torch.zeros(shape))
    state = table.open_state("adam", 3)
    for shape in ((2, 4), (1, 3), (3,)):
        with pytest.raises(ValueError, match=r"state rows have shape .*, not \[2, 3\]"):
            table.write_state(state, torch.tensor([1, 2]), torch.zeros(shape))
    assert np.array_equal(all_rows(table), rows)


def test_stochastic_rounding_gives_neighbours_and_repeats(kind: str, tmp_path: Path) -> None:
    found = []
    for folder in ("a", "b"):
        table = open_kind(kind, tmp_path / folder)
        table.write(EVERY_ID, torch.full((N, table.embedding_dim), 1 + 2**-9), stochastic=True)
        found.append(all_rows(table))
        with pytest.warns(UserWarning, match="is closed with 1 updates since its last commit"):
            table.close()
    assert np.array_equal(*found)
    values = set(found[0].flatten().tolist())
    assert values == ({1.0, 1.0078125} if type_of(kind) == torch.bfloat16 else {1 + 2**-9})


def test_a_forked_child_may_read_and_not_write(table: Any, rows: np.ndarray[Any, Any]) -> None:
    found = in_a_fork(lambda: float(table.gather(torch.tensor([5]))[0, 0]))
    assert float(found) == float(rows[5, 0])
    ids = torch.tensor([1])
    for call in (
        lambda: table.own.write(ids, torch.zeros(1, table.embedding_dim)),
        lambda: table.own.protect(ids),
        table.own.commit,
        lambda: table.own.open_state("adam", 2),
    ):
        assert "of which this is a forked child" in in_a_fork(call)


# Optimizer states


def test_a_state_is_zeros_and_then_what_it_was(kind: str, table: Any, tmp_path: Path) -> None:
    state = table.open_state("adam", 3)
    assert (state.name, state.width, state.step) == ("adam", 3, 0)
    assert np.array_equal(table.read_state(state, EVERY_ID).numpy(), np.zeros((N, 3)))
    values = torch.tensor([[0.0, 2.5, 0.0], [1.0, 0.0, 0.0]])
    table.write(torch.tensor([4, 9]), torch.ones(2, table.embedding_dim))
    table.write_state(state, torch.tensor([4, 9]), values)
    state.step = 17
    assert table.open_state("adam", 3) is state
    with pytest.raises(ValueError, match="has width 3, asked for 4"):
        table.open_state("adam", 4)
    read = table.read_state(state, torch.tensor([9, 4, 4]))
    assert torch.equal(read, values[[1, 0, 0]])
    read.zero_()  # memory of its own
    table.commit(step=20)
    table.close()
    table = open_kind(kind, tmp_path)
    table.commit()  # a state that nobody opened stays
    with pytest.raises(ValueError, match="has width 3, asked for 4"):
        table.open_state("adam", 4)
    state = table.open_state("adam", 3)
    assert (state.step, table.committed_step) == (17, 20)
    assert torch.equal(table.read_state(state, torch.tensor([4, 9, 10])), torch.cat([values, torch.zeros(1, 3)]))
    table.close()


# Keeping


def test_what_was_committed_comes_back_and_what_wasnt_does_not(
    kind: str, table: Any, rows: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    assert (table.committed_step, table.committed_extra) == (None, {})
    table.write(torch.tensor([3]), torch.full((1, table.embedding_dim), 0.25))
    table.commit(step=12, extra={"epoch": 1.5})
    table.commit()  # step and extra stay
    table.flush(step=np.int64(13))
    assert (table.committed_step, table.committed_extra) == (13, {"epoch": 1.5})
    updates = table.updates
    table.write(torch.tensor([4]), torch.ones(1, table.embedding_dim))
    with pytest.warns(UserWarning, match=r"is closed with 1 updates since its last commit \(step 13\)"):
        table.close()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(was|were) put back", UserWarning)
        table = open_kind(kind, tmp_path)
    assert (table.committed_step, table.committed_extra, table.updates) == (13, {"epoch": 1.5}, updates)
    expected = rows.copy()
    expected[3] = 0.25
    assert np.array_equal(all_rows(table), expected)
    assert np.array_equal(rows_in_files(kind, tmp_path), expected)
    table.close()


def test_a_copy_is_gone_back_to_in_one_commit(kind: str, table: Any, tmp_path: Path) -> None:
    state = table.open_state("adam", 2)
    table.write(torch.tensor([3]), torch.full((1, table.embedding_dim), 0.25))
    table.write_state(state, torch.tensor([3]), torch.ones(1, 2))
    state.step = 5
    table.commit(step=7, extra={"epoch": 1})
    before, updates = all_rows(table), table.updates
    copied = tmp_path / "copied" / ("changed.safetensors" if kind.startswith("overlay") else "engram_table.dat")
    copied.parent.mkdir()
    table.copy_to(copied)
    table.write(torch.tensor([3, 4]), torch.ones(2, table.embedding_dim))
    table.write_state(state, torch.tensor([4]), torch.ones(1, 2))
    state.step = 6
    table.commit(step=8, extra={})
    table.restore_from(copied)
    assert np.array_equal(all_rows(table), before)
    assert np.array_equal(rows_in_files(kind, tmp_path), before)
    assert (table.committed_step, table.committed_extra, table.updates) == (7, {"epoch": 1}, updates)
    assert table.read_state(state, torch.tensor([3, 4])).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert state.step == 5
    copied.write_bytes(copied.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"checksum|damaged"):
        table.restore_from(copied)
    assert np.array_equal(all_rows(table), before)


# Where it is


def test_a_table_stays_where_it_was_opened_when_the_process_changes_folders(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Job launchers do. Everything that is written later goes beside the table, and a copy finds it."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    table = open_kind(kind, Path("here"))
    monkeypatch.chdir(tmp_path / "there")
    ids = torch.tensor([3, 17])
    wanted = torch.ones(2, table.embedding_dim, dtype=torch.float32)
    table.write(ids, wanted)
    optimizer = table.row_optimizer(RowAdam, lr=0.1)
    optimizer.step()
    table.commit(step=1)
    table.copy_to(tmp_path / "copy.dat")
    copied = copy.deepcopy(table)
    assert torch.equal(copied.gather(ids), wanted)
    assert list((tmp_path / "there").iterdir()) == []
    copied.close()
    table.close()
    assert np.array_equal(rows_in_files(kind, tmp_path / "here")[ids], wanted.numpy())
    again = open_kind(kind, tmp_path / "here")
    assert (again.committed_step, again.gather(ids).tolist()) == (1, wanted.tolist())
    again.close()
