"""Rows changed on top of a table: against a dictionary, and against a copy of the table that is trained itself."""

import hashlib
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from checkpoints import deepseek_rows, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import D, N, make, on_disk

from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.optim import RowAdam, RowWiseAdagrad
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.convert import convert_table


@pytest.fixture
def table(tmp_path):
    make(tmp_path / "engram_table.dat", init_std=1.0).close()
    return tmp_path / "engram_table.dat"


def overlay_on(table, name="facts.safetensors", mode="r+", **base):
    path = None if name is None else table.with_name(name)
    return OverlayStorage(MMapEmbeddingStorage(N, D, table, mode="r", **base), path, mode=mode).eval()


def digest(*paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def rows_of(*row_ids, value=1.0):
    return torch.tensor(row_ids), torch.full((len(row_ids), D), value)


# Reading and writing


def test_changed_rows_come_from_the_overlay_and_all_others_from_the_base_bit_for_bit(table):
    before, files = on_disk(table), [table, table.with_suffix(".json")]
    untouched = digest(*files)
    overlay = overlay_on(table)
    overlay.write(*rows_of(40, 3))
    overlay.commit(step=7, extra={"epoch": 1})
    expected = before.copy()
    expected[[40, 3]] = 1
    for _ in range(2):
        ids = torch.tensor([[[3, 0], [49, 40]]])
        found = overlay(ids)
        assert found.shape == (1, 2, 2, D)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected[ids.numpy()])
        np.testing.assert_array_equal(overlay.gather(torch.arange(N, dtype=torch.int32)).numpy(), expected)
        assert (overlay.committed_step, overlay.committed_extra) == (7, {"epoch": 1})
        overlay.close()
        overlay = overlay_on(table, mode="r")
    overlay.close()
    assert digest(*files) == untouched


operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, N - 1), min_size=1, max_size=6, unique=True)),
        st.tuples(st.just("forget"), st.lists(st.integers(0, N - 1), min_size=1, max_size=6, unique=True)),
        st.tuples(st.sampled_from(["commit", "discard", "reopen"]), st.just([])),
    ),
    max_size=12,
)


@settings(max_examples=25)
@given(operations=operations)
def test_any_order_of_calls_gives_what_a_dictionary_gives(tmp_path_factory, operations):
    table = tmp_path_factory.mktemp("table") / "engram_table.dat"
    make(table).close()
    base = on_disk(table)
    overlay, changed, committed = overlay_on(table), {}, {}
    for number, (name, row_ids) in enumerate(operations):
        if name == "write":
            rows = torch.arange(len(row_ids) * D).reshape(-1, D) + 100.0 * number
            overlay.write(torch.tensor(row_ids), rows)
            changed.update(zip(row_ids, rows.numpy(), strict=True))
        elif name == "forget":
            overlay.forget(torch.tensor(row_ids))
            changed = {row_id: row for row_id, row in changed.items() if row_id not in row_ids}
        elif name == "commit":
            overlay.commit()
            committed = dict(changed)
        else:
            if name == "reopen":
                overlay.release().close()
                overlay = overlay_on(table)
            overlay.discard()
            changed = dict(committed)
        assert overlay.changed_ids.tolist() == sorted(changed)
        expected = base.copy()
        for row_id, row in changed.items():
            expected[row_id] = row
        np.testing.assert_array_equal(overlay(torch.arange(N)).numpy(), expected)
    overlay.release().close()


def test_without_a_path_rows_change_in_memory_and_are_exported_where_they_are_wanted(table):
    overlay = overlay_on(table, name=None)
    overlay.write(*rows_of(5))
    overlay.commit(step=3)
    assert sorted(file.name for file in table.parent.iterdir()) == [
        "engram_table.dat",
        "engram_table.json",
        "engram_table.lock",
    ]
    overlay.copy_to(table.with_name("sent.safetensors"), states=False)
    overlay.discard()
    assert overlay.changed_ids.tolist() == []
    overlay.close()
    sent = overlay_on(table, "sent.safetensors", mode="r")
    assert sent.changed_ids.tolist() == [5]
    assert sent.committed_step == 3
    sent.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_have_the_type_of_the_table(tmp_path, dtype):
    table = tmp_path / "engram_table.dat"
    make(table, dtype=dtype).close()
    overlay = overlay_on(table, dtype=dtype)
    overlay.write(torch.tensor([2]), torch.full((1, D), 1 / 3))
    overlay.commit()
    assert overlay(torch.tensor([2])).dtype == getattr(torch, dtype)
    assert torch.equal(overlay(torch.tensor([2])), torch.full((1, D), 1 / 3).to(getattr(torch, dtype)))
    assert overlay.gather(torch.tensor([2])).dtype == torch.float32
    overlay.close()


@pytest.mark.parametrize(("dtype", "looked_up"), [("int8", torch.float32), ("float8_e4m3fn", torch.bfloat16)])
def test_a_table_that_is_only_read_can_be_trained_on_top_of(table, dtype, looked_up):
    compact = table.with_name(f"{dtype}.dat")
    convert_table(table, compact, dtype)
    untouched = digest(compact)
    overlay = OverlayStorage(MMapEmbeddingStorage(N, D, compact, dtype=dtype, mode="r"), table.with_name("d")).eval()
    before = overlay(torch.arange(N))
    steps(overlay, RowAdam(overlay, lr=0.1), [torch.tensor([1, 4])])
    overlay.commit()
    after = overlay(torch.arange(N))
    assert after.dtype == looked_up
    assert (after != before).any(dim=1).nonzero()[:, 0].tolist() == [1, 4]
    overlay.close()
    assert digest(compact) == untouched


def test_a_released_table_can_be_trained_on_top_of(tmp_path):
    codes, scales = deepseek_rows(6)
    name = "layers.1.engram.embed"
    write_shard(
        tmp_path / "model.safetensors",
        {
            f"{name}.weight": ("F8_E4M3", (6, 256), codes.tobytes()),
            f"{name}.scale": ("F8_E8M0", (6, 8), scales.tobytes()),
        },
    )
    untouched = digest(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="not checked"):
        base = open_released_table(tmp_path / "model.safetensors", 1)
    before = base(torch.arange(6))
    overlay = OverlayStorage(base, tmp_path / "facts.safetensors").eval()
    steps(overlay, RowWiseAdagrad(overlay, lr=0.1), [torch.tensor([5, 0])])
    overlay.commit()
    overlay.release()
    with pytest.warns(UserWarning, match="not checked"):
        base = open_released_table(tmp_path / "model.safetensors", 1)
    again = OverlayStorage(base, tmp_path / "facts.safetensors").eval()
    assert again.changed_ids.tolist() == [0, 5]
    assert torch.equal(again(torch.arange(1, 5)), before[1:5])
    assert (again(torch.tensor([0, 5])) != before[[0, 5]]).any(dim=1).all()
    again.close()
    assert digest(tmp_path / "model.safetensors") == untouched


# Training


def steps(storage, optimizer, batches):
    storage.train()
    for ids in batches:
        storage(ids).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    storage.eval()


@pytest.mark.parametrize("make_optimizer", [RowAdam, RowWiseAdagrad])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_gives_the_rows_and_states_that_training_the_table_gives(tmp_path, dtype, make_optimizer):
    table, copy = tmp_path / "engram_table.dat", tmp_path / "copy.dat"
    make(table, dtype=dtype, init_std=1.0).close()
    for suffix in (".dat", ".json"):
        shutil.copy(table.with_suffix(suffix), copy.with_suffix(suffix))
    batches = [torch.tensor([[1, 2, 2], [9, 1, 30]]), torch.tensor([9, 8, 7]), torch.tensor([2, 3])]
    trained = make(copy, dtype=dtype).eval()
    steps(trained, make_optimizer(trained, lr=0.1), batches)
    overlay = overlay_on(table, dtype=dtype)
    optimizer = make_optimizer(overlay, lr=0.1)
    steps(overlay, optimizer, batches[:2])
    overlay.commit(step=2)
    overlay.close()
    overlay = overlay_on(table, dtype=dtype)
    optimizer = make_optimizer(overlay, lr=0.1)
    steps(overlay, optimizer, batches[2:])
    assert torch.equal(overlay(torch.arange(N)), trained(torch.arange(N)))
    ours, theirs = optimizer.state_file, trained.open_state(optimizer.state_file.name, optimizer.state_file.width)
    assert ours.step == theirs.step or make_optimizer is RowWiseAdagrad
    assert torch.equal(overlay.read_state(ours, torch.arange(N)), theirs.values)
    assert overlay.changed_ids.tolist() == [1, 2, 3, 7, 8, 9, 30]
    trained.commit()
    trained.close()
    overlay.release().close()


# What is refused


def test_another_base_is_refused_with_both_digests_named(table):
    overlay = overlay_on(table)
    overlay.write(*rows_of(1))
    overlay.commit()
    overlay.close()
    other = make(table)
    other.write(*rows_of(2))
    other.commit()
    other.close()
    untouched = digest(table.with_name("facts.safetensors"))
    with pytest.raises(ValueError, match=r"another table than .*digest '[0-9a-f]{64}', here '[0-9a-f]{64}'"):
        overlay_on(table)
    assert digest(table.with_name("facts.safetensors")) == untouched
    # The lock was given back.
    OverlayStorage(MMapEmbeddingStorage(N, D, table, mode="r"), table.with_name("new.safetensors")).close()


def test_a_base_that_means_something_else_is_refused_though_its_rows_are_equal(tmp_path):
    for seed in (1, 2):
        zeros = {"sparse": True, "provenance": {"seed": seed}}
        MMapEmbeddingStorage(N, D, tmp_path / f"{seed}.dat", **zeros).close()
    overlay = OverlayStorage(MMapEmbeddingStorage(N, D, tmp_path / "1.dat", mode="r"), tmp_path / "d")
    overlay.commit()
    overlay.close()
    with pytest.raises(ValueError, match="seed 1, here 2"):
        OverlayStorage(MMapEmbeddingStorage(N, D, tmp_path / "2.dat", mode="r"), tmp_path / "d")


def test_a_base_that_is_open_to_be_written_is_refused(table):
    base = make(table)
    with pytest.raises(ValueError, match=r"mode='r\+', and a base is only read"):
        OverlayStorage(base)
    base.close()


def test_a_second_writer_is_refused(table):
    overlay = overlay_on(table)
    with pytest.raises(BlockingIOError, match="open for writing in this process"):
        overlay_on(table)
    overlay.close()
    overlay_on(table).close()


def test_rows_that_are_no_numbers_are_not_committed_and_the_last_commit_stays(table):
    overlay = overlay_on(table)
    overlay.write(*rows_of(1))
    overlay.commit()
    before = digest(overlay.path)
    overlay.write(*rows_of(2, value=float("nan")))
    with pytest.raises(ValueError, match="row 2 has NaN or infinite values in rows"):
        overlay.commit()
    assert digest(overlay.path) == before
    with pytest.warns(UserWarning, match="1 updates since its last commit"):
        overlay.close()


# Crashes


def test_a_process_killed_in_a_commit_leaves_the_last_one(table, monkeypatch):
    from sense_v2.engram.table import disk

    overlay = overlay_on(table)
    overlay.write(*rows_of(1))
    overlay.commit(step=1)
    overlay.close()
    before = digest(table.with_name("facts.safetensors"))

    def killed_at(number):
        calls = 0

        class Os:
            def __getattr__(self, name):
                found = getattr(os, name)
                if name not in ("pwrite", "fsync", "replace", "ftruncate", "posix_fallocate"):
                    return found

                def counted(*arguments):
                    nonlocal calls
                    if calls == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    calls += 1
                    return found(*arguments)

                return counted

        child = os.fork()
        if child == 0:
            try:
                storage = overlay_on(table)
                storage.write(*rows_of(1, 2, value=2.0))
                disk.os = Os()
                storage.commit(step=2)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for number in range(30):
        if killed_at(number) == 0:
            break
        overlay = overlay_on(table)
        is_new = overlay.committed_step == 2
        assert overlay.changed_ids.tolist() == ([1, 2] if is_new else [1])
        assert float(overlay(torch.tensor([1]))[0, 0]) == (2.0 if is_new else 1.0)
        overlay.close()
        if not is_new:
            assert digest(table.with_name("facts.safetensors")) == before
    else:
        pytest.fail("the commit never came to its end")
    assert 5 < number < 30
    overlay = overlay_on(table)
    assert overlay.committed_step == 2
    overlay.close()
