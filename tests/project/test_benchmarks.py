"""The benchmarks run, at sizes that measure nothing, and say what they found as JSON."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast

from sense_v2.engram.reading import gather
from sense_v2.hf.training.fresh_model import train_bpe

FOLDER = Path(__file__).parents[2] / "benchmarks"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the probe needs Linux and a C compiler"
)


def last_line(name: str, arguments: str, monkeypatch, capsys) -> dict:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    importlib.import_module(name).main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@needs_compiler
def test_lookup(tmp_path, monkeypatch, capsys):
    parts = "warm,o1,cold,ahead"
    found = last_line("lookup", f"--tiny --parts {parts} --folder {tmp_path}", monkeypatch, capsys)
    assert found["compiled"] == (gather.compiled is not None)
    assert {*parts.split(",")} <= found.keys()
    assert len(found["warm"]) == 12
    for case in found["warm"].values():
        assert case["x numpy"] > 0
        assert all(0 < times["low"] <= times["median"] <= times["high"] for times in case["seconds"].values())
    assert found["cold"]["16 rows"]["rows/s"] > 0
    assert found["o1"]["16 rows"]["1 M"] == 1
    assert {*found["ahead"]} == {"decode, cold", "decode, warm", "train, cold", "train, warm"}
    assert not [*tmp_path.iterdir()]


def test_decode_cost(monkeypatch, capsys):
    found = last_line("decode_cost", "--tiny --rounds 1 --tokens 2", monkeypatch, capsys)
    assert found["tokens/s of bare"]["median"] > 0
    assert len(found["share"]) == 8
    assert all(share > 0 for share in found["share"].values())


def test_compact(monkeypatch, capsys):
    found = last_line("compact", "--rows 64 --width 64 --rounds 1", monkeypatch, capsys)
    assert all(times > 0 for times in found["ours_times_as_fast"].values())


def test_row_codes(trained, monkeypatch, capsys):
    results = last_line("row_codes", f"{trained[0]} --sequences 2", monkeypatch, capsys)["results"]
    found = {one["way"]: one for one in results}
    assert found["int8"]["rms_error"] < found["int4 (the library's)"]["rms_error"] < 0.12
    assert found["int8"]["kl"] < found["int4 (the library's)"]["kl"] < 1e-3
    assert {one["row_bytes"] for one in results} == {36, 40, 68}


def test_fill(tmp_path, monkeypatch, capsys):
    found = last_line("fill", f"--megabytes 2 --rounds 1 --folder {tmp_path}", monkeypatch, capsys)
    assert found["median_seconds"].keys() == {"dd", "numpy", "ours"}
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_startup(monkeypatch, capsys):
    found = last_line("startup", "--quick --imports", monkeypatch, capsys)
    assert all(times["processor"]["median"] > 0 for times in found["seconds"].values())
    assert {*found["ratios"]} == {"--help / import typer", "--version / import typer", "generate / bare generate"}
    assert "typer" in [one["module"] for one in found["imports"]]


@pytest.mark.slow
def test_serving(monkeypatch, capsys):
    found = last_line("serving", "--tiny", monkeypatch, capsys)
    assert found["clients"].keys() == {"1", "8", "32"}
    for of in found["clients"].values():
        assert all(of[name]["tokens_per_second"] > 0 for name in ("bare", "with memory"))
        assert of["ratio"]["median"] > 0


@pytest.mark.slow
def test_other_tokenizer(trained, corpus, monkeypatch, capsys):
    arguments = f"{trained[0]} --vocabulary 300 --steps 2 --pretraining 2 --sequences 2 --other-text {corpus}"
    found = last_line("other_tokenizer", arguments, monkeypatch, capsys)
    assert 0 < found["carried_rows"] < found["rows"]
    assert all(0 < one["positions"] < 1 for one in found["orders"].values())
    assert [one["model"] for one in found["results"]] == ["retokenized"] * 4 + ["another"] * 4
    none, new, rows, both = found["results"][:4]
    assert none["at_once"] == new["at_once"] == rows["at_once"] != both["at_once"]
    assert len({one["trained"] for one in found["results"]}) == 8


@pytest.mark.slow
def test_retrofit(tmp_path, monkeypatch, capsys):
    tokenizer = train_bpe(["def function(value):\n    return value\n"] * 9)
    tiny_model("llama", vocabulary=tokenizer.get_vocab_size(), max_position_embeddings=128).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    ways = "memory,lora8,all"
    arguments = f"--model {tmp_path} --folder {tmp_path / 'kept'} --steps 2 --texts 8 --ways {ways}"
    results = last_line("retrofit", arguments, monkeypatch, capsys)["results"]
    assert [one["way"] for one in results] == ["memory", "lora8", "all", "lora8"]
    assert [one["at_equal_seconds"] for one in results] == [False, False, False, True]
    for one in results:
        assert np.mean(one["losses"]) == pytest.approx(one["held_out"])
        assert one["kl_own"] > 0 < one["trained"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"tokens.npz", "samples.pt"}


@pytest.mark.slow
def test_facts(tmp_path, monkeypatch, capsys):
    tokenizer = train_bpe(["Question: where was Bako Rimu born? The city of Paris, said the doctor in green.\n"] * 9)
    tiny_model("llama", vocabulary=tokenizer.get_vocab_size(), max_position_embeddings=128).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    arguments = (
        f"--model {tmp_path} --facts 5 --steps 2 --writable-facts 4 --writable-steps 2 --rows 20000 --layers 0,1"
    )
    ways = ["memory", "together", "lora-1e-3-kl", "context"]
    results = last_line("facts", f"{arguments} --ways {','.join(ways)}", monkeypatch, capsys)["results"]
    assert [one["way"] for one in results] == ways
    for one in results:
        assert 0 <= one["held_out"] <= 1
        assert 0 <= one["texts_kept"] <= 1
        assert (one["kl"] > 0) == (one["way"] != "context")
        assert (one["bytes"] > 0) == (one["way"] != "context")
    assert results[0]["rows"] == results[1]["rows"] > 0
    airports = tmp_path / "airports.csv"
    airports.write_text("iata,city\n" + "".join(f"AB{one},Town {one}\n" for one in "CDEFGHI") + ",Nowhere\n")
    found = last_line("facts", f"{arguments} --ways memory --airports {airports}", monkeypatch, capsys)
    assert found["about"] == "airports"
    assert "Q: In which city is the airport {subject}?\nA:" in found["results"][0]["by_wording"]


@needs_compiler
@pytest.mark.slow
def test_prefill(tmp_path, monkeypatch, capsys):
    found = last_line("prefill", f"--tiny --folder {tmp_path}", monkeypatch, capsys)
    assert found["rows"] == 64 * 2 * 16
    assert all(taken > 0 for taken in found["seconds"].values())
    assert not [*tmp_path.iterdir()]
