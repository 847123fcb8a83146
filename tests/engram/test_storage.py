"""storage.py: what is on disk is read with NumPy, gradients come from `nn.Embedding`."""

import copy
import errno
import gc
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tables import DTYPES, D, N, gradients_of, make, manifest, names, on_disk, run_python, slow_sums

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk
from sense_v2.engram.table.initial_noise import CHUNK_VALUES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.dat"


# Making a table, and failing to


def test_a_new_table_and_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "table.dat"
    make(path, dtype="bfloat16", seed=7, init_std=0.5, provenance={"orders": (2, 3)})
    assert names(path.parent) == ["table.dat", "table.json", "table.lock"]
    found = manifest(path)
    assert found.pop("checksums") == slow_sums(path)
    assert re.fullmatch("[0-9a-f]{16}", found.pop("commit")), "drawn, so that no other new table's journal fits"
    assert found == {
        "format_version": 3,
        "byte_order": "little",
        "rows": N,
        "width": D,
        "dtype": "bfloat16",
        "init_seed": 7,
        "init_std": 0.5,
        "provenance": {"orders": [2, 3]},
        "generation": 0,
        "step": None,
        "states": {},
        "extra": {},
        "updates": 0,
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((0, D), "rows = 0"),
        ((N, -1), "width = -1"),
        ((2**62, D), "more than a file can have"),
        ((N, D, {"dtype": "int16"}), "dtype = 'int16'"),
        ((N, D, {"dtype": "int8"}), "rows of int8 are only read"),
        ((N, D, {"mode": "w"}), "mode = 'w': must be 'r\\+'"),
        ((N, D, {"seed": -1}), "init_seed = -1"),
        ((N, D, {"init_std": float("inf")}), "init_std = inf"),
        ((N, D, {"provenance": {"a": {1}}}), "provenance must be a JSON object"),
    ],
)
def test_arguments_that_are_refused_before_anything_is_written(path: Path, arguments: Any, error: str) -> None:
    num_rows, width, keywords = (*arguments, {})[:3]
    with pytest.raises(ValueError, match=error):
        MMapEmbeddingStorage(num_rows, width, path, **keywords)
    assert names(path.parent) == []


def test_a_table_that_is_not_there_cannot_be_read(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"engram_table\.dat: no table there; mode='r\+' makes one"):
        make(path, mode="r")
    assert names(path.parent) == []


def test_a_link_to_a_disk_that_is_not_there_is_kept(path: Path) -> None:
    path.symlink_to("/not/mounted/engram_table.dat")
    with pytest.raises(FileNotFoundError, match=r"links to /not/mounted/engram_table\.dat, which isn't there"):
        make(path)
    assert names(path.parent) == ["engram_table.dat"]
    assert path.is_symlink()
    target = path.with_name("elsewhere.dat")
    make(target)
    path.unlink()
    path.symlink_to(target)
    shutil.move(target.with_suffix(".json"), path.with_suffix(".json"))
    make(path).write(torch.tensor([1]), torch.ones(1, D))
    assert on_disk(target)[1].tolist() == [1.0] * D


FULL_DISK = """
import resource, sys
from sense_v2.engram.storage import MMapEmbeddingStorage
path, limit, seen = sys.argv[1], int(sys.argv[2]), []
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    MMapEmbeddingStorage(2**20, 64, path)
except OSError as error:
    print(error.errno, error)
table = MMapEmbeddingStorage(1000, 64, path)
try:
    table.open_state("adam", 2**20)
except OSError as error:
    print(error.errno, error)
table.flush()
"""


def full_disk(path: Path, limit: int, prefix: tuple[str, ...] = ()) -> list[str]:
    child = run_python(FULL_DISK, path, limit, prefix=prefix)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out.splitlines()


def test_a_full_disk_is_an_error_before_anything_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "engram_table.dat"
    table_line, state_line = full_disk(path, 2**20)
    needs = f"needs {2**20 * 64 * 4} bytes, [0-9]+ are free in {tmp_path}: .*ulimit -f.*Make room"
    assert re.match(f"{errno.EFBIG} .*{path} {needs}", table_line)
    assert re.match(rf"{errno.EFBIG} .*engram_table\.adam\.dat needs {1000 * 2**20 * 4} bytes", state_line)
    assert names(tmp_path) == ["engram_table.dat", "engram_table.json", "engram_table.lock"]
    # A file system that is really full, in a mount that only the child sees, where mounting is allowed.
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    prefix = ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        table_line, state_line = full_disk(path, 0, prefix)
        assert re.match(f"{errno.ENOSPC} .*{path} needs {2**28} bytes, 10[0-9]{{5}} are free", table_line)
        assert re.match(rf"{errno.ENOSPC} .*engram_table\.adam\.dat needs", state_line)


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f")]
)
def test_no_room(path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(OSError, match=rf"needs {N * D * 4} bytes, \d+ are free in .*{reason}") as caught:
        make(path)
    assert caught.value.errno == number
    assert names(path.parent) == []


def test_no_room_where_space_cannot_be_reserved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    usage = shutil.disk_usage(path.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=N * D * 4 - 1))
        with pytest.raises(OSError, match=f"needs {N * D * 4} bytes, {N * D * 4 - 1} are free") as caught:
            make(path)
    assert caught.value.errno == errno.ENOSPC
    assert names(path.parent) == []
    make(path)


def test_a_path_below_a_file_or_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for below in ("file/table.dat", "file/folder/table.dat"):
        with pytest.raises(OSError, match=r"can't write .*table\..*Make its folder writable, or choose another path"):
            make(tmp_path / below)
    # Root may write anywhere, so the refusal is the operating system's only in its number.
    real_open = os.open
    for number, kind in ((errno.EACCES, PermissionError), (errno.EROFS, OSError)):

        def refuse(file: Any, flags: int, *rest: Any, number: int = number, **keywords: Any) -> int:
            if flags & os.O_CREAT:
                raise OSError(number, os.strerror(number), file)
            return real_open(file, flags, *rest, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(kind, match=r"can't write .*table\.json: .*Make its folder writable"):
                make(tmp_path / "table.dat")
    assert names(tmp_path) == ["file"]


STALLED_FILL = """
import sys, time
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk, initial_noise as fill

path, where = sys.argv[1:]

def stall():
    print("stalled", flush=True)
    time.sleep(600)

real_chunk, real_replace = fill._normal_chunk, disk.os.replace
if where == "fill":
    fill._normal_chunk = lambda *a: stall() if a[2] == 2 else real_chunk(*a)
else:
    disk.os.replace = lambda a, b: (real_replace(a, b), stall())
MMapEmbeddingStorage(3 * fill.CHUNK_VALUES // 64, 64, path, provenance={"by": "child"}, num_threads=1)
"""


def test_a_maker_killed_during_the_fill(tmp_path: Path) -> None:
    path, shape = tmp_path / "engram_table.dat", (3 * CHUNK_VALUES // 64, 64)
    child = run_python(STALLED_FILL, path, "fill")
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "stalled\n"
        assert names(tmp_path) == ["engram_table.dat.tmp", "engram_table.json.tmp"]
        assert os.path.getsize(f"{path}.tmp") == shape[0] * shape[1] * 4
        # A second maker waits for the first one, for as long as that lives.
        second = ThreadPoolExecutor().submit(MMapEmbeddingStorage, *shape, path, seed=3)
        time.sleep(0.2)
        assert not second.done()
        assert names(tmp_path) == ["engram_table.dat.tmp", "engram_table.json.tmp"]
    finally:
        child.kill()
        child.communicate()
    second.result(timeout=30)
    assert names(tmp_path) == ["engram_table.dat", "engram_table.json", "engram_table.lock"]
    expected = MMapEmbeddingStorage(*shape, tmp_path / "expected.dat", seed=3)
    assert path.read_bytes() == expected.weight.numpy().tobytes()
    assert manifest(path)["provenance"] == {}


def test_a_maker_killed_between_the_two_renames(tmp_path: Path) -> None:
    path, shape = tmp_path / "engram_table.dat", (3 * CHUNK_VALUES // 64, 64)
    child = run_python(STALLED_FILL, path, "rename")
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "stalled\n"
        assert names(tmp_path) == ["engram_table.dat", "engram_table.json.tmp"]
    finally:
        child.kill()
        child.communicate()
    whole = (tmp_path / "engram_table.json.tmp").read_bytes()
    made = json.loads(whole)
    # Reading changes nothing. What isn't this table's manifest isn't taken for it.
    others = whole[:-10], {**made, "generation": 1}, {**made, "checksums": ["0" * 16]}, {**made, "width": 32}
    for other in others:
        raw = other if isinstance(other, bytes) else json.dumps(other).encode()
        (tmp_path / "engram_table.json.tmp").write_bytes(raw)
        for mode in ("r+", "r"):
            with pytest.warns(UserWarning, match="has no manifest"):
                MMapEmbeddingStorage(*shape, path, mode=mode).close()
    (tmp_path / "engram_table.json.tmp").write_bytes(whole)
    with pytest.warns(UserWarning, match="has no manifest"):
        MMapEmbeddingStorage(*shape, path, mode="r")
    table = MMapEmbeddingStorage(*shape, path)
    expected = MMapEmbeddingStorage(*shape, tmp_path / "other" / "expected.dat")
    assert torch.equal(table.weight, expected.weight)
    assert manifest(path) == made
    assert (made["provenance"], made["init_seed"]) == ({"by": "child"}, 0)
    assert names(tmp_path) == ["engram_table.dat", "engram_table.json", "engram_table.lock", "other"]


def test_a_reader_between_the_two_renames_waits_for_the_manifest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed, go_on = threading.Event(), threading.Event()
    real_replace = os.replace

    def replace(old: Any, new: Any) -> None:
        real_replace(old, new)
        if new == path:
            renamed.set()
            assert go_on.wait(30)

    monkeypatch.setattr(os, "replace", replace)
    with ThreadPoolExecutor(2) as pool:
        maker = pool.submit(make, path, provenance={"by": "maker"})
        assert renamed.wait(30)
        reader = pool.submit(make, path, mode="r")
        time.sleep(0.2)
        waited = not reader.done()
        go_on.set()
        maker.result(30)
        assert reader.result(30).manifest.provenance == {"by": "maker"}
    assert waited


def test_several_makers_at_once_make_one_table_and_one_gets_to_write(path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(MMapEmbeddingStorage, 5000, 64, path) for _ in range(6)]
    refused = [future for future in futures if isinstance(future.exception(), BlockingIOError)]
    (table,) = (future.result() for future in futures if future not in refused)
    readers = [MMapEmbeddingStorage(5000, 64, path, mode="r") for _ in refused]
    table.write(torch.tensor([7]), torch.ones(1, 64))
    assert all(reader.weight[7].tolist() == [1.0] * 64 for reader in readers)
    table.flush()
    assert names(path.parent) == [
        "engram_table.dat",
        "engram_table.journal",
        "engram_table.json",
        "engram_table.lock",
    ]


@pytest.mark.parametrize(
    ("make_journal", "error"),
    [
        (lambda path: path.write_bytes(b"SENSEjr2"), r"the journal of an earlier table is: engram_table\.journal"),
        (lambda path: path.symlink_to("elsewhere"), r"engram_table\.journal is a link"),
        (lambda path: os.link(file_beside(path), path), r"engram_table\.journal is a file that has another name"),
        (os.mkfifo, r"engram_table\.journal isn't a regular file"),
    ],
    ids=["file", "link", "hard link", "pipe"],
)
def test_an_old_tables_journal_stops_a_new_one_before_it_is_made(
    tmp_path: Path, make_journal: Callable[[Path], Any], error: str
) -> None:
    """Made first, it would be refused after that, with advice for another table."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "engram_table.dat"
    journal = path.with_suffix(".journal")
    make_journal(journal)
    with pytest.raises((ValueError, OSError), match=error):
        make(path)
    assert names(path.parent) == ["engram_table.journal"]
    journal.unlink()
    journal.touch()
    make(path).close()


def file_beside(journal: Path) -> Path:
    path = journal.parents[1] / "other"
    path.touch()
    return path


def test_an_old_tables_optimizer_state_is_not_taken_for_the_new_ones(path: Path) -> None:
    table = make(path)
    table.open_state("adam", 2)
    table.flush()
    table.close()
    path.unlink()
    path.with_suffix(".json").unlink()
    with pytest.raises(
        ValueError, match=r"optimizer state of an earlier table is: engram_table\.adam\.dat\. Remove it"
    ):
        make(path)
    assert names(path.parent) == ["engram_table.adam.dat", "engram_table.lock"]
    path.with_name("engram_table.adam.dat").unlink()
    # A table of its own, whose name only looks like a state's.
    make(path.with_name("engram_table.other.dat"))
    table = make(path)
    with pytest.raises(ValueError, match="is a table: optimizer state 'other' can't be there"):
        table.open_state("other", D)


# Opening a table


def test_a_table_opens_with_the_rows_it_had(path: Path) -> None:
    make(path, seed=1)
    before = path.read_bytes()
    for mode in ("r+", "r"):
        table = make(path, mode=mode, seed=2, init_std=9.0)
        assert table.weight.numpy().tobytes() == before
        assert table.manifest.init_seed == 1
    assert path.read_bytes() == before


def test_what_a_caller_asks_for_must_be_what_the_manifest_says(path: Path) -> None:
    make(path)
    for arguments, error in (
        ((N + 1, D, "float32"), f"rows is {N}, asked for {N + 1}"),
        ((N, D + 1, "float32"), f"width is {D}, asked for {D + 1}"),
        ((N, D, "float16"), "dtype is 'float32', asked for 'float16'"),
        # As long as the file, and still another table.
        ((D, N, "float32"), f"rows is {N}, asked for {D}; width is {D}, asked for {N}"),
        ((N, 2 * D, "bfloat16"), f"width is {D}, asked for {2 * D}; dtype is 'float32', asked for 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=rf"engram_table\.json describes another table: {error}\. Open it with"):
            MMapEmbeddingStorage(arguments[0], arguments[1], path, dtype=arguments[2])


def test_provenance_that_differs_is_named(path: Path) -> None:
    make(path, provenance={"seed": 1, "map": {"sha256": "aa"}, "layout": [[3, 5]]})
    make(path, provenance={"seed": 1, "layout": ((3, 5),)})
    error = (
        r"engram_table\.json describes another table: map\.sha256 is 'aa', asked for 'bb'; "
        r"layout is \[\[3, 5\]\], asked for \[\[3, 7\]\]\. Open it with the configuration it was made with"
    )
    with pytest.raises(ValueError, match=error):
        make(path, mode="r", provenance={"seed": 1, "map": {"sha256": "bb"}, "layout": [[3, 7]]})
    table = make(path, provenance={"map": {"name": "tokenizer"}})
    table.flush()
    assert manifest(path)["provenance"]["map"] == {"sha256": "aa", "name": "tokenizer"}


@pytest.mark.parametrize("size", [0, 1, N * D * 4 - 1, N * D * 4 + 1, 2 * N * D * 4])
def test_a_file_of_another_length_is_refused_and_left_alone(path: Path, size: int) -> None:
    make(path)
    os.truncate(path, size)
    for has_manifest in (True, False):
        if not has_manifest:
            path.with_suffix(".json").unlink()
        for mode in ("r", "r+"):
            with pytest.raises(
                ValueError, match=rf"expected {N * D * 4} bytes \({N} rows × {D} float32\), found {size}"
            ):
                make(path, mode=mode)
    assert path.stat().st_size == size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_raw_file_opens_with_a_warning_and_gets_a_manifest(path: Path, dtype: str) -> None:
    width = {"float32": "<f", "float16": "<e", "bfloat16": None}[dtype]
    values = np.arange(N * D) % 256  # exact in eight bits of mantissa
    raw = b"".join(struct.pack(width, v) if width else struct.pack("<f", v)[2:] for v in values)
    path.write_bytes(raw)
    for mode in ("r", "r+"):
        with pytest.warns(UserWarning, match="has no manifest: its size fits") as caught:
            table = MMapEmbeddingStorage(N, D, path, dtype=dtype, mode=mode, provenance={"seed": 1})
        assert caught[0].filename == __file__
        assert table.eval()(torch.arange(N)).flatten().tolist() == values.tolist()
        lock = [] if mode == "r" else ["engram_table.lock"]
        assert names(path.parent) == ["engram_table.dat", *lock]
    table.flush(step=3)
    found = manifest(path)
    assert (found["init_seed"], found["provenance"], found["generation"]) == (None, {"seed": 1}, 1)
    assert found["checksums"] is None, "nobody has read all of it"
    table.close()
    assert path.read_bytes() == raw
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(path, dtype=dtype)


def test_a_manifest_without_its_table_is_an_error(path: Path) -> None:
    make(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"engram_table\.json describes a table, but .* isn't there"):
        make(path)
    with pytest.raises(FileNotFoundError):
        make(path, mode="r")
    assert names(path.parent) == ["engram_table.json", "engram_table.lock"]


def test_a_manifest_that_cannot_be_read_is_named(path: Path) -> None:
    make(path)
    good = path.with_suffix(".json").read_text()
    for text, error in (
        (good[:-20], "no JSON"),
        (good.replace('"format_version": 3', '"format_version": 4'), "format_version = 4"),
        (good.replace('"rows"', '"raws"'), "raws|rows"),
        (good + "\0", "no JSON"),
    ):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(ValueError, match=rf"engram_table\.json: .*({error})"):
            make(path)
    path.with_suffix(".json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"engram_table\.json: "):
        make(path)


def test_a_folder_is_no_table_and_some_names_are_none_for_one(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ValueError, match="isn't a regular file"):
        make(path)
    for suffix in (".json", ".journal", ".lock"):
        with pytest.raises(ValueError, match=rf"\{suffix} is the suffix of another of its files"):
            make(path.with_suffix(suffix))


def test_a_table_that_cannot_be_written_to_says_how_to_read_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(PermissionError, match=r"can't open .*engram_table\.dat to write: .*mode='r'"):
        make(path)


# Reading


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_weight_and_mmap_are_the_file(path: Path, dtype: str, mode: str) -> None:
    make(path, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = make(path, dtype=dtype, mode=mode)
    assert table.weight.shape == table.mmap.shape == (N, D)
    assert table.weight.dtype == table.dtype == getattr(torch, dtype)
    assert isinstance(table.mmap, np.memmap)
    assert table.mmap.dtype == np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype])
    assert table.weight.data_ptr() == table.mmap.ctypes.data
    if mode == "r":
        with pytest.raises(ValueError, match="read-only"):
            table.mmap[0] = 0
    assert np.array_equal(table.weight.float().numpy(), on_disk(path, dtype))


def test_rows_past_what_32_bits_count(path: Path) -> None:
    """A sparse file: more values than an int32 counts, more bytes than a uint32, hardly any disk."""
    num_rows = 2**31 // 512 + 3
    with open(path, "wb") as file:
        file.truncate(num_rows * 512 * 4)
        file.seek((num_rows - 1) * 512 * 4)
        file.write(struct.pack("<f", 2.5))
    with pytest.warns(UserWarning, match="has no manifest"):
        table = MMapEmbeddingStorage(num_rows, 512, path)
    assert table(torch.tensor([num_rows - 1], dtype=torch.int32))[0, :2].tolist() == [2.5, 0.0]
    table.write(torch.tensor([num_rows - 2]), torch.full((1, 512), 3.5))
    with open(path, "rb") as file:
        file.seek((num_rows - 2) * 512 * 4)
        assert struct.unpack("<f", file.read(4)) == (3.5,)


def test_reading_does_not_load_the_table(path: Path) -> None:
    """A sparse file of 64 GiB: only the rows that are read count, in a copy too."""
    with open(path, "wb") as file:
        file.truncate(2**36)
    with pytest.warns(UserWarning, match="has no manifest"):
        table = MMapEmbeddingStorage(2**24, 1024, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table(torch.arange(0, 2**24, 2**18)).sum().backward()
    table.flush()
    copy.deepcopy(table.half().to(torch.float64))(torch.tensor([2**24 - 1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
    assert gradients_of(table)[1].shape == (64, 1024)


# Gradients


def test_scaling_the_gradients_in_place_counts(path: Path) -> None:
    table = make(path)
    table(torch.tensor([4, 4])).sum().backward()
    _, grads_UD = gradients_of(table)
    grads_UD *= 0.5
    table(torch.tensor([2])).sum().backward()
    ids_U, grads_UD = gradients_of(table)
    assert ids_U.tolist() == [2, 4]
    assert grads_UD.tolist() == [[1.0] * D, [1.0] * D]


def leaf_of(rows: torch.Tensor) -> torch.Tensor:
    """The leaf a training forward's result hangs on, found through the graph."""
    node = rows.grad_fn
    while node is not None and not hasattr(node, "variable"):
        node = node.next_functions[0][0]
    assert node is not None
    leaf: torch.Tensor = node.variable
    return leaf


def test_a_forward_without_a_backward_leaves_nothing(path: Path) -> None:
    table = make(path)
    gc.collect()
    gc.disable()  # by reference counts alone, so that memory doesn't grow between collections
    try:
        rows = table(torch.tensor([1, 2]))
        leaf = weakref.ref(leaf_of(rows))
        assert leaf() is not None
        del rows
        assert leaf() is None
        rows = table(torch.tensor([1, 2]))
        leaf = weakref.ref(leaf_of(rows))
        rows.sum().backward()
        held = leaf()
        assert held is not None
        assert held.grad is None  # moved, not copied
        del rows, held
        assert leaf() is None
    finally:
        gc.enable()
    assert table.gradients() is not None


def test_lookups_and_backwards_from_eight_threads(path: Path) -> None:
    num_rows = 2000
    table = MMapEmbeddingStorage(num_rows, D, path)
    reader = MMapEmbeddingStorage(num_rows, D, path, mode="r")
    rows = on_disk(path)
    start = threading.Barrier(8)

    def work(number: int) -> np.ndarray[Any, Any]:
        random = np.random.default_rng(number)
        counts = np.zeros(num_rows)
        start.wait()
        for _ in range(30):
            ids = random.integers(0, num_rows, 300)
            assert np.array_equal(reader(torch.from_numpy(ids)).numpy(), rows[ids])
            found = table(torch.from_numpy(ids))
            assert np.array_equal(found.detach().numpy(), rows[ids])
            found.sum().backward()
            np.add.at(counts, ids, 1)
        return counts

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, number) for number in range(8)]
        while not all(future.done() for future in futures):
            table.gradients()  # coalesces while others add: nothing may get lost
        counts = sum(future.result() for future in futures)
    ids_U, grads_UD = gradients_of(table)
    assert np.array_equal(ids_U.numpy(), np.flatnonzero(counts))
    assert np.array_equal(grads_UD.numpy(), np.repeat(counts[counts > 0][:, None], D, axis=1))


# Writing


# Optimizer states


def test_a_state_is_zeros_and_then_what_it_was(path: Path) -> None:
    table = make(path)
    state = table.open_state("adam", 3)
    state_path = path.with_name("engram_table.adam.dat")
    assert (state.path, state.step, state.values.shape, state.values.dtype) == (state_path, 0, (N, 3), torch.float32)
    assert state_path.read_bytes() == bytes(N * 3 * 4)
    assert state_path.stat().st_blocks * 512 >= N * 3 * 4  # reserved, not sparse
    table.write_state(state, torch.tensor([4]), torch.tensor([[0.0, 2.5, 0.0]]))
    state.step = 17
    assert table.open_state("adam", 3) is state
    other = table.open_state("row_sum-2", 1)
    table.write_state(other, torch.arange(N), torch.ones(N, 1))
    table.flush(step=20)
    assert struct.unpack_from("<f", state_path.read_bytes(), (4 * 3 + 1) * 4) == (2.5,)
    found = manifest(path)["states"]
    for entry in found.values():
        assert entry.pop("checksums") == slow_sums(path.with_name(entry["file"]))
    assert found == {
        "adam": {"file": "engram_table.adam.dat", "width": 3, "dtype": "float32", "step": 17},
        "row_sum-2": {"file": "engram_table.row_sum-2.dat", "width": 1, "dtype": "float32", "step": 0},
    }
    table.close()
    table = make(path)
    table.flush()  # a state that nobody opened stays listed
    assert (table.open_state("adam", 3).step, table.open_state("adam", 3).values[4, 1].item()) == (17, 2.5)
    assert names(path.parent) == [
        "engram_table.adam.dat",
        "engram_table.dat",
        "engram_table.json",
        "engram_table.lock",
        "engram_table.row_sum-2.dat",
    ]


def test_states_that_are_refused(path: Path) -> None:
    table = make(path)
    table.write_state(table.open_state("adam", 3), torch.arange(N), torch.ones(N, 3))
    with pytest.raises(ValueError, match=r"engram_table\.adam\.dat has width 3, asked for 4"):
        table.open_state("adam", 4)
    for name in ("../adam", "", "a.b"):
        with pytest.raises(ValueError, match="state name"):
            table.open_state(name, 3)
    with pytest.raises(ValueError, match="width = 0"):
        table.open_state("empty", 0)
    table.flush()
    table.close()
    table = make(path)
    with pytest.raises(ValueError, match=r"engram_table\.adam\.dat has width 3, asked for 4"):
        table.open_state("adam", 4)
    state_path = path.with_name("engram_table.adam.dat")
    for size in (0, N * 3 * 4 - 1, N * 3 * 4 + 4):
        os.truncate(state_path, size)
        with pytest.raises(ValueError, match=rf"expected {N * 3 * 4} bytes \({N} rows × 3 float32\), found {size}"):
            table.open_state("adam", 3)
    state_path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lists optimizer state .*adam\.dat, which isn't there"):
        table.open_state("adam", 3)


def test_a_manifest_cannot_point_a_state_anywhere_else(path: Path) -> None:
    make(path)
    outside = path.parent.parent / "outside.dat"
    outside.write_bytes(bytes(N * D * 4))
    others = ("engram_table.json", "engram_table.journal", "engram_table.lock", "engram_table.json.tmp")
    for file in ("../outside.dat", str(outside), "engram_table.dat", *others):
        values = manifest(path)
        values["states"] = {"adam": {"file": file, "width": D}}
        path.with_suffix(".json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"plain file name|is a table|no name of another of the table's files"):
            make(path).open_state("adam", D)


# Flush, close, copies


def test_flush_counts_generations_and_keeps_the_step(path: Path) -> None:
    table = make(path)
    assert table.committed_step is None
    table.write(torch.tensor([3]), torch.full((1, D), 0.25))
    table.flush()
    assert (manifest(path)["generation"], manifest(path)["step"], table.committed_step) == (1, None, None)
    table.flush(step=12)
    table.flush()
    assert (manifest(path)["generation"], manifest(path)["step"], table.committed_step) == (3, 12, 12)
    table.flush(step=np.int64(13))  # type: ignore[arg-type]
    table.close()
    table = make(path, mode="r")
    assert (table.committed_step, table.manifest.generation) == (13, 4)
    assert table.weight[3].tolist() == [0.25] * D
    assert names(path.parent) == ["engram_table.dat", "engram_table.json", "engram_table.lock"]


def test_everything_is_synced_before_the_manifest_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)
    state = table.open_state("adam", 2)
    table.flush()
    table.write(torch.tensor([1]), torch.ones(1, D))
    table.write_state(state, torch.tensor([1]), torch.ones(1, 2))
    events = []
    real = os.fsync, os.replace, np.memmap.flush, os.ftruncate

    def fsync(fd: int) -> None:
        events.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real[0](fd)

    def replace(old: Any, new: Any) -> None:
        events.append(f"rename {os.path.basename(new)}")
        real[1](old, new)

    def flush(mapping: Any) -> None:
        events.append(f"msync {os.path.basename(mapping.filename)}")
        real[2](mapping)

    def truncate(fd: int, size: int) -> None:
        events.append(f"truncate {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))} to {size}")
        real[3](fd, size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "ftruncate", truncate)
    monkeypatch.setattr(np.memmap, "flush", flush)
    table.flush()
    assert events == [
        "fsync engram_table.journal",
        f"fsync {path.parent.name}",
        "msync engram_table.dat",
        "fsync engram_table.dat",
        "msync engram_table.adam.dat",
        "fsync engram_table.adam.dat",
        "truncate engram_table.json.tmp to 0",
        "fsync engram_table.json.tmp",
        "rename engram_table.json",
        f"fsync {path.parent.name}",
        "truncate engram_table.journal to 0",
    ]


def test_a_manifest_is_whole_at_every_moment_of_several_flushes(path: Path) -> None:
    table = make(path)

    def flush() -> None:
        for _ in range(30):
            table.flush()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(flush)
        while not future.done():
            assert manifest(path)["rows"] == N
        future.result()
    assert manifest(path)["generation"] == 30
    assert names(path.parent) == ["engram_table.dat", "engram_table.json", "engram_table.lock"]


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)
    before = path.with_suffix(".json").read_text()

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(OSError, match="no space"):
            table.flush(step=5)
    assert path.with_suffix(".json").read_text() == before
    assert names(path.parent) == ["engram_table.dat", "engram_table.json", "engram_table.lock"]
    assert table.committed_step is None
    table.flush(step=6)
    assert (manifest(path)["generation"], manifest(path)["step"]) == (1, 6)


def test_a_sync_that_failed_is_not_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)

    def fail(_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", fail)
        with pytest.raises(OSError, match="input/output error"):
            table.flush()
    for call in (
        table.flush,
        table.commit,
        lambda: table.write(torch.tensor([1]), torch.ones(1, D)),
        lambda: table.protect(torch.tensor([1])),
        lambda: table.open_state("adam", 2),
    ):
        with pytest.raises(RuntimeError, match=r"an earlier sync failed, .* Open it again: that goes back"):
            call()
    assert manifest(path)["generation"] == 0


def test_a_closed_table_says_so(path: Path) -> None:
    table = make(path)
    table(torch.tensor([1])).sum().backward()
    table.close()
    table.close()
    for call in (
        lambda: table.weight,
        lambda: table.mmap,
    ):
        with pytest.raises(RuntimeError, match="the storage is closed; make a new one to open the table again"):
            call()
    assert table.gradients() is None
    assert str(path) in repr(table)


def test_a_copy_opens_the_same_file_read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    table = MMapEmbeddingStorage(N, D, path.name, dtype="float16", provenance={"seed": 1})
    table(torch.tensor([1])).sum().backward()
    copies = [copy.deepcopy(table), copy.copy(table), pickle.loads(pickle.dumps(table.eval()))]
    assert [copied.training for copied in copies] == [True, True, False]
    monkeypatch.chdir("/")
    copies.append(pickle.loads(pickle.dumps(copies[0])))
    opened = make(path, dtype="float16", mode="r")
    before = table.gather(torch.tensor([5]))
    table.write(torch.tensor([5]), torch.full((1, D), 0.5))
    assert opened(torch.tensor([5])).tolist() == [[0.5] * D]  # seen through the page cache, unflushed
    for copied in copies:
        assert (copied.mode, copied.dtype) == ("r", torch.float16)
        assert torch.equal(copied(torch.tensor([5])).float(), before)
        assert copied.gradients() is None
        with pytest.raises(ValueError, match="has gone on since this copy of the table was made"):
            copied.weight  # noqa: B018
    with pytest.warns(UserWarning, match="is closed with 1 updates since its last commit"):
        table.close()
    assert torch.equal(copies[0](torch.tensor([5])).float(), before)


def test_a_reader_may_hold_the_rows_that_it_opened(path: Path) -> None:
    table, ids = make(path), torch.tensor([5, 6])
    held = make(path, mode="r", hold=True)
    before = held(ids)
    table.write(ids[:1], torch.ones(1, D))
    with pytest.warns(UserWarning, match="the next opening undoes them"):
        table.close()
    with pytest.warns(UserWarning, match="1 row was put back"):
        table = make(path)
    table.write(ids[1:], torch.ones(1, D))
    table.commit()
    assert torch.equal(held(ids), before)
    assert table.rows_digest() != held.rows_digest()
    table.write(ids[1:], before[1:])
    assert table.rows_digest() == held.rows_digest()


def test_rows_that_cant_be_put_aside_arent_stored_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make(path)
    copied, before = copy.deepcopy(table), on_disk(path)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(disk, "nameless", full)
    with pytest.raises(OSError, match="no space left"):
        table.write(torch.tensor([5]), torch.ones(1, D))
    assert np.array_equal(on_disk(path), before)
    del copied
    table.write(torch.tensor([5]), torch.ones(1, D))


class AgainstArrays(RuleBasedStateMachine):
    """Any order of writes, commits, closings and reopenings leaves what NumPy arrays and a few numbers say: in use
    what was written, and after a reopening what was committed."""

    dtype = "float32"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "engram_table.dat"
        self.table = make(self.path, dtype=self.dtype)
        self.rows = on_disk(self.path, self.dtype)
        self.moments = np.zeros((N, 2), dtype=np.float32)
        self.step: int | None = None
        self.state_step = self.generation = self.writes = 0
        self.extra: dict[str, Any] = {}
        self.has_state = False
        self.remember()

    def remember(self) -> None:
        self.committed = self.rows.copy(), self.moments.copy(), self.state_step, self.has_state
        self.writes = 0

    @rule(data=st.data(), value=st.integers(-128, 128), stochastic=st.booleans())
    def write(self, data: st.DataObject, value: int, stochastic: bool) -> None:
        ids = data.draw(st.lists(st.integers(0, N - 1), unique=True, max_size=5))
        rows = torch.full((len(ids), D), float(value))
        self.table.write(torch.tensor(ids, dtype=torch.int64), rows, stochastic=stochastic)
        self.rows[ids] = value  # a whole number of eight bits: no rounding
        self.writes += 1

    @rule(row_id=st.integers(0, N - 1), value=st.integers(-128, 128))
    def step_state(self, row_id: int, value: int) -> None:
        state = self.table.open_state("adam", 2)
        self.table.write_state(state, torch.tensor([row_id]), torch.tensor([[0.0, value]]))
        state.step += 1
        self.moments[row_id, 1] = value
        self.state_step += 1
        self.has_state = True

    @rule(data=st.data())
    def look_up(self, data: st.DataObject) -> None:
        """A forward keeps the rows' old bytes, whether or not they are ever stored to."""
        ids = data.draw(st.lists(st.integers(0, N - 1), max_size=5))
        self.table(torch.tensor(ids, dtype=torch.int64))

    @rule(step=st.none() | st.integers(0, 2**40))
    def flush(self, step: int | None) -> None:
        self.table.flush(step)
        self.has_committed(step)

    @rule(step=st.none() | st.integers(0, 2**40), extra=st.none() | st.just({}) | st.just({"loss": [2.5, None]}))
    def commit(self, step: int | None, extra: dict[str, Any] | None) -> None:
        self.table.commit(step, extra)
        self.extra = self.extra if extra is None else extra
        self.has_committed(step)

    def has_committed(self, step: int | None) -> None:
        self.step = self.step if step is None else step
        self.generation += 1
        self.remember()
        found = manifest(self.path)
        assert found["checksums"] == slow_sums(self.path)
        for entry in found["states"].values():
            assert entry["checksums"] == slow_sums(self.path.with_name(entry["file"]))

    @rule(durability=st.sampled_from(["process", "power"]))
    def change_durability(self, durability: str) -> None:
        self.table.durability = durability

    @rule(closed=st.booleans())
    def reopen(self, closed: bool) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if closed:
                self.table.close()
            del self.table
        expected = [f"is closed with {self.writes} updates since its last commit"] if closed and self.writes else []
        assert [text in str(warning.message) for text, warning in zip(expected, caught, strict=True)] == [True] * len(
            expected
        )
        self.rows, self.moments, self.state_step, self.has_state = (
            value.copy() if isinstance(value, np.ndarray) else value for value in self.committed
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*put back as .* at the last commit", UserWarning)
            self.table = make(self.path, dtype=self.dtype)
        self.writes = 0

    @invariant()
    def agrees(self) -> None:
        every_id = torch.arange(N)
        assert np.array_equal(self.table.gather(every_id).numpy(), self.rows)
        assert np.array_equal(on_disk(self.path, self.dtype), self.rows)
        if self.has_state:
            state_path = self.path.with_name("engram_table.adam.dat")
            assert np.array_equal(np.fromfile(state_path, dtype="<f4").reshape(N, 2), self.moments)
            assert self.table.open_state("adam", 2).step == self.state_step
        assert (self.table.committed_step, self.table.manifest.generation) == (self.step, self.generation)
        assert self.table.committed_extra == self.extra

    def teardown(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.table.close()
        self.folder.cleanup()


class AgainstArraysBfloat16(AgainstArrays):
    dtype = "bfloat16"


for machine in (AgainstArrays, AgainstArraysBfloat16):
    machine.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestAgainstArrays = AgainstArrays.TestCase
TestAgainstArraysBfloat16 = AgainstArraysBfloat16.TestCase
