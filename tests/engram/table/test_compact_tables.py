"""Tables of compact rows on disk: opened, looked up, checked, refused for writing; made from others by conversion."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tables import manifest, names, on_disk, slow_sums

from sense_v2.core.config import COMPACT_DTYPES, EngramConfig
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk
from sense_v2.engram.table.format import Manifest, file_bytes
from sense_v2.engram.upkeep import transfer
from sense_v2.engram.upkeep.check import check_table
from sense_v2.engram.upkeep.convert import convert_table

N, D = 300, 40
RELEASED = ("layers.1.engram.embed.weight", "layers.1.engram.embed.scale")


def trained(path, dtype="float32", num_rows=N, width=D):
    """A table of noise with a commit and an optimizer state."""
    table = MMapEmbeddingStorage(num_rows, width, path, dtype=dtype, provenance={"variant": "sense", "seed": 3})
    state = table.open_state("adagrad", 1)
    table.write_state(state, torch.arange(5), torch.ones(5, 1))
    table.write(torch.arange(3), torch.zeros(3, width))
    table.commit(step=17, extra={"epoch": 2})
    table.close()
    return path


def opened(path, dtype, num_rows=N, width=D, **arguments):
    return MMapEmbeddingStorage(num_rows, width, path, dtype=dtype, mode="r", **arguments)


def wrong(path):
    return [f"{finding.kind}: {finding.text}" for finding in check_table(path).findings if finding.is_wrong]


@pytest.fixture
def source(tmp_path):
    return trained(tmp_path / "source" / "engram_table.dat")


# Bytes


def test_the_released_rows_in_our_format_look_up_bit_for_bit(tmp_path, golden_folder):
    shard = load_file(golden_folder / "deepseek_v41_rows_shard.safetensors")
    codes, scales = (shard[name].view(torch.uint8).numpy() for name in RELEASED)
    path = tmp_path / "engram_table.dat"
    path.write_bytes(b"".join(code.tobytes() + scale.tobytes() for code, scale in zip(codes, scales, strict=True)))
    described = {"format_version": 2, "byte_order": "little", "rows": 1000, "width": 256, "dtype": "float8_e4m3fn"}
    path.with_suffix(".json").write_text(json.dumps(described))
    expected = load_file(golden_folder / "deepseek_v41_rows_expected.safetensors")
    table = opened(path, "float8_e4m3fn", 1000, 256)
    found = table(expected["in.row_ids"])
    assert (found.dtype, table.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected["out.rows"].view(torch.int16))
    assert table.mmap.shape == (1000, 264)
    assert wrong(path) == []


@pytest.mark.parametrize(("dtype", "width", "row_bytes"), [("float8_e4m3fn", 33, 35), ("int8", 33, 37)])
def test_file_bytes_count_the_scales(dtype, width, row_bytes):
    assert file_bytes(10, width, dtype) == 10 * row_bytes


def test_a_row_with_its_scales_is_bounded():
    Manifest(1, 2**24 - 4, "int8").validate()
    with pytest.raises(ValueError, match="width = 16777213: must be at most 16777216 of int8, scales included"):
        Manifest(1, 2**24 - 3, "int8").validate()


def test_a_manifest_with_states_beside_compact_rows_is_refused():
    text = json.dumps(
        {"format_version": 2, "byte_order": "little", "rows": 5, "width": 4, "dtype": "int8"}
        | {"states": {"adam": {"file": "t.adam.dat", "width": 4}}}
    )
    with pytest.raises(ValueError, match=r"states = \['adam'\]: must be none beside rows of int8"):
        Manifest.from_json(text)


# Reading only


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_lookups_of_any_shape_give_the_decoded_rows(source, tmp_path, dtype):
    path = tmp_path / "compact.dat"
    convert_table(source, path, dtype)
    table = opened(path, dtype)
    old = torch.from_numpy(on_disk(source, width=D))
    ids = torch.tensor([[[5, 299], [0, 5]]])
    found = table(ids)
    assert (found.shape, found.dtype, found.requires_grad) == ((1, 2, 2, D), table.dtype, False)
    assert torch.equal(found[0, 0, 0], found[0, 1, 1])
    assert (found[0, 1, 0] == 0).all()
    assert (found.float() - old[ids]).abs().max() < 0.01
    assert torch.equal(table(torch.arange(N).int()), table(torch.arange(N)))
    assert table.gather(torch.tensor([7])).dtype == torch.float32
    with pytest.raises(IndexError, match="row id 300"):
        table(torch.tensor([300]))
    with pytest.raises(ValueError, match=f"rows of {dtype} are codes and scales"):
        _ = table.weight
    with pytest.raises(PermissionError, match="mode='r'"):
        table.write(torch.tensor([0]), torch.zeros(1, D))


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_training_a_compact_table_is_refused_with_the_way_out(source, tmp_path, dtype):
    path = tmp_path / "compact.dat"
    convert_table(source, path, dtype)
    before = names(tmp_path)
    for where in (path, tmp_path / "new.dat"):
        with pytest.raises(
            ValueError, match=f"rows of {dtype} are only read.* mode='r'.*convert TABLE --dtype float32"
        ):
            MMapEmbeddingStorage(N, D, where, dtype=dtype)
    assert names(tmp_path) == before


def test_another_dtype_than_the_tables_is_named(source, tmp_path):
    convert_table(source, tmp_path / "compact.dat", "int8")
    with pytest.raises(ValueError, match="dtype is 'int8', asked for 'float32'"):
        opened(tmp_path / "compact.dat", "float32")


def test_a_configuration_takes_compact_dtypes():
    assert [EngramConfig(dtype=dtype).dtype for dtype in COMPACT_DTYPES] == list(COMPACT_DTYPES)


# Verify


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_verify_finds_a_flipped_bit_in_codes_and_in_scales(source, tmp_path, dtype):
    path = tmp_path / "compact.dat"
    convert_table(source, path, dtype)
    assert wrong(path) == []
    raw = path.read_bytes()
    for at in (9 * len(raw) // N + 2, 10 * len(raw) // N - 1):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert [text for text in wrong(path) if "blocks don't have the checksum" in text]


@pytest.mark.parametrize(
    ("dtype", "at", "new", "num_nan", "num_infinite"),
    [
        ("float8_e4m3fn", 4, b"\x7f", 1, 0),
        ("float8_e4m3fn", D, b"\xff", 32, 0),
        ("int8", D, np.float32(np.nan).tobytes(), D, 0),
        ("int8", D, np.float32(3e38).tobytes(), 0, None),
    ],
)
def test_verify_counts_what_is_no_number(source, tmp_path, dtype, at, new, num_nan, num_infinite):
    path = tmp_path / "compact.dat"
    convert_table(source, path, dtype)
    raw = bytearray(path.read_bytes())
    first = 7 * (len(raw) // N) + at
    raw[first : first + len(new)] = new
    path.write_bytes(raw)
    text = next(text for text in wrong(path) if text.startswith("not finite"))
    assert f"{num_nan} values are NaN" in text
    assert "in 1 of 300 rows; the first is row 7." in text
    assert num_infinite is None or f"and {num_infinite} infinite" in text


# Converting


@pytest.mark.parametrize("dtype", [*COMPACT_DTYPES, "float16", "bfloat16", "float32"])
def test_a_converted_table_is_what_the_source_was(source, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(transfer, "PART_VALUES", 7 * D)
    before = source.read_bytes()
    path = tmp_path / "to" / "new.dat"
    done = convert_table(source, path, dtype)
    old = on_disk(source, width=D).astype(np.float64)
    table = opened(path, dtype, provenance={"variant": "sense", "seed": 3})
    error = table(torch.arange(N)).double().numpy() - old
    assert done.max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert done.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert done.rms == pytest.approx(np.sqrt((old**2).mean()), rel=1e-6)
    assert (done.max_error == 0) == (dtype == "float32")
    assert source.read_bytes() == before
    assert names(path.parent) == ["new.dat", "new.json", "new.lock"]
    written, of = manifest(path), manifest(source)
    assert written["checksums"] == slow_sums(path, N)
    assert {name: written[name] for name in ("step", "extra", "states", "generation")} == {
        "step": 17,
        "extra": {"epoch": 2},
        "states": {},
        "generation": of["generation"],
    }
    assert written["provenance"]["converted_from"]["commit"] == of["commit"] != written["commit"]
    assert written["provenance"]["converted_from"]["rms_error"] == done.rms_error
    assert wrong(path) == []


def test_back_to_float32_the_values_are_the_compact_ones_and_train_again(source, tmp_path):
    convert_table(source, tmp_path / "compact.dat", "int8")
    convert_table(tmp_path / "compact.dat", tmp_path / "back.dat", "float32")
    expected = opened(tmp_path / "compact.dat", "int8")(torch.arange(N))
    with_rows = MMapEmbeddingStorage(N, D, tmp_path / "back.dat")
    assert torch.equal(with_rows.weight, expected)
    with_rows.write(torch.tensor([1]), torch.ones(1, D))
    with_rows.commit(step=18)
    with_rows.close()


def test_holes_stay_holes(tmp_path):
    width = 64
    table = MMapEmbeddingStorage(400_000, width, tmp_path / "sparse.dat", sparse=True)
    table.write(torch.tensor([0, 399_999]), torch.ones(2, width))
    table.commit()
    table.close()
    path = tmp_path / "compact.dat"
    convert_table(tmp_path / "sparse.dat", path, "int8")
    assert path.stat().st_blocks * 512 < path.stat().st_size / 4
    found = opened(path, "int8", 400_000, width)(torch.tensor([0, 1, 200_000, 399_999]))
    assert found[:, 0].tolist() == pytest.approx([1, 0, 0, 1], rel=1e-6)
    assert wrong(path) == []


def ended_early(source, output, dtype, monkeypatch, parts):
    """A conversion whose process dies after that many parts: nothing is tidied up."""
    monkeypatch.setattr(transfer, "PART_VALUES", 10 * D)
    monkeypatch.setattr(transfer, "SAVE_BYTES", 1)
    write_at, calls = disk.write_at, []

    class Killed(BaseException):
        pass

    def write(fd, data, offset):
        if output.name in os.readlink(f"/proc/self/fd/{fd}") and "converting" in os.readlink(f"/proc/self/fd/{fd}"):
            calls.append(offset)
            if len(calls) > parts:
                raise Killed
        write_at(fd, data, offset)

    monkeypatch.setattr(disk, "write_at", write)
    with pytest.raises(Killed):
        convert_table(source, output, dtype)
    monkeypatch.setattr(disk, "write_at", write_at)
    return calls


@pytest.mark.parametrize("dtype", COMPACT_DTYPES)
def test_a_second_call_goes_on_where_the_first_was_ended(source, tmp_path, dtype, monkeypatch):
    whole = convert_table(source, tmp_path / "whole.dat", dtype)
    path = tmp_path / "new.dat"
    ended_early(source, path, dtype, monkeypatch, parts=12)
    assert not path.exists()
    advanced = []
    done = convert_table(source, path, dtype, advance=advanced.append)
    assert done.resumed_rows == 120
    assert sum(advanced) == source.stat().st_size + path.stat().st_size
    assert path.read_bytes() == (tmp_path / "whole.dat").read_bytes()
    for name in ("max_error", "rms_error", "rms"):
        assert getattr(done, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert wrong(path) == []
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []


def change_source(source, path):
    table = MMapEmbeddingStorage(N, D, source)
    table.write(torch.tensor([0]), torch.ones(1, D))
    table.commit()
    table.close()


def cut_rows(source, path):
    rows = path.with_name(f"{path.name}.converting.tmp")
    rows.write_bytes(rows.read_bytes()[:-1])


def damage_progress(source, path):
    path.with_name(f"{path.name}.progress.tmp").write_text("{}")


@pytest.mark.parametrize("change", [change_source, cut_rows, damage_progress])
def test_progress_of_something_else_is_not_gone_on_with(source, tmp_path, monkeypatch, change):
    path = tmp_path / "new.dat"
    ended_early(source, path, "int8", monkeypatch, parts=12)
    change(source, path)
    done = convert_table(source, path, "int8")
    assert (done.resumed_rows, len(done.notes)) == (0, 1)
    convert_table(source, tmp_path / "whole.dat", "int8")
    assert path.read_bytes() == (tmp_path / "whole.dat").read_bytes()


def test_another_dtype_begins_anew(source, tmp_path, monkeypatch):
    ended_early(source, tmp_path / "new.dat", "int8", monkeypatch, parts=12)
    assert convert_table(source, tmp_path / "new.dat", "float8_e4m3fn").resumed_rows == 0


@pytest.mark.parametrize("at", ["the table's rename", "the progress file's removal"])
def test_ended_between_the_last_calls_it_is_finished_by_the_next(source, tmp_path, monkeypatch, at):
    path = tmp_path / "new.dat"
    with monkeypatch.context() as patch:
        if at == "the table's rename":
            replace = os.replace

            def fail(old, new):
                if str(new) == str(path):
                    raise KeyboardInterrupt
                replace(old, new)

            patch.setattr(os, "replace", fail)
        else:
            patch.setattr(type(path), "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert_table(source, path, "int8")
    done = convert_table(source, path, "int8")
    assert done.resumed_rows == N
    assert done.max_error > 0
    assert wrong(path) == []
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == []


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_bytes(source, tmp_path):
    """SIGKILL, again and again, until a call comes through."""
    whole = tmp_path / "whole.dat"
    convert_table(source, whole, "int8")
    path = tmp_path / "new.dat"
    code = (
        "import sys; from sense_v2.engram.upkeep import convert, transfer\n"
        f"transfer.PART_VALUES, transfer.SAVE_BYTES = {D}, 1\n"
        "print('begins', flush=True)\n"
        "done = convert.convert_table(sys.argv[1], sys.argv[2], 'int8')\n"
        "print(done.resumed_rows)"
    )
    seconds = 0.05
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", code, source, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begins\n"
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            seconds *= 1.5
            continue
        assert process.returncode == 0
        break
    else:
        pytest.fail("no call came through")
    assert path.read_bytes() == whole.read_bytes()
    assert wrong(path) == []


# Refusals


def test_a_row_that_a_dtype_cannot_hold_is_named(tmp_path):
    path = trained(tmp_path / "engram_table.dat")
    for value, dtype, text in (
        (70_000.0, "float16", "row 250 holds a value too large for float16"),
        (float("nan"), "int8", "row 250 holds NaN or an infinity"),
    ):
        rows = np.fromfile(path, dtype="<f4").reshape(N, D)
        rows[250, 3] = value
        rows.tofile(path)
        with pytest.raises(ValueError, match=text):
            convert_table(path, tmp_path / f"{dtype}.dat", dtype)
        assert not (tmp_path / f"{dtype}.dat").exists()


def test_a_damaged_source_gives_no_table(source, tmp_path):
    raw = bytearray(source.read_bytes())
    raw[4000] ^= 1
    source.write_bytes(raw)
    with pytest.raises(ValueError, match=r"it changed meanwhile, or is damaged. sense-engram verify says which"):
        convert_table(source, tmp_path / "new.dat", "int8")
    assert names(tmp_path) == ["new.lock", "source"]


def test_what_is_read_back_must_be_what_was_written(source, tmp_path, monkeypatch):
    write_at = disk.write_at

    def write(fd, data, offset):
        if "converting" in os.readlink(f"/proc/self/fd/{fd}"):
            data = np.array(data)
            data[0, 0] ^= 1
        write_at(fd, data, offset)

    monkeypatch.setattr(disk, "write_at", write)
    with pytest.raises(ValueError, match=r"what was read back isn't what was written"):
        convert_table(source, tmp_path / "new.dat", "int8")
    assert names(tmp_path) == ["new.lock", "source"]


def test_a_writer_at_the_source_is_waited_for(source, tmp_path):
    table = MMapEmbeddingStorage(N, D, source)
    with pytest.raises(BlockingIOError, match=r"is writing to .*Convert it when that has ended"):
        convert_table(source, tmp_path / "new.dat", "int8")
    table.close()


@pytest.mark.parametrize("there", ["a table", "a manifest", "itself"])
def test_what_is_there_is_kept(source, tmp_path, there):
    path = source if there == "itself" else tmp_path / "new.dat"
    if there == "a table":
        trained(path)
    elif there == "a manifest":
        path.with_suffix(".json").write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    with pytest.raises(FileExistsError, match="choose another --output"):
        convert_table(source, path, "int8")
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    assert after == before


def test_a_table_without_a_manifest_is_refused(tmp_path):
    (tmp_path / "t.dat").write_bytes(bytes(40))
    with pytest.raises(ValueError, match=r"has no manifest t\.json"):
        convert_table(tmp_path / "t.dat", tmp_path / "new.dat", "int8")


def test_memory_does_not_follow_the_table(tmp_path):
    """100 MB of rows, in a process that may hold 60 MB more than it begins with."""
    table = MMapEmbeddingStorage(400_000, 64, tmp_path / "large.dat", progress=False)
    table.commit()
    table.close()
    code = (
        "import sys; from sense_v2.engram.upkeep.convert import convert_table\n"
        "def peak(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]\n"
        "before, most = peak(), 0\n"
        "def look(_):\n    global most; most = max(most, peak())\n"
        "convert_table(sys.argv[1], sys.argv[2], 'int8', advance=look)\n"
        "print((most - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.dat", tmp_path / "new.dat"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 60
