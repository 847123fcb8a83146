"""initial_noise.py: the noise of a new table, read with NumPy; a seed means the same bytes everywhere."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import DTYPES, D, N, gradients_of, make, names, on_disk

from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import initial_noise
from sense_v2.engram.table.initial_noise import CHUNK_VALUES

# Row 0 of a table of seed 0 and standard deviation 0.02: a seed must mean the same table in every release.
GOLDEN_VALUES = ["0x1.7555320000000p-8", "-0x1.4697e80000000p-6", "-0x1.832afe0000000p-6", "0x1.bcd6100000000p-7"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engram_table.dat"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_table_is_normal_noise_with_distinct_rows(path: Path, dtype: str) -> None:
    num_rows = 3 * CHUNK_VALUES // 64 + 1000
    MMapEmbeddingStorage(num_rows, 64, path, dtype=dtype, init_std=0.02)
    rows = on_disk(path, dtype, width=64)
    assert rows.shape == (num_rows, 64)
    values = rows.astype(np.float64).ravel() / 0.02
    count = len(values)
    # Five standard errors each; the narrow types add their rounding.
    rounding = {"float32": 0.0, "float16": 1e-4, "bfloat16": 1e-3}[dtype]
    assert abs(values.mean()) < 5 * count**-0.5
    assert abs(values.std() - 1) < 5 * (2 * count) ** -0.5 + rounding
    assert abs((values**4).mean() / values.var() ** 2 - 3) < 5 * (24 / count) ** 0.5 + 3 * rounding
    assert np.abs(values).max() > 4
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 * count**-0.5
    halves = values[:CHUNK_VALUES].reshape(2, -1)  # where the pairs that share their random bits lie
    assert abs(np.corrcoef(halves)[0, 1]) < 5 * (CHUNK_VALUES / 2) ** -0.5
    assert abs(np.corrcoef(halves**2)[0, 1]) < 5 * (CHUNK_VALUES / 2) ** -0.5
    as_bytes = np.fromfile(path, dtype=np.dtype((np.void, os.path.getsize(path) // num_rows)))
    assert len(np.unique(as_bytes)) == num_rows


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    num_rows = 3 * CHUNK_VALUES // 64 + 1
    tables = {}
    for seed, num_threads in ((3, 1), (3, 5), (4, 2), (3 + 2**32, 2)):
        path = tmp_path / f"{seed}_{num_threads}.dat"
        MMapEmbeddingStorage(num_rows, 64, path, seed=seed, num_threads=num_threads)
        tables[seed, num_threads] = path.read_bytes()
    assert tables[3, 1] == tables[3, 5]
    # No two chunks alike: not in one table, not in two, not where the seeds agree in 32 bits.
    chunks = [
        table[start : start + 4 * CHUNK_VALUES]
        for table in (tables[3, 1], tables[4, 2], tables[3 + 2**32, 2])
        for start in range(0, 12 * CHUNK_VALUES, 4 * CHUNK_VALUES)
    ]
    assert len(set(chunks)) == 9


def test_the_golden_first_values(path: Path) -> None:
    table = make(path, seed=0)
    assert [value.hex() for value in table.weight[0, :4].tolist()] == GOLDEN_VALUES


def test_the_first_values_do_not_depend_on_torch_defaults(tmp_path: Path) -> None:
    """As in `from_pretrained`, which builds a model with another default dtype, or on the meta device."""
    expected = make(tmp_path / "expected.dat").weight
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            table = make(tmp_path / "table.dat")
            table(torch.tensor([1, 2], device="cpu")).sum().backward()
            table(torch.tensor([2, 3], device="cpu")).sum().backward()
            ids_U, grads_UD = gradients_of(table)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(table.weight, expected)
    assert ids_U.tolist() == [1, 2, 3]
    assert grads_UD.dtype == torch.float32
    assert grads_UD.tolist() == [[1.0] * D, [2.0] * D, [1.0] * D]


def test_a_bar_shows_how_far_a_large_fill_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.dat")
    assert capsys.readouterr().err == ""
    make(tmp_path / "b.dat", progress=True)
    assert "100%" in capsys.readouterr().err
    monkeypatch.setattr(initial_noise, "PROGRESS_BYTES", N * D * 4 - 1)
    make(tmp_path / "log.dat")
    assert capsys.readouterr().err == "", "a log is no terminal"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    make(tmp_path / "c.dat")
    assert "100%" in capsys.readouterr().err
    make(tmp_path / "d.dat", progress=False)
    assert capsys.readouterr().err == ""


def test_a_write_error_or_an_interrupt_during_the_fill_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "input/output error")

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    real_chunk = initial_noise._normal_chunk
    for what, expected in ((fail, OSError), (interrupt, KeyboardInterrupt)):
        drawn: list[int] = []

        def chunk(*arguments: Any, what: Callable[[], None] = what, drawn: list[int] = drawn) -> None:
            drawn.append(arguments[2])
            if arguments[2] == 2:
                what()
            time.sleep(0.01)
            real_chunk(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(initial_noise, "_normal_chunk", chunk)
            with pytest.raises(expected):
                MMapEmbeddingStorage(400 * CHUNK_VALUES // 64, 64, path, num_threads=2)
        assert len(drawn) < 300  # the other thread doesn't go on to the end
        assert names(path.parent) == []
        # None is left at work; one that was interrupted while it started may be about to end.
        for thread in threading.enumerate():
            if thread.name.startswith("fill"):
                thread.join(timeout=10)
                assert not thread.is_alive()
        drawn_by_then = len(drawn)
        time.sleep(0.05)
        assert len(drawn) == drawn_by_then
    make(path)


def test_a_thread_that_was_interrupted_while_it_started_does_not_outlive_the_fill(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool doesn't know of it, so doesn't wait for it; the file's descriptor may be another file's by then."""
    real_start, real_chunk = threading.Thread.start, initial_noise._normal_chunk
    drawn: list[int] = []

    def start(thread: threading.Thread) -> None:
        real_start(thread)
        if thread.name == "fill_1":
            raise KeyboardInterrupt

    def chunk(*arguments: Any) -> None:
        time.sleep(0.05)
        real_chunk(*arguments)
        drawn.append(arguments[2])

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        patch.setattr(initial_noise, "_normal_chunk", chunk)
        with pytest.raises(KeyboardInterrupt):
            MMapEmbeddingStorage(40 * CHUNK_VALUES // 64, 64, path, num_threads=2)
        drawn_by_then = len(drawn)
        time.sleep(0.2)
    assert len(drawn) == drawn_by_then
    assert names(path.parent) == []
