"""`sense-engram convert`, `profile` and `warm`, on a small trained model: what is printed, written and refused."""

import collections
import shutil

import numpy as np
import pytest
import torch
from tables import manifest, names
from test_cli import content

from sense_v2.core.config import EngramConfig
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.backbones import saved_tokenizer, separator_id
from sense_v2.hf.data.corpus import encode, read_corpus
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.training.fresh_model import train_bpe

LENGTH = 32


@pytest.fixture
def trained(trained):
    return trained[0]


# convert


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "int4"])
def test_a_converted_model_is_a_model(run, run_json, trained, corpus, tmp_path, dtype):
    before = content(trained)
    output = tmp_path / "runs" / "compact"
    result = run_json("convert", trained, "--dtype", dtype, "--output", output, "--corpus", corpus)
    assert content(trained) == before
    table = MMapEmbeddingStorage(
        result["rows"], result["width"], output / "engram/engram_table.dat", dtype=dtype, mode="r"
    )
    old = np.fromfile(trained / "engram/engram_table.dat", dtype="<f4").reshape(result["rows"], -1)
    error = table(torch.arange(result["rows"])).double().numpy() - old
    assert result["error"]["max"] == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert result["error"]["rms"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert result["bytes"] == (output / "engram/engram_table.dat").stat().st_size < result["source_bytes"] / 3
    losses = [run_json("eval", folder, "--corpus", corpus)["loss"]["with_memory"] for folder in (trained, output)]
    assert [result["loss"]["before"], result["loss"]["after"]] == losses
    assert result["loss"]["change"] == losses[1] - losses[0]
    assert 0 < abs(result["loss"]["change"]) < 0.05
    assert EngramConfig.load(output / "engram/config.json").dtype == dtype
    assert not [name for name in names(output / "engram") if "adagrad" in name or name.endswith(".tmp")]
    same = {name for name in before if name.parent.name != "engram"}
    assert {name: content(output)[name] for name in same} == {name: before[name] for name in same}
    status, out, _ = run("generate", output, "def ", "--max-new-tokens", "3")
    assert (status, bool(out)) == (0, True)
    with pytest.raises(ValueError, match="are only read"):
        from_pretrained(output, mode="r+")


def test_what_a_conversion_prints(run, trained, corpus, tmp_path):
    status, out, error = run("convert", trained, "--dtype", "int8", "--output", tmp_path / "new", "--corpus", corpus)
    assert (status, error) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["table", "rows", "error", "seconds", "loss"]
    assert lines["table"].endswith("engram_table.dat, written and verified")
    assert "int8" in lines["rows"]
    assert "% of the" in lines["rows"]
    assert "largest" in lines["error"]
    assert "of the values' RMS of" in lines["error"]
    assert "with float32" in lines["loss"]
    assert "held-out tokens of corpus" in lines["loss"]


def test_the_same_command_again_finds_it_done(run_json, trained, tmp_path):
    output = tmp_path / "new"
    first = run_json("convert", trained, "--dtype", "int8", "--output", output)
    (output / "config.json").unlink()  # ended before the last file
    again = run_json("convert", trained, "--dtype", "int8", "--output", output)
    assert again["resumed_rows"] == again["rows"]
    assert again["error"] == first["error"]
    assert (output / "config.json").is_file()


@pytest.mark.parametrize("there", ["another conversion", "a model without memory", "itself"])
def test_a_model_that_is_there_is_kept(run, trained, tmp_path, there):
    output = tmp_path / "new"
    if there == "another conversion":
        assert run("convert", trained, "--dtype", "float16", "--output", output)[0] == 0
    elif there == "a model without memory":
        output.mkdir()
        shutil.copy(trained / "config.json", output)
    else:
        output = shutil.copytree(trained, output)
    before = content(output)
    source = output if there == "itself" else trained
    status, _, error = run("convert", source, "--dtype", "int8", "--output", output)
    assert status == 1
    assert error.splitlines()[1] == " help: choose another --output"
    after = {name: raw for name, raw in content(output).items() if name.suffix != ".lock"}
    assert after == {name: raw for name, raw in before.items() if name.suffix != ".lock"}


def test_a_table_alone(run_json, run, trained, tmp_path):
    table = trained / "engram" / "engram_table.dat"
    result = run_json("convert", table, "--dtype", "int8", "--output", tmp_path)
    assert result["path"] == str(tmp_path / "engram_table.dat")
    assert run("verify", tmp_path)[0] == 0
    assert "int8" in run("verify", tmp_path)[1]
    back = run_json("convert", tmp_path, "--dtype", "float32", "--output", tmp_path / "back.dat")
    assert back["error"]["max"] == 0
    assert manifest(tmp_path / "back.dat")["provenance"]["converted_from"]["dtype"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "what", "way_out"),
    [
        (("--dtype", "int2", "--output", "x"), "--dtype int2: no type of rows", "one of float32, "),
        (("--dtype", "float32", "--output", "x"), "has rows of float32 already", "choose another --dtype"),
    ],
)
def test_a_conversion_that_cannot_be(run, trained, arguments, what, way_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = run("convert", trained, *arguments)
    assert status == 1
    lines = error.splitlines()
    assert what in lines[0]
    assert lines[1].startswith(f" help: {way_out}")
    assert names(tmp_path) == []


def test_a_corpus_without_a_model_is_refused(run, trained, corpus, tmp_path):
    table = trained / "engram" / "engram_table.dat"
    status, _, error = run("convert", table, "--dtype", "int8", "--output", tmp_path / "t.dat", "--corpus", corpus)
    assert (status, names(tmp_path)) == (1, [])
    assert "name the folder of the model" in error


def other_tokenizer(corpus, folder):
    """A BPE of fewer tokens than the model's."""
    tokenizer = train_bpe([path.read_text() for path in corpus.iterdir()], vocabulary=300)
    tokenizer.save(str(folder / "other.json"))
    return folder / "other.json"


def test_a_table_for_another_tokenizer(run, run_json, trained, corpus, tmp_path):
    other, before = other_tokenizer(corpus, tmp_path), content(trained)
    arguments = ("convert", trained, "--tokenizer", other, "--corpus", corpus)
    result = run_json(*arguments, "--output", tmp_path / "new")
    assert content(trained) == before
    assert (result["source"], result["tokenizer"], result["layers"]) == (str(trained), str(other), [1])
    assert result["orders"].keys() == {"2", "3"}
    for one in result["orders"].values():
        assert 0 < one["carried"] < one["ngrams"]
        assert 0 < one["share_of_positions"] < 1
    assert result["source_tokens"] < result["tokens"]
    assert 0 < result["carried_rows"] < result["rows"]
    assert run_json("verify", tmp_path / "new" / "engram")["wrong"] == 0

    status, out, _ = run(*arguments, "--output", tmp_path / "again", "--dtype", "bfloat16")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "% of the positions" in lines["2-grams"]
    assert "bfloat16" in lines["rows"]
    assert lines["fusion"] == "fusion   layers 1 carried over, for a model of width 128"


def test_a_tokenizer_that_nothing_is_carried_to(run, trained, corpus, tmp_path):
    other = other_tokenizer(corpus, tmp_path)
    before = names(tmp_path)
    status, _, error = run("convert", trained, "--tokenizer", other, "--output", tmp_path / "new")
    assert (status, "--corpus" in error) == (2, True)
    arguments = ("--corpus", corpus, "--output", tmp_path / "new")
    status, _, error = run("convert", trained, "--tokenizer", trained, *arguments)
    assert (status, "has the shadow map that" in error) == (1, True)
    status, _, error = run("convert", trained / "engram/engram_table.dat", "--tokenizer", other, *arguments)
    assert (status, "name the model's folder" in error) == (1, True)
    assert names(tmp_path) == before


# profile


def row_ids_of(folder, texts):
    """Of every lookup of those texts, by the model's own memory layers, a sequence at a time."""
    model = from_pretrained(folder, mode="r")
    tokenizer = saved_tokenizer(folder)
    stream = torch.from_numpy(encode(texts, tokenizer, separator_id=separator_id(tokenizer))).long()
    ids = [
        layer.row_ids(stream[None, at : at + LENGTH]).flatten()
        for layer in model.engram
        for at in range(0, len(stream), LENGTH)
    ]
    model.engram.storage.close()
    return torch.cat(ids).tolist()


def test_a_profile_is_what_counting_gives(run_json, trained, corpus, tmp_path):
    path = tmp_path / "new" / "hot_rows.npy"
    before = content(trained)
    result = run_json("profile", trained, "--corpus", corpus, "--output", path, "--share", "0.1")
    assert content(trained) == before
    text = read_corpus([corpus])
    counts = collections.Counter(row_ids_of(trained, text.train_texts))
    held_out = row_ids_of(trained, text.held_out_texts)
    hottest = sorted(counts, key=lambda row: (-counts[row], row))
    num_rows = result["table_rows"]
    kept = hottest[: -(-num_rows // 10)]
    assert np.load(path).tolist() == [[row, counts[row]] for row in kept]
    assert (result["rows"], result["rows_met"]) == (len(kept), len(counts))
    assert (result["lookups"], result["held_out_lookups"]) == (counts.total(), len(held_out))
    for one, share in zip(result["hot_sets"], (0.01, 0.05, 0.2), strict=True):
        chosen = set(hottest[: int(np.ceil(share * num_rows))])
        assert one["rows"] == len(chosen)
        assert one["serves"] == pytest.approx(sum(row in chosen for row in held_out) / len(held_out))
    assert result["hot_sets"][0]["serves"] > 0.01


def test_what_a_profile_prints(run, trained, corpus, tmp_path):
    status, out, error = run("profile", trained, "--corpus", corpus, "--output", tmp_path / "hot.npy")
    assert (status, error) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["corpus", "rows", *["hottest"] * 3, "seconds"]
    assert "1.0 % of the table" in out
    assert "of the lookups of" in out


def test_a_profile_of_no_model_is_refused(run, tmp_path):
    status, _, error = run("profile", tmp_path, "--output", tmp_path / "hot.npy")
    assert (status, names(tmp_path)) == (1, [])
    assert error.splitlines()[1] == " help: name a folder that `sense-engram train` wrote"


# warm


def test_warm_loads_hot_rows_of_a_converted_table_too(run, run_json, trained, corpus, tmp_path):
    hot, compact = tmp_path / "hot.npy", tmp_path / "compact"
    run_json("profile", trained, "--corpus", corpus, "--output", hot)
    run_json("convert", trained, "--dtype", "int8", "--output", compact)
    for folder in (trained, compact):
        result = run_json("warm", folder, "--rows", hot, "--share", "0.01")
        assert result["rows"] == int(np.ceil(0.01 * result["table_rows"]))
        assert 0 < result["bytes"] <= result["table_bytes"]
    result = run_json("warm", compact)
    assert (result["rows"], result["bytes"]) == (result["table_rows"], result["table_bytes"])
    status, out, error = run("warm", compact)
    assert (status, error) == (0, "")
    assert "loaded" in out


def test_hot_rows_of_another_table_are_refused(run, run_json, trained, corpus, tmp_path):
    hot = tmp_path / "hot.npy"
    run_json("profile", trained, "--corpus", corpus, "--output", hot)
    other = MMapEmbeddingStorage(100, 8, tmp_path / "other.dat")
    other.commit()
    other.close()
    status, _, error = run("warm", tmp_path / "other.dat", "--rows", hot)
    assert status == 1
    assert "was counted for another table: rows is" in error


def test_more_than_memory_is_refused(run, trained, monkeypatch):
    monkeypatch.setattr("sense_v2.engram.upkeep.warming.usable_memory_bytes", lambda: 1000)
    status, _, error = run("warm", trained)
    assert status == 1
    assert "this process may use 1000 of memory" in error
    assert error.splitlines()[1].startswith(" help: fewer rows")


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_share_that_is_none(run, trained, share):
    assert "--share" in run("warm", trained, "--share", share)[2]
    assert "--share" in run("profile", trained, "--share", share)[2]


def test_a_share_without_rows_is_refused(run, trained):
    assert "with --rows" in run("warm", trained, "--share", "0.5")[2]
