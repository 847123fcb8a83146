"""What every table does when it is looked up: one suite over all of them, against the bytes in their files."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from row_sources import (
    CHANGED,
    KINDS,
    MAPPED,
    OVERLAYS,
    READ_ONLY,
    RELEASED,
    SHARDED,
    TRAINABLE,
    open_kind,
    rows_in_files,
    type_of,
    width_of,
)
from tables import N, make, names
from torch import nn

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.reading import gather
from sense_v2.engram.table.checksums import block_sums, to_hex

IDS = st.lists(st.integers(0, 4), max_size=4)


@pytest.fixture(params=KINDS)
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


@pytest.mark.skipif(gather.compiled is None, reason="no _gather")
def test_every_way_of_copying_gives_the_same_rows(table: Any, rows: np.ndarray[Any, Any]) -> None:
    num_ids = (600 << 10) // (table.embedding_dim * table.dtype.itemsize)  # large enough for a choice
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, N, num_ids))
    try:
        for way in (None, *gather.WAYS):
            gather.fix_way(way)
            assert np.array_equal(look_up(table, ids).detach().float().numpy(), rows[ids.numpy()]), way
    finally:
        gather.fix_way(None)


def test_what_a_table_says_of_itself(kind: str, table: Any, tmp_path: Path) -> None:
    assert (table.num_embeddings, table.embedding_dim, table.dtype) == (N, width_of(kind), type_of(kind))
    assert table.mode == ("r" if kind in READ_ONLY else "r+")
    assert table.path.parent == tmp_path
    assert (table.manifest.rows, table.manifest.width) == (N, width_of(kind))
    assert table.is_released == (kind.removeprefix("overlay on ") in RELEASED)
    assert table.needs_all_ranks == (kind in SHARDED)
    assert table.is_in_shards == (kind == "ranks, shards")
    assert table.collects_gradients == (kind in TRAINABLE)
    assert isinstance(table.is_new, bool)
    assert table.reads_the_disk in (True, False)
    is_overlay = kind.startswith("overlay")
    assert (table.table is table) == (not is_overlay)
    assert table.changed_ids.tolist() == (sorted(CHANGED) if is_overlay else [])
    if table.is_released:
        assert (table.belongs_to.variant, table.belongs_to.layer) in (("deepseek_v41", 1), ("qwen_ple", 1))
    if table.is_released or table.is_in_shards or kind.endswith("joined"):
        with pytest.raises(ValueError, match=r"sense-engram convert|copy_to"):
            table.whole_table  # noqa: B018
    else:
        assert table.whole_table.path.name == "engram_table.dat"
    identity = table.identity()
    assert (identity.rows, identity.width) == (N, width_of(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.close()
    again = open_kind(kind, tmp_path)
    assert again.identity() == identity
    again.close()


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_ids_of_any_shape(kind: str, table: Any, rows: np.ndarray[Any, Any], data: st.DataObject) -> None:
    shape = data.draw(IDS)
    ids = np.array(data.draw(st.lists(st.integers(0, N - 1), min_size=(n := int(np.prod(shape))), max_size=n)))
    ids = ids.astype(data.draw(st.sampled_from(["int64", "int32"]))).reshape(shape)
    training, grad = data.draw(st.booleans()), data.draw(st.booleans())
    with torch.set_grad_enabled(grad):
        found = look_up(table.train(training), torch.from_numpy(ids))
    assert found.shape == (*shape, width_of(kind))
    assert found.dtype == type_of(kind)
    assert found.device.type == "cpu"
    assert found.requires_grad == (training and grad and kind in TRAINABLE)
    assert np.array_equal(found.detach().float().numpy(), rows[ids])
    gathered = table.gather(torch.from_numpy(ids).flatten())
    assert (gathered.dtype, gathered.requires_grad) == (torch.float32, False)
    assert np.array_equal(gathered.numpy(), rows[ids.flatten()])


def test_ids_in_any_memory_layout(table: Any, rows: np.ndarray[Any, Any]) -> None:
    ids = torch.arange(48).reshape(6, 8)
    for view in (ids.T, ids[::2, 1::3], ids[0].expand(5, 8), ids[5, 7]):
        for training in (True, False):
            found = look_up(table.train(training), view)
            assert np.array_equal(found.detach().float().numpy(), rows[view.numpy()])


def calls_with(table: Any) -> Iterator[Callable[[Any], Any]]:
    """Every call that takes row ids, in training and in use."""
    yield table.train()
    yield table.eval()
    yield from (table.gather, table.begin, table.prefetch)
    if table.mode == "r+":
        yield table.protect
        yield lambda ids: table.write(ids, torch.zeros(len(ids), table.embedding_dim))


@pytest.mark.parametrize("bad", [-1, N, N + 5, -(2**31), 2**31 - 1, 2**62])
def test_an_id_outside_the_table_is_named(kind: str, table: Any, bad: int) -> None:
    look_up(table.eval(), torch.tensor([1, 2, 3]))
    table.reads_the_disk  # noqa: B018
    for dtype in (torch.int64, torch.int32):
        if dtype == torch.int32 and bad == 2**62:
            continue
        ids = torch.tensor([1, 2, bad, 3], dtype=dtype)
        for call in calls_with(table):
            with pytest.raises(IndexError, match=rf"row id {bad}: .*/.* has rows 0 to {N - 1}$"):
                call(ids)
    if kind in TRAINABLE:
        assert table.gradients() is None


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1 + 0j]), [1, 2], "3"])
def test_ids_must_be_integers(table: Any, ids: Any) -> None:
    for call in calls_with(table):
        with pytest.raises(TypeError, match="row ids are a tensor of int64 or int32, not"):
            call(ids)


def test_what_was_prefetched_reads_the_same(table: Any, rows: np.ndarray[Any, Any]) -> None:
    table.eval()
    for ids in (torch.tensor([7, 7, 0]), torch.arange(N).repeat(40), torch.empty(0, dtype=torch.int32)):
        expected = rows[ids.numpy()]
        table.begin(ids)
        asked = ids.clone()
        table.prefetch(asked)
        asked.zero_()  # the caller's to change
        assert np.array_equal(table(ids).float().numpy(), expected)


def test_results_stay_as_they_are(table: Any, rows: np.ndarray[Any, Any]) -> None:
    """Whatever is looked up later; and what is done to one changes neither the table nor another."""
    table.eval()
    held = []
    for number in range(60):
        ids = (torch.arange(1 + number % 20) * 7 + number) % N
        held.append((look_up(table, ids), rows[ids.numpy()]))
    for found, expected in held:
        assert np.array_equal(found.float().numpy(), expected)
        found.zero_()
    assert np.array_equal(look_up(table, torch.arange(N)).float().numpy(), rows)


def test_lookups_from_eight_threads(table: Any, rows: np.ndarray[Any, Any]) -> None:
    if table.needs_all_ranks:
        return  # each rank's lookups are calls in one order, from one thread
    table.eval()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        start.wait()
        for size in (300, 3, 17, 300) * 5:
            ids = random.integers(0, N, size)
            assert np.array_equal(table(torch.from_numpy(ids)).float().numpy(), rows[ids])

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result()


def test_a_table_is_no_part_of_a_state_dict_and_is_never_cast(
    kind: str, table: Any, rows: np.ndarray[Any, Any]
) -> None:
    address = table.weight.data_ptr() if kind in MAPPED else None
    model = nn.ModuleDict({"table": table, "linear": nn.Linear(2, 2)})
    assert list(table.parameters()) == list(table.buffers()) == []
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    model.load_state_dict(model.state_dict())
    model.half().to(torch.float64).bfloat16()
    model.requires_grad_(False)
    assert model["linear"].weight.dtype == torch.bfloat16
    assert table.dtype == type_of(kind)
    if kind in MAPPED:
        assert (table.weight.data_ptr(), table.weight.dtype) == (address, table.dtype)
    assert np.array_equal(look_up(table.eval(), torch.arange(N)).float().numpy(), rows)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_run_and_a_replaced_forward_is_used(kind: str, table: Any, tmp_path: Path, training: bool) -> None:
    ids, seen = torch.tensor([1, 2]), []
    table.train(training)
    with table.register_forward_hook(lambda *_: seen.append("after")):
        look_up(table, ids)
        with table.register_forward_pre_hook(lambda *_: seen.append("before")):
            look_up(table, ids)
    look_up(table, ids)
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append("global") if module is table else None
    ):
        look_up(table, ids)
    assert seen == ["after", "before", "after", "global"]
    plain = look_up(table, ids).detach()
    forward = table.forward
    table.forward = lambda row_ids: forward(row_ids) * 2  # as accelerate's hooks do
    assert torch.equal(look_up(table, ids), plain * 2)
    del table.forward
    assert torch.equal(look_up(table, ids), plain)

    class Doubled(type(table)):  # type: ignore[misc]
        def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(row_ids) * 2

    table.__class__ = Doubled
    assert torch.equal(look_up(table, ids), plain * 2)


def test_a_copy_opens_the_same_files_read_only(
    kind: str, table: Any, rows: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind in TRAINABLE:
        table.train()
        look_up(table, torch.tensor([1])).sum().backward()
    copies = [copy.deepcopy(table), copy.copy(table)]
    monkeypatch.chdir("/")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copies += [pickle.loads(pickle.dumps(table.eval())), pickle.loads(pickle.dumps(copies[0]))]
    for copied in copies:
        assert (copied.mode, copied.dtype) == ("r", table.dtype)
        assert np.array_equal(copied(torch.arange(N)).float().numpy(), rows)
        assert copied.gradients() is None
        copied.close()
    assert np.array_equal(look_up(table, torch.arange(N)).float().numpy(), rows)


def test_a_copy_keeps_the_rows_of_its_moment(kind: str, table: Any, tmp_path: Path) -> None:
    if kind not in TRAINABLE:
        return
    ids, every = torch.arange(5, 25), torch.arange(N)
    table.write(torch.tensor([7, 30]), torch.full((2, width_of(kind)), 0.5))  # not committed, and of this moment
    then = table.gather(every)
    copied = copy.deepcopy(table.eval())
    for value, commit in ((1.0, False), (2.0, True), (3.0, False)):
        table.write(ids, torch.full((20, width_of(kind)), value))
        if commit:
            table.commit(step=3)
        again = copy.copy(copied)  # a copy of a copy is of the same moment
        for one in (copied, again):
            one.begin(every)
            assert torch.equal(one(every).float(), then)
            assert torch.equal(one(every.int().view(5, -1)).float(), then.view(5, -1, width_of(kind)))
            assert torch.equal(one.train()(ids).float(), then[ids])
            assert torch.equal(one.eval().gather(ids[:3]), then[ids[:3]])
    assert (table.gather(ids) == 3).all()
    now = copy.deepcopy(table)
    table.write(ids, torch.zeros(20, width_of(kind)))
    assert (now.gather(ids) == 3).all()
    if table.own is table.table:  # one file
        copied.copy_to(tmp_path / "then" / "engram_table.dat", states=False)
        copied.close()
        of_then = make(
            tmp_path / "then" / "engram_table.dat", dtype=str(table.dtype).removeprefix("torch."), mode="r"
        )
        assert torch.equal(of_then.gather(every), then)
        assert to_hex(block_sums(of_then.mmap.view(np.uint8))) == of_then.manifest.checksums


def test_a_pickle_is_of_a_commit(kind: str, table: Any) -> None:
    if kind not in TRAINABLE:
        return
    ids, every = torch.tensor([7, 30]), torch.arange(N)
    table.write(ids, torch.full((2, width_of(kind)), 0.5))
    if not kind.startswith("overlay"):  # which has its changes with it
        with pytest.raises(ValueError, match=r"updates since its last commit.*commit\(\) before it is pickled"):
            pickle.dumps(table)
    table.commit()
    data, then = pickle.dumps(table), table.gather(every)
    loaded = pickle.loads(data)
    table.write(ids, torch.zeros(2, width_of(kind)))
    assert torch.equal(loaded.gather(every), then)
    table.commit()
    if not kind.startswith("overlay"):
        with pytest.raises(ValueError, match="has gone on since it was pickled"):
            pickle.loads(data)


def test_what_is_only_read_refuses_every_way_to_write(kind: str, table: Any, tmp_path: Path) -> None:
    if kind in TRAINABLE:
        return
    files = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()}
    assert not look_up(table.train(), torch.tensor([1])).requires_grad
    if kind in RELEASED:
        with pytest.raises(ValueError, match="only read"):
            table.requires_grad_()
    ids = torch.tensor([1])
    for what, name, arguments in (
        ("write rows", "write", (ids, torch.zeros(1, width_of(kind)))),
        ("write rows", "protect", (ids,)),
        ("commit", "commit", ()),
        ("commit", "flush", ()),
        ("open an optimizer state", "open_state", ("adam", 2)),
    ):
        if hasattr(table, name):
            with pytest.raises(PermissionError, match=rf"open with mode='r': can't {what}\. Open it with mode='r\+'"):
                getattr(table, name)(*arguments)
    with pytest.raises(ValueError, match="read-only"):
        RowAdam(table)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.iterdir()} == files


def test_a_closed_table_says_so(kind: str, table: Any, rows: np.ndarray[Any, Any], tmp_path: Path) -> None:
    held = look_up(table.eval(), torch.arange(20))
    table.close()
    table.close()
    assert np.array_equal(held.float().numpy(), rows[:20])
    calls = [*calls_with(table)]
    for call in calls:
        with pytest.raises(RuntimeError, match="the storage is closed; make a new one to open the table again"):
            call(torch.tensor([1]))
    for name, arguments in (("commit", ()), ("flush", ()), ("open_state", ("adam", 2))):
        if kind in TRAINABLE:
            with pytest.raises(RuntimeError, match="the storage is closed"):
                getattr(table, name)(*arguments)
    assert table.gradients() is None
    assert type(table).__name__ in repr(table)
    del held
    maps = Path("/proc/self/maps")
    if maps.exists() and kind not in RELEASED and kind not in OVERLAYS:
        assert str(tmp_path) not in maps.read_text()
    assert names(tmp_path)
