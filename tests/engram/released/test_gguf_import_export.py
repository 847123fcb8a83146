"""Tables of GGUF files made tables of ours, and ours made GGUF files: the same values, or what a coding costs."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_files import QWEN, rows_of, slow_rows
from tables import names
from test_gguf_tables import deepseek_memory, qwen_memory, write_deepseek, write_qwen

from sense_v2.engram.released.gguf_exporting import GGUF_DTYPES, export_gguf
from sense_v2.engram.released.importing import OUR_DTYPES, import_table
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table.compact_rows import encode_rows
from sense_v2.engram.upkeep import transfer
from sense_v2.engram.upkeep.check import check_table

QUIET = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")


def opened(path, rows=256, width=32, dtype="float32"):
    return MMapEmbeddingStorage(rows, width, path, dtype=dtype, mode="r").eval()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "IQ4_NL"])
def test_rows_that_we_have_a_type_for_keep_their_bytes(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(transfer, "PART_VALUES", 7 * 32)
    file = write_qwen(tmp_path / "m.gguf", kind=kind)
    done = import_table(file, 1, tmp_path / "ours.dat")
    assert (done.table.manifest.dtype, done.table.max_error, done.fusion_path) == (OUR_DTYPES[kind], 0.0, None)
    assert (tmp_path / "ours.dat").read_bytes() == rows_of(kind, 256, 32).tobytes()
    known = done.table.manifest.provenance
    assert {name: known[name] for name in ("variant", "layer", "seed", "compressed_vocab_size", "pad_token_id")} == {
        "variant": "qwen_ple",
        "layer": 1,
        "seed": 1234,
        "compressed_vocab_size": 1000,
        "pad_token_id": 7,
    }
    assert not [finding for finding in check_table(tmp_path / "ours.dat").findings if finding.is_wrong]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_other_rows_take_a_dtype_and_are_what_gguf_says(tmp_path, kind):
    file = write_qwen(tmp_path / "m.gguf", kind=kind)
    with pytest.raises(ValueError, match=rf"rows of {kind} are no row type of ours. dtype='float32' keeps every"):
        import_table(file, 1, tmp_path / "none.dat")
    assert names(tmp_path) == ["m.gguf"]
    expected = torch.from_numpy(slow_rows(rows_of(kind, 256, 32), kind))
    assert import_table(file, 1, tmp_path / "wide.dat", dtype="float32").table.max_error == 0
    assert torch.equal(opened(tmp_path / "wide.dat")(torch.arange(256)), expected)
    done = import_table(file, 1, tmp_path / "four.dat", dtype="int4")
    assert (tmp_path / "four.dat").read_bytes() == encode_rows(expected, "int4").numpy().tobytes()
    assert 0 < done.table.rms_error < 0.1 * done.table.rms


@QUIET
def test_a_table_in_another_part_of_a_split_model(tmp_path):
    files = write_deepseek(tmp_path / "m.gguf", kind="BF16", most=1)
    done = import_table(files[0], 2, tmp_path / "ours.dat")
    assert done.source.weights[0].path == files[2]
    rows = done.table.manifest.rows
    assert (tmp_path / "ours.dat").read_bytes() == rows_of("BF16", rows, 64, seed=2).tobytes()


# ours -> GGUF


@pytest.fixture
def ours(tmp_path):
    file = write_qwen(tmp_path / "from" / "m.gguf" if (tmp_path / "from").mkdir() is None else None, kind="F32")
    import_table(file, 1, tmp_path / "from" / "ours.dat")
    return tmp_path / "from" / "ours.dat"


@pytest.mark.parametrize("dtype", list(GGUF_DTYPES))
def test_a_table_of_ours_is_a_gguf_file_that_gguf_and_this_library_read(ours, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(transfer, "PART_VALUES", 7 * 32)
    path = tmp_path / "new" / "table.gguf"
    done = export_gguf(ours, path, dtype=dtype)
    assert (done.tensor, done.dtype, done.num_rows) == (QWEN, GGUF_DTYPES[dtype], 256)
    assert (done.num_bytes, names(path.parent)) == (path.stat().st_size, ["table.gguf"])
    reader = gguf.GGUFReader(path)
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == (QWEN, GGUF_DTYPES[dtype], [32, 256])
    theirs = slow_rows(tensor.data, tensor.tensor_type.name)
    values = opened(ours)(torch.arange(256)).numpy()
    assert np.abs(theirs - values).max() == pytest.approx(done.errors["max_error"], rel=1e-6)
    assert (done.errors["max_error"] == 0) == (dtype == "float32")
    original = gguf.GGUFReader(ours.with_name("m.gguf"))
    for key in ("ple.head_offsets", "ple.head_vocab_sizes", "ple.layer_multipliers", "ple.layers", "ple.ngram_size"):
        found, expected = (one.fields[f"qwen4exp.{key}"].contents() for one in (reader, original))
        assert found == expected
    table = open_released_table(path, 1)
    assert np.array_equal(table(torch.arange(256)).float().numpy(), theirs)
    assert table.config.pad_token_id == 7
    assert "the hash's multipliers" in table.facts.checked
    back = import_table(path, 1, tmp_path / "back.dat")
    assert back.table.manifest.dtype == dtype
    assert np.array_equal(opened(tmp_path / "back.dat", dtype=dtype)(torch.arange(256)).float().numpy(), theirs)


@QUIET
def test_a_deepseek_table_too(tmp_path):
    (file,) = write_deepseek(tmp_path / "m.gguf", kind="BF16")
    import_table(file, 2, tmp_path / "ours.dat")
    done = export_gguf(tmp_path / "ours.dat", tmp_path / "back.gguf")
    assert (done.tensor, done.dtype) == ("blk.2.engram_embd.weight", "BF16")
    table = open_released_table(tmp_path / "back.gguf", 2, config=deepseek_memory())
    assert np.array_equal(
        table(torch.arange(done.num_rows)).float().numpy(),
        slow_rows(rows_of("BF16", done.num_rows, 64, seed=2), "BF16"),
    )


def test_an_export_that_was_ended_goes_on(ours, tmp_path, monkeypatch):
    whole = tmp_path / "whole.gguf"
    export_gguf(ours, whole, dtype="int4")
    monkeypatch.setattr(transfer, "PART_VALUES", 10 * 32)
    monkeypatch.setattr(transfer, "SAVE_BYTES", 1)
    path, calls = tmp_path / "new.gguf", []

    def stop(_):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(ours, path, dtype="int4", advance=stop)
    assert not path.exists()
    done = export_gguf(ours, path, dtype="int4")
    assert 0 < done.resumed_rows < 256
    assert path.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["from", "new.gguf", "whole.gguf"]


def test_what_gguf_has_no_form_for_is_refused(ours, tmp_path):
    with pytest.raises(ValueError, match="GGUF has no rows of int8; choose one of bfloat16, float16, float32, int4"):
        export_gguf(ours, tmp_path / "x.gguf", dtype="int8")
    odd = qwen_memory(engram_dim=4 * 8)
    (tmp_path / "odd").mkdir()
    file = write_qwen(tmp_path / "odd" / "m.gguf", kind="F32", memory=odd)
    import_table(file, 1, tmp_path / "odd" / "ours.dat")
    with pytest.raises(ValueError, match="rows of 8 values, and GGUF's IQ4_NL has whole blocks of 32"):
        export_gguf(tmp_path / "odd" / "ours.dat", tmp_path / "x.gguf", dtype="int4")
    table = MMapEmbeddingStorage(10, 32, tmp_path / "sense.dat", provenance={"variant": "sense"})
    table.commit()
    table.close()
    with pytest.raises(ValueError, match="layout"):
        export_gguf(tmp_path / "sense.dat", tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="choose another --output"):
        export_gguf(ours, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"
    shutil.rmtree(tmp_path / "odd")
