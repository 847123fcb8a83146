"""Small batches of a warm table, which the extension reads in one call: modules and autograd keep their promises."""

import ctypes
import gc
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import in_a_fork
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sense_v2.engram.reading import gather
from sense_v2.engram.reading.reader import RowReader
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.format import row_dtype

pytestmark = pytest.mark.skipif(
    gather.compiled is None or gather._exchange is None,
    reason="the extension wasn't compiled, or this PyTorch can't be handed memory",
)
N_ROWS, WIDTH = 512, 16


def warm(folder: Path, dtype: str = "float32") -> MMapEmbeddingStorage:
    """In eval mode, and known to be in memory."""
    storage = MMapEmbeddingStorage(N_ROWS, WIDTH, folder / "engram_table.dat", dtype=dtype).eval()
    storage(torch.arange(N_ROWS))
    return known_to_be_warm(storage)


def known_to_be_warm(storage: MMapEmbeddingStorage) -> MMapEmbeddingStorage:
    """However slow this machine is."""
    small = storage._small
    small.batches_to_ask, small.slow, small.slow_ns = 0, False, 10**12
    return storage


def expected(storage: MMapEmbeddingStorage, ids: torch.Tensor) -> np.ndarray:
    file = np.fromfile(storage.path, storage.mmap.dtype).reshape(N_ROWS, WIDTH)
    return file[ids.numpy()]


def bits(rows: torch.Tensor) -> bytes:
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def never_forward(monkeypatch):
    """Whatever reads a row reads it in the extension."""
    monkeypatch.setattr(RowReader, "read", lambda *arguments, **keywords: pytest.fail("went the long way"))


@pytest.mark.usefixtures("never_forward")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (16,), (2, 3, 4), (1, 1, 1023), (1, 2, 1, 2, 1, 2, 1)])
def test_the_bytes_are_the_files(tmp_path, dtype, shape):
    storage = known_to_be_warm(MMapEmbeddingStorage(N_ROWS, WIDTH, tmp_path / "t.dat", dtype=dtype).eval())
    ids = torch.randint(0, N_ROWS, shape, generator=torch.Generator().manual_seed(0))
    for row_ids in (ids, ids.int()):
        rows = storage(row_ids)
        assert (rows.shape, rows.dtype, rows.requires_grad) == ((*shape, WIDTH), storage.dtype, False)
        assert rows.is_contiguous()
        assert rows.untyped_storage().data_ptr() % 64 == 0
        assert bits(rows) == expected(storage, ids).tobytes()


def test_results_that_live_never_share_memory_and_dropped_ones_are_used_again(tmp_path):
    storage = warm(tmp_path)
    batches = [torch.arange(k, k + 8) for k in range(40)]
    results = [storage(ids) for ids in batches]
    places = {rows.untyped_storage().data_ptr() for rows in results}
    assert len(places) == 40
    for ids, rows in zip(batches, results, strict=True):
        assert bits(rows) == expected(storage, ids).tobytes()
    view = results[-1][3]
    where, kept = results[-1].untyped_storage().data_ptr(), bits(view)
    del rows, results
    assert storage(batches[0]).untyped_storage().data_ptr() in places - {where}
    assert where not in [storage(ids).untyped_storage().data_ptr() for ids in batches]
    assert bits(view) == kept


def test_what_autograd_saved_stays(tmp_path):
    storage = warm(tmp_path)
    weight = torch.ones(WIDTH, requires_grad=True)
    total = sum((weight * storage(torch.arange(k, k + 4))).sum() for k in range(20))
    for _ in range(20):
        storage(torch.zeros(4, dtype=torch.int64))
    total.backward()
    rows = sum(expected(storage, torch.arange(k, k + 4)).sum(0) for k in range(20))
    np.testing.assert_allclose(weight.grad.numpy(), rows, rtol=1e-5, atol=1e-6)


def test_a_result_may_be_stored_to(tmp_path):
    storage = warm(tmp_path)
    before = expected(storage, torch.arange(N_ROWS)).tobytes()
    storage(torch.tensor([3])).fill_(7)
    assert expected(storage, torch.arange(N_ROWS)).tobytes() == before
    assert bits(storage(torch.tensor([3]))) == expected(storage, torch.tensor([3])).tobytes()


def test_training_goes_the_way_of_gradients(tmp_path):
    storage = warm(tmp_path)
    ids = torch.tensor([5, 9])
    assert not storage(ids).requires_grad
    storage.train()
    rows = storage(ids)
    rows.sum().backward()
    assert storage.gradients()[0].tolist() == [5, 9]
    with torch.no_grad():
        assert not storage(ids).requires_grad


class Doubled(MMapEmbeddingStorage):
    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(row_ids)


@pytest.mark.parametrize("training", [False, True])
def test_a_subclass_forward_is_used(tmp_path, training):
    storage = Doubled(N_ROWS, WIDTH, tmp_path / "engram_table.dat").train(training)
    ids = torch.tensor([1, 2])
    for _ in range(3):  # the first batch asks the kernel, the others needn't
        assert bits(storage(ids).detach()) == (2 * expected(storage, ids)).tobytes()


@pytest.mark.parametrize("training", [False, True])
def test_an_instances_own_forward_is_used(tmp_path, training):
    storage, ids = warm(tmp_path).train(training), torch.tensor([1, 2])
    storage.forward = lambda row_ids: row_ids + 1
    assert storage(ids).tolist() == [2, 3]
    del storage.forward
    assert bits(storage(ids).detach()) == expected(storage, ids).tobytes()


@pytest.mark.parametrize("training", [False, True])
def test_accelerates_hooks_are_called(tmp_path, training):
    hooks = pytest.importorskip("accelerate.hooks")
    storage, ids = warm(tmp_path).train(training), torch.tensor([1, 2])

    class OneFurther(hooks.ModelHook):
        def pre_forward(self, module, row_ids):
            return (row_ids + 1,), {}

        def post_forward(self, module, rows):
            return -rows

    hooks.add_hook_to_module(storage, OneFurther())
    assert bits(storage(ids).detach()) == (-expected(storage, ids + 1)).tobytes()
    hooks.remove_hook_from_module(storage)
    assert bits(storage(ids).detach()) == expected(storage, ids).tobytes()


@pytest.mark.parametrize("where", ["forward_pre", "forward", "everywhere_pre", "everywhere"])
def test_hooks_see_small_batches(tmp_path, where):
    storage, seen = warm(tmp_path), []
    ids = torch.tensor([1, 2])
    storage(ids)
    hook = lambda module, *_: seen.append(module)  # noqa: E731
    if where == "everywhere":
        handle = register_module_forward_hook(hook)
    elif where == "everywhere_pre":
        handle = register_module_forward_pre_hook(hook)
    else:
        handle = getattr(storage, f"register_{where}_hook")(hook)
    try:
        storage(ids)
        nn.Sequential(storage).eval()(ids)
    finally:
        handle.remove()
    assert [module for module in seen if module is storage] == [storage, storage]
    storage(ids)
    assert [module for module in seen if module is storage] == [storage, storage]


def test_keywords_and_wrong_calls_are_forwards(tmp_path):
    storage = warm(tmp_path)
    assert torch.equal(storage(row_ids=torch.tensor([1])), storage(torch.tensor([1])))
    for arguments in ((), (torch.tensor([1]), torch.tensor([1]))):
        with pytest.raises(TypeError, match="forward"):
            storage(*arguments)
    with pytest.raises(TypeError, match="row ids are a tensor of int64 or int32"):
        storage([1])
    with pytest.raises(IndexError, match=rf"row id {N_ROWS}: .*engram_table.dat has rows 0 to {N_ROWS - 1}"):
        storage(torch.tensor([1, N_ROWS]))
    storage.close()
    with pytest.raises(RuntimeError, match="the storage is closed"):
        storage(torch.tensor([1]))


def test_a_storage_whose_hook_refers_to_it_is_collected(tmp_path):
    storage = warm(tmp_path)
    storage.register_forward_hook(lambda *_, itself=storage: None)
    gone = [weakref.ref(storage), weakref.ref(storage._reader)]
    del storage
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_threads_read_at_once(tmp_path):
    storage, wrong = warm(tmp_path), []
    rows = expected(storage, torch.arange(N_ROWS))

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(300):
            ids = torch.randint(0, N_ROWS, (17,), generator=generator)
            if bits(storage(ids)) != rows[ids.numpy()].tobytes():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_large_reads_in_a_forked_child_of_a_process_that_used_threads():
    """Which the child doesn't have: waiting for them it would never end."""
    rows_ND = np.random.default_rng(0).standard_normal((4096, 256), dtype=np.float32)
    ids = torch.randint(0, 4096, (5000,), generator=torch.Generator().manual_seed(0))
    lookup = gather.lookup_of(rows_ND, torch.float32)
    assert lookup is not None
    assert bits(lookup.gather(ids, 2)) == rows_ND[ids.numpy()].tobytes()
    child = in_a_fork(lambda: bits(lookup.gather(ids, 2)) == rows_ND[ids.numpy()].tobytes())
    assert child == "True"


def test_another_dlpack_is_done_without(monkeypatch):
    table = (ctypes.c_uint32 * 64)(2, 0)  # of version 2.0
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    make_capsule.restype = ctypes.py_object
    name = b"dlpack_exchange_api"
    monkeypatch.setattr(gather, "_exchange", make_capsule(ctypes.addressof(table), name, None))
    rows_ND = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert gather.lookup_of(rows_ND, torch.float32) is None
    assert gather.RowGather(rows_ND, row_dtype("float32"))(torch.tensor([1])).tolist() == [[4, 5, 6, 7]]


def test_what_a_lookup_is_made_of_is_checked():
    rows_ND = np.zeros((4, 4), dtype=np.float32)
    assert gather.lookup_of(rows_ND, torch.int64) is None
    make, capsule = gather.compiled.Lookup, gather._exchange
    with pytest.raises(ValueError, match="64 bytes aren't 5 rows of 16"):
        make(rows_ND, 5, 4, 2, 32, capsule, torch.Tensor, -1, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="64 bytes aren't 4 rows of 18"):
        make(rows_ND, 4, 4, 2, 32, capsule, torch.Tensor, -1, 0, 0, 0, 2)
    for number in (4, -1, 2**30):
        with pytest.raises(ValueError, match=f"no blocks of number {number}"):
            make(rows_ND, 4, 4, 2, 32, capsule, torch.Tensor, -1, 0, 0, 0, number)
    with pytest.raises((TypeError, ValueError)):
        make(rows_ND, 4, 4, 2, 32, object(), torch.Tensor, -1, 0, 0, 0, 0)
    lookup = gather.lookup_of(rows_ND, torch.float32)
    assert lookup.gather(torch.tensor([0, 4]), 1) == 1
    assert lookup.gather(torch.tensor([0.0]), 1) is None
