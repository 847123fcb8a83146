"""Rows gathered from an array, compiled and plain, against NumPy; memory that is used again only when it is free."""

import ctypes
import sys
import threading
import types

import numpy as np
import pytest
import torch

from sense_v2.engram.reading import gather as gather_module
from sense_v2.engram.reading.gather import MANY_IDS, OutOfRangeError, RowGather
from sense_v2.engram.table.format import row_dtype

N = 3000
needs_compiled = pytest.mark.skipif(gather_module.compiled is None, reason="no _gather")
needs_exchange = pytest.mark.skipif(gather_module._exchange is None, reason="this PyTorch can't be handed memory")
WAYS = [
    "plain",
    pytest.param("compiled", marks=[needs_compiled, needs_exchange]),
    pytest.param("compiled, an older PyTorch", marks=needs_compiled),
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(gather_module, "compiled", None)
    elif request.param != "compiled":
        monkeypatch.setattr(gather_module, "_exchange", None)
    return request.param


def test_an_extension_of_another_version_is_done_without(monkeypatch):
    older = types.SimpleNamespace(__file__="_gather.so")
    monkeypatch.setattr(gather_module.importlib, "import_module", lambda name: older)
    with pytest.warns(UserWarning, match=r"_gather.so was compiled from another version's source"):
        assert gather_module._load_compiled() is None


def test_an_extension_that_is_missing_is_said_once(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(gather_module.importlib, "import_module", missing)
    with pytest.warns(UserWarning, match=r"has no compiled part.*several times slower.*C compiler") as said:
        assert gather_module._load_compiled() is None
    assert len(said) == 1


def test_an_extension_that_cant_be_loaded_is_said_with_its_error(monkeypatch):
    def broken(name):
        raise ImportError("_gather.abi3.so: invalid ELF header", name=name)

    monkeypatch.setattr(gather_module.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"invalid ELF header"):
        assert gather_module._load_compiled() is None


def table(width: int = 16, dtype: str = "float32", num_rows: int = N) -> np.ndarray:
    kind = row_dtype(dtype).numpy
    raw = np.random.default_rng(0).integers(0, 256, num_rows * width * kind.itemsize, dtype=np.uint8)
    return raw.view(kind).reshape(num_rows, width)


def raw(rows: torch.Tensor) -> bytes:
    flat = rows.reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def many(width: int = 16, seed: int = 0) -> torch.Tensor:
    """Enough ids for a result whose memory is used again."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, N, (128 << 10) // (4 * width)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [1, 3, 16, 64, 1024])
@pytest.mark.parametrize("num_ids", [0, 1, 7, MANY_IDS - 1, 5000])
def test_the_bytes_are_numpys(way, dtype, width, num_ids):
    rows_ND = table(width, dtype, 100)
    ids = np.random.default_rng(1).integers(0, 100, num_ids)
    for id_dtype in (np.int64, np.int32):
        rows = RowGather(rows_ND, row_dtype(dtype))(torch.from_numpy(ids.astype(id_dtype)))
        assert rows.dtype == row_dtype(dtype).torch
        assert raw(rows) == np.ascontiguousarray(rows_ND[ids]).tobytes()


def test_large_results_over_several_threads(way):
    rows_ND = table(256)
    ids = np.random.default_rng(1).integers(0, N, 40_001)  # past the size from which it is stored past the cache
    before = torch.get_num_threads()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        try:
            assert raw(RowGather(rows_ND, row_dtype("float32"))(torch.from_numpy(ids))) == rows_ND[ids].tobytes()
        finally:
            torch.set_num_threads(before)


# Ways of copying


@pytest.fixture
def any_way():
    """What a test fixes or finds is forgotten by the next."""
    yield
    gather_module.fix_way(None)


@needs_compiled
@pytest.mark.parametrize("fixed", gather_module.WAYS)
@pytest.mark.parametrize("row_bytes", [4, 60, 64, 100, 256, 1000, 1024, 2048, 3072, 4096, 8256])
def test_every_way_gives_the_same_bytes(any_way, fixed, row_bytes):
    rows_ND = table(row_bytes // 4, num_rows=300)
    gather_module.fix_way(fixed)
    for num_bytes in (600 << 10, 33 << 20):  # in the cache, and past it
        ids = np.random.default_rng(1).integers(0, 300, num_bytes // row_bytes + 1)
        rows = RowGather(rows_ND, row_dtype("float32"))(torch.from_numpy(ids))
        assert raw(rows) == rows_ND[ids].tobytes()


@needs_compiled
@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_fastest_way_is_found_on_the_results_themselves(any_way, num_threads):
    row_bytes = 4 * (700 + num_threads)  # a width that no other test has
    row_bytes -= row_bytes % 64
    rows_ND = table(row_bytes // 4)
    gather = RowGather(rows_ND, row_dtype("float32"))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for num_bytes, ways in ((2 << 20, gather_module.WAYS[:4]), (40 << 20, gather_module.WAYS)):
            past_the_cache = len(ways) == 8
            # Before PyTorch 2.10 each large result lies in fresh memory, whose page faults make timings worthless.
            out = None if gather._lookup is not None else torch.empty(num_bytes // row_bytes, row_bytes // 4)
            for seed in range(200):
                ids = np.random.default_rng(seed).integers(0, N, num_bytes // row_bytes)
                assert raw(gather(torch.from_numpy(ids), out=out)) == rows_ND[ids].tobytes()
                (found,) = (
                    one
                    for one in gather_module.found_ways()
                    if (one.row_bytes, one.past_the_cache) == (row_bytes, past_the_cache)
                )
                if found.way:
                    break
            assert found.ns_per_row.keys() == {*ways}
            # Or the usual way, if it is nearly as fast.
            assert 0.95 * found.ns_per_row[found.way] <= min(found.ns_per_row.values())
    finally:
        torch.set_num_threads(before)


@needs_compiled
def test_a_way_that_is_fixed_isnt_measured(any_way):
    gather_module.fix_way("ahead")
    rows_ND = table(333)
    ids = np.zeros(2000, dtype=np.int64)
    assert raw(RowGather(rows_ND, row_dtype("float32"))(torch.from_numpy(ids))) == rows_ND[ids].tobytes()
    assert 4 * 333 not in [one.row_bytes for one in gather_module.found_ways()]


def test_a_way_that_isnt_there_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="way = 'fast': must be None or one of 'one by one', 'ahead'"):
        gather_module.fix_way("fast")
    monkeypatch.setattr(gather_module, "compiled", None)
    with pytest.raises(RuntimeError, match="Install a C compiler"):
        gather_module.fix_way("ahead")
    assert gather_module.found_ways() == []


# Ids


def test_shapes_and_strides_of_the_ids(way):
    rows_ND, gather = table(), RowGather(table(), row_dtype("float32"))
    ids = torch.arange(24).reshape(2, 3, 4)
    for view in (ids, ids.transpose(0, 2), ids[:, 1:, ::2], ids[0, 0, 0], ids[:0]):
        rows = gather(view)
        assert rows.shape == (*view.shape, 16)
        assert raw(rows) == rows_ND[view.numpy()].tobytes()


@pytest.mark.parametrize("bad", [-1, N, -(2**31), 2**31 - 1, -(2**63), 2**63 - 1, -N])
@pytest.mark.parametrize("num_ids", [1, 16, 5000])
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_an_id_outside_is_named_and_nothing_is_copied(way, bad, num_ids, place):
    gather = RowGather(table(), row_dtype("float32"))
    for dtype in (torch.int64, torch.int32):
        if dtype == torch.int32 and not -(2**31) <= bad < 2**31:
            continue
        ids = torch.zeros(num_ids, dtype=dtype)
        ids[round(place * (num_ids - 1))] = bad
        out = torch.full((num_ids, 16), 7.0)
        with pytest.raises(OutOfRangeError, match=f"row id {bad}: there are rows 0 to {N - 1}"):
            gather(ids, out=out)
        assert (out == 7).all()


def test_out_is_filled(way):
    rows_ND = table(16, "bfloat16")
    out = torch.zeros(2, 2, 16, dtype=torch.bfloat16)
    assert RowGather(rows_ND, row_dtype("bfloat16"))(torch.tensor([[1, 2], [3, 4]]), out=out) is out
    assert raw(out) == rows_ND[[1, 2, 3, 4]].tobytes()


# Memory that is used again


def address(rows: torch.Tensor) -> int:
    return rows.untyped_storage().data_ptr()


def test_memory_is_used_again_and_begins_at_a_cache_line(way):
    gather = RowGather(table(), row_dtype("float32"))
    first = gather(many())
    where = address(first)
    assert where % 64 == 0
    del first
    second = gather(many(seed=1))
    assert address(second) % 64 == 0
    if way == "compiled":  # elsewhere every result is new memory
        assert address(second) == where


def keep_result(rows):
    return rows


def keep_view(rows):
    return rows[5:9].reshape(-1)


def keep_detached(rows):
    return rows.detach()


def keep_array(rows):
    return rows.numpy()[3:]


def keep_storage(rows):
    return rows.untyped_storage()


def keep_dlpack(rows):
    return np.from_dlpack(rows)


def keep_alias_of_another_type(rows):
    return rows.view(torch.int32)


def keep_saved_for_backward(rows):
    weight = torch.ones(16, requires_grad=True)
    return (weight * rows).sum()


def keep_leaf(rows):
    return (rows.requires_grad_() ** 2).sum()


ALIASES = (keep_result, keep_view, keep_detached, keep_storage, keep_saved_for_backward, keep_leaf)
# NumPy has no bfloat16.
THROUGH_NUMPY = (keep_array, keep_dlpack, keep_alias_of_another_type)


@pytest.mark.parametrize(
    ("keep", "dtype"),
    [(keep, dtype) for keep in ALIASES for dtype in ("float32", "bfloat16")]
    + [(keep, "float32") for keep in THROUGH_NUMPY],
)
def test_memory_that_is_referred_to_is_not_used_again(way, keep, dtype):
    gather = RowGather(table(16, dtype), row_dtype(dtype))
    ids = torch.cat([many(), many()])
    rows = gather(ids)
    where, expected = address(rows), raw(rows)
    kept = keep(rows)
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * len(expected)).from_address(where))
    del rows
    others = [gather(many(seed=seed)) for seed in range(3)]
    assert where not in [address(other) for other in others]
    assert memory.tobytes() == expected
    assert len({address(other) for other in others}) == 3
    del kept


def test_gradients_over_two_live_results(way):
    rows_ND = table()
    rows_ND = np.nan_to_num(rows_ND, nan=1, posinf=1, neginf=1).clip(-9, 9)
    gather = RowGather(rows_ND, row_dtype("float32"))
    weight = torch.ones(16, requires_grad=True)
    total = sum((weight * gather(many(seed=seed))).sum() for seed in range(4))
    total.backward()
    expected = sum(rows_ND[many(seed=seed).numpy()].astype(np.float64).sum(0) for seed in range(4))
    np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=1e-3, atol=1e-2)


def test_threads_never_share_a_buffer(way):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    rows_ND = table()
    gather = RowGather(rows_ND, row_dtype("float32"))
    wrong = []

    def work(seed: int) -> None:
        for turn in range(60):
            ids = many(seed=100 * seed + turn)
            if raw(gather(ids)) != rows_ND[ids.numpy()].tobytes():
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
