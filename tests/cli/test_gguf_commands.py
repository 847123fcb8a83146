"""`sense-engram inspect`, `lookup` and `convert` on GGUF files."""

import numpy as np
import pytest
import torch
from gguf_files import rows_of, slow_rows
from test_gguf_tables import write_deepseek, write_qwen
from tiny import tiny_tokenizer

from sense_v2.engram.storage import MMapEmbeddingStorage


def test_inspect(run, run_json, tmp_path):
    file = write_qwen(tmp_path / "m.gguf", kind="Q4_0")
    (table,) = run_json("inspect", file)["tables"]
    assert (table["variant"], table["layer"], table["rows"], table["width"], table["dtype"]) == (
        "qwen_ple",
        1,
        256,
        32,
        "Q4_0",
    )
    assert (table["bytes"], table["primes"], table["unchecked"]) == (256 * 18, [53, 59, 61, 67], [])
    status, out, _ = run("inspect", tmp_path)
    assert status == 0
    assert "256 of 32 values, Q4_0, whole" in out
    assert "the hash's multipliers" in out


def test_lookup_gives_the_rows_norms(run_json, tmp_path):
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file = write_qwen(tmp_path / "m.gguf", kind="Q4_0")
    found = run_json("lookup", file, "word1 Word1 word2", "--tokenizer", tmp_path / "tokenizer.json")
    assert (found["variant"], found["token_ids"]) == ("qwen_ple", [4, 5, 7])
    rows = slow_rows(rows_of("Q4_0", 256, 32), "Q4_0")[np.array(found["row_ids"]["1"])]
    assert np.allclose(found["row_norms"]["1"], np.linalg.norm(rows, axis=-1), rtol=1e-5)


def test_convert_there_and_back(run, run_json, tmp_path):
    file = write_qwen(tmp_path / "m.gguf", kind="IQ4_NL")
    result = run_json("convert", file, "--output", tmp_path / "ours.dat")["tables"][0]
    assert (result["dtype"], result["source_dtype"], result["fusion_path"]) == ("int4", "IQ4_NL", None)
    table = MMapEmbeddingStorage(256, 32, tmp_path / "ours.dat", dtype="int4", mode="r")
    expected = slow_rows(rows_of("IQ4_NL", 256, 32), "IQ4_NL")
    assert np.array_equal(table(torch.arange(256)).numpy(), expected)
    result = run_json("convert", tmp_path / "ours.dat", "--to", "gguf", "--output", tmp_path / "back.gguf")
    assert (result["dtype"], result["tensor"], result["error"]["max"]) == (
        "IQ4_NL",
        "per_layer_token_embd.weight",
        0,
    )
    assert run_json("inspect", tmp_path / "back.gguf")["tables"][0]["unchecked"] == []
    status, out, _ = run("convert", tmp_path / "ours.dat", "--to", "gguf", "--output", tmp_path / "wide.gguf",
                         "--dtype", "float32")  # fmt: skip
    assert status == 0
    assert "256 F32 in per_layer_token_embd.weight" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "{tmp}/m.gguf", "--output", "{tmp}/x.dat"), "rows of Q8_0 are no row type of ours"),
        (("convert", "{tmp}/m.gguf", "--output", "{tmp}/x.dat", "--layer", "7"), "no released table of layer 7"),
        (("inspect", "{tmp}/cut.gguf"), "was cut short"),
        (("inspect", "{tmp}/none.gguf"), "none.gguf"),
        (("inspect", "{tmp}/split-00001-of-00003.gguf"), "split-00002-of-00003.gguf isn't there"),
        (("convert", "{tmp}", "--to", "gguf", "--output", "{tmp}/x.gguf"), "has 0 tables"),
    ],
)
def test_errors_are_two_lines(run, tmp_path, arguments, message):
    file = write_qwen(tmp_path / "m.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-40])
    write_deepseek(tmp_path / "split.gguf", most=1)[1].unlink()
    status, out, error = run(*(one.format(tmp=tmp_path) for one in arguments))
    assert status != 0
    assert out == ""
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert (len(lines), lines[0][:7], lines[1][:7]) == (2, "error: ", " help: "), error
    assert message in lines[0]
