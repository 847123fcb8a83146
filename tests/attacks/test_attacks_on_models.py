"""Configurations, tokenizers and checkpoints that come from anywhere: refused at once, as an error of the file."""

import hashlib
import json
import os

import numpy as np
import pytest
from tables import make
from tiny import tiny_tokenizer
from tokenizers import Tokenizer

from sense_v2.core.config import Config, yaml_value
from sense_v2.core.errors import CommandError
from sense_v2.engram.reading.safetensors_headers import find_tensors
from sense_v2.engram.released.find_tables import released_config
from sense_v2.engram.table.opening import TableFiles, read_manifest
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.engram.upkeep import hot_rows
from sense_v2.hf.backbones import saved_tokenizer

DEEPSEEK = {
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_vocab_size": 16_000_000,
    "engram_head_dim": 256,
}
QWEN = {"ple_layer_ids": [1], "hidden_size": 256}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (DEEPSEEK, "engram_max_ngram_size"),
        (DEEPSEEK, "engram_n_heads"),
        (QWEN, "ngram_size"),
        (QWEN, "heads_per_ngram"),
    ],
)
@pytest.mark.parametrize("value", [10**12, 0, -1, 2.0, True, "4"])
def test_a_configuration_that_asks_for_endless_work(text, name, value):
    assert released_config(text) is not None
    with pytest.raises(ValueError, match=rf"config\.json: {name} = .*: must be from 1 to \d+\. Fetch it again"):
        released_config({**text, name: value})


def test_aliases_that_grow(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    (tmp_path / "run.yaml").write_text(bomb)
    with pytest.raises(ValueError, match=r"run\.yaml: not valid YAML: a configuration has no aliases"):
        Config.load(tmp_path / "run.yaml")
    assert yaml_value("[&a 1, *a]") == "[&a 1, *a]"
    (tmp_path / "run.yaml").write_text("[" * 20_000)
    with pytest.raises(ValueError, match=r"run\.yaml: not valid YAML: it is nested too deeply"):
        Config.load(tmp_path / "run.yaml")


def tokenizer_json(folder, **changes):
    tiny_tokenizer(9).save(str(folder / "tokenizer.json"))
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, **changes}))
    return folder / "tokenizer.json"


def test_a_tokenizer_that_makes_its_library_panic(tmp_path):
    path = tokenizer_json(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json: the file is damaged"):
        EngramTokenizerBuilder(str(path))
    with pytest.raises(CommandError, match="can't be loaded: ValueError: the file is damaged"):
        saved_tokenizer(tmp_path)


def test_a_token_id_of_four_billions(tmp_path):
    path = tokenizer_json(tmp_path)
    path.write_text(
        path.read_text()
        .replace('"word0":1,', f'"word0":{4 * 10**9},')
        .replace('"word0": 1,', f'"word0": {4 * 10**9},')
    )
    damaged = r"has 9 tokens, and ids up to 4000000000: its file is damaged\. Fetch it"
    for named in (str(path), Tokenizer.from_file(str(path))):
        with pytest.raises(ValueError, match=damaged):
            EngramTokenizerBuilder(named)
    with pytest.raises(CommandError, match=damaged):
        saved_tokenizer(tmp_path)


def test_a_pipe_in_place_of_a_checkpoints_file(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pipe.safetensors"}}')
    os.mkfifo(tmp_path / "pipe.safetensors")
    os.mkfifo(tmp_path / "pipe.json")
    for place in (tmp_path, tmp_path / "pipe.safetensors", tmp_path / "pipe.json"):
        with pytest.raises(ValueError, match=r"pipe\.\w+: a pipe or a device, which might be waited for forever"):
            find_tensors(place, lambda name: True)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999, 2), }",
        b"{'descr': (",
        b"  x\n y",
        b"1" * 9000,
    ],
)
def test_hot_rows_with_a_forged_header(tmp_path, header):
    make(tmp_path / "t.dat").close()
    manifest = read_manifest(TableFiles(tmp_path / "t.dat").manifest)
    path = tmp_path / "hot.npy"
    ids = np.arange(3)
    hot_rows.save(hot_rows.HotRows(ids, ids, manifest.rows, hot_rows.identity(manifest), "corpus", 3, 3), path)
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    described = json.loads(path.with_suffix(".json").read_text())
    described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"hot\.json isn't the JSON of hot rows: .*\. Make them again"):
        hot_rows.load(path, manifest)
