"""Released tables in place: rows against the released ones and against torch's own reading, at the released size too;
what is refused before the first lookup."""

import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from checkpoints import (
    bits,
    deepseek_config,
    deepseek_rows,
    header,
    slow_deepseek_rows,
    write_checkpoint,
    write_shard,
)
from safetensors import safe_open
from safetensors.torch import load_file

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.released.find_tables import released_config, released_tables
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.variants import variant_config

QUIET = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
DEEPSEEK = "layers.1.engram.embed"
QWEN = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"


def qwen_config(**changes):
    text = {
        "model_type": "qwen4_exp_text",
        "ple_layer_ids": [2],
        "ple_embed_dim": 64,
        "hidden_size": 64,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 128,
        "vocab_size": 1000,
        "eos_token_id": 7,
        "seed": 1234,
        "hc_count": 2,
        **changes,
    }
    return {"model_type": "qwen4_exp", "text_config": text}


# --- rows ---


@QUIET
def test_the_released_rows_are_reproduced_bit_for_bit(golden_folder):
    table = open_released_table(golden_folder / "deepseek_v41_rows_shard.safetensors", 1)
    expected = load_file(golden_folder / "deepseek_v41_rows_expected.safetensors")
    rows = table(expected["in.row_ids"])
    assert (table.num_embeddings, table.embedding_dim, table.dtype) == (1000, 256, torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert bits(rows) == bits(expected["out.rows"])
    assert torch.equal(table.gather(torch.tensor([5, 5, 999])), table(torch.tensor([5, 5, 999])).float())
    assert table(torch.empty(0, 24, dtype=torch.int64)).shape == (0, 24, 256)


@QUIET
def test_rows_in_parts_are_those_of_a_whole_table(tmp_path):
    """Codes cut at other rows than scales, tensors in between that put them at odd bytes, files in any order."""
    codes, scales = deepseek_rows(700)
    odd = {"other.bias": ("U8", (3,), b"abc")}
    cut = {
        "b.safetensors": {
            **odd,
            f"{DEEPSEEK}.shard_1.weight": ("F8_E4M3", (300, 256), codes[100:400].tobytes()),
            f"{DEEPSEEK}.shard_0.scale": ("F8_E8M0", (650, 8), scales[:650].tobytes()),
        },
        "a.safetensors": {
            f"{DEEPSEEK}.shard_2.weight": ("F8_E4M3", (300, 256), codes[400:].tobytes()),
            **odd,
            f"{DEEPSEEK}.shard_0.weight": ("F8_E4M3", (100, 256), codes[:100].tobytes()),
            f"{DEEPSEEK}.shard_1.scale": ("F8_E8M0", (50, 8), scales[650:].tobytes()),
        },
    }
    cut["a.safetensors"].pop("other.bias")
    table = open_released_table(write_checkpoint(tmp_path / "cut", cut), 1)
    ids = torch.tensor([[699, 0, 99], [100, 399, 400], [0, 650, 649]])
    expected = slow_deepseek_rows(codes[ids.numpy()], scales[ids.numpy()])
    assert bits(table(ids)) == bits(expected)
    many = torch.randint(0, 700, (5000,), generator=torch.Generator().manual_seed(1))
    table.prefetch(many)
    assert bits(table(many)) == bits(slow_deepseek_rows(codes[many.numpy()], scales[many.numpy()]))
    assert bits(table(many.int())) == bits(table(many))
    table.close()


@QUIET
def test_one_file_a_rank(tmp_path):
    codes, scales = deepseek_rows(60)
    for rank in range(3):
        rows = slice(20 * rank, 20 * rank + 20)
        write_shard(
            tmp_path / f"model{rank}-mp3.safetensors",
            {
                f"{DEEPSEEK}.weight": ("F8_E4M3", (20, 256), codes[rows].tobytes()),
                f"{DEEPSEEK}.scale": ("F8_E8M0", (20, 8), scales[rows].tobytes()),
            },
        )
    ids = torch.arange(60)
    assert bits(open_released_table(tmp_path, 1)(ids)) == bits(slow_deepseek_rows(codes, scales))
    (tmp_path / "model1-mp3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are one checkpoint, and there are model0-mp3.*model2-mp3"):
        open_released_table(tmp_path, 1)


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_qwen_rows_whole_and_split(tmp_path, num_parts, dtype):
    layout = HeadLayout.from_config(released_config(qwen_config()))
    num_rows = layout.num_rows_L[0]
    assert num_rows == 256  # 53 + 59 + 61 + 67 = 240, filled up
    values = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0))
    stored = values.to({"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[dtype])
    parts = torch.tensor_split(torch.arange(num_rows), num_parts)
    names = [f"{QWEN}.weight"] if num_parts == 1 else [f"{QWEN}.shard_{number}.weight" for number in range(num_parts)]
    shards = {
        f"model-{number}.safetensors": {
            name: (dtype, (len(rows), 16), bits(stored.view(torch.uint8).view(num_rows, -1)[rows]))
        }
        for number, (name, rows) in enumerate(zip(names, parts, strict=True))
    }
    expected = stored.to(torch.bfloat16)
    if dtype == "F8_E4M3":
        scale = torch.tensor([0.3], dtype=torch.bfloat16)
        shards["model-0.safetensors"][f"{QWEN}.weight_scale"] = ("BF16", (1,), bits(scale))
        expected = expected * scale  # what transformers' FP8Embedding does with the rows it has gathered
    folder = write_checkpoint(tmp_path, shards, qwen_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # everything was checked
        table = open_released_table(folder, 1)
    ids = torch.tensor([[0, 255, 84], [85, 86, 170], [171, 1, 0]])
    assert table.dtype == torch.bfloat16
    assert bits(table(ids)) == bits(expected[ids])


def test_the_writer_writes_what_the_library_reads(tmp_path):
    codes, scales = deepseek_rows(4)
    write_shard(
        tmp_path / "a.safetensors",
        {
            f"{DEEPSEEK}.scale": ("F8_E8M0", (4, 8), scales.tobytes()),
            f"{DEEPSEEK}.weight": ("F8_E4M3", (4, 256), {3: codes[3].tobytes()}),
        },
    )
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        codes[:3] = 0
        assert bits(file.get_tensor(f"{DEEPSEEK}.weight")) == codes.tobytes()
        assert bits(file.get_tensor(f"{DEEPSEEK}.scale")) == scales.tobytes()


# --- at the released size ---


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_released_size_opens_is_checked_and_looks_up_in_flat_memory(tmp_path):
    """384,006,168 rows of 264 bytes, all holes but for two rows of each of the three parts."""
    config = deepseek_config(16_000_000, [384_006_168, 384_016_682])
    num_rows = 384_006_168
    cuts = [0, 150_000_000, 300_000_001, num_rows]
    known = [0, 149_999_999, 150_000_000, 300_000_000, 300_000_001, num_rows - 1]
    codes, scales = deepseek_rows(6)
    shards = {}
    for part in range(3):
        low, high = cuts[part], cuts[part + 1]
        rows = [(row - low, codes[i], scales[i]) for i, row in enumerate(known) if low <= row < high]
        shards[f"model-{part}.safetensors"] = {
            f"{DEEPSEEK}.shard_{part}.scale": ("F8_E8M0", (high - low, 8), {r: s.tobytes() for r, _, s in rows}),
            f"{DEEPSEEK}.shard_{part}.weight": ("F8_E4M3", (high - low, 256), {r: c.tobytes() for r, c, _ in rows}),
        }
    folder = write_checkpoint(tmp_path / "full", shards, config)
    try:
        before, started = resident_bytes(), time.perf_counter()
        with pytest.warns(UserWarning, match="not checked.*: the tokenizer's map"):
            table = open_released_table(folder, 1)
        assert table.num_embeddings == num_rows
        assert table.facts.num_bytes == num_rows * 264
        assert "rows against the layout" in table.facts.checked
        assert bits(table(torch.tensor(known))) == bits(slow_deepseek_rows(codes, scales))
        hasher = NgramHasher.from_config(
            variant_config("deepseek_v41"), layer_id=1, compressed_vocab_size=99_092, pad_id=2
        )
        row_ids_BTH = hasher(torch.randint(0, 99_092, (1, 64), generator=torch.Generator().manual_seed(0)))
        table.prefetch(row_ids_BTH)
        assert not table(row_ids_BTH).float().any()
        assert resident_bytes() - before < 200 << 20
        assert time.perf_counter() - started < 30
        table.close()
    finally:
        shutil.rmtree(folder)


# --- checks against the layout, the configuration and the map ---


@pytest.fixture
def small(tmp_path):
    """A whole small checkpoint: its folder, codes and scales."""
    layout = HeadLayout.from_config(released_config(deepseek_config(5, [0, 0])))
    num_rows = layout.num_rows_L[0]
    codes, scales = deepseek_rows(num_rows)
    shards = {
        "model-1.safetensors": {
            f"{DEEPSEEK}.scale": ("F8_E8M0", (num_rows, 8), scales.tobytes()),
            f"{DEEPSEEK}.weight": ("F8_E4M3", (num_rows, 256), codes.tobytes()),
        }
    }
    config = deepseek_config(5, list(layout.num_rows_L))
    return write_checkpoint(tmp_path / "small", shards, config), config


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engram_vocab_size": 6}, r"\d+ rows, but the layout of config\.json has \d+"),
        ({"engram_num_embeddings": [7, 8]}, r"rows, but config\.json says engram_num_embeddings = \[7, 8\]"),
        ({"engram_head_dim": 128}, r"rows of 256 values; config\.json says 128"),
        ({"engram_layer_ids": [2, 14]}, r"config\.json has memory in layers \[2, 14\], counted from 0"),
        ({"engram_n_heads": None}, r"config\.json describes a memory, but not all of it"),
    ],
)
def test_a_config_that_doesnt_fit_is_refused(small, changes, message):
    folder, _ = small
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_released_table(folder, 1)


def test_the_callers_layout_is_compared_too(small):
    folder, config = small
    open_warned = pytest.warns(UserWarning, match="not checked.*the tokenizer's map")
    with open_warned:
        open_released_table(folder, 1, config=released_config(config))
    other = variant_config("deepseek_v41", table_size=6)
    with pytest.raises(ValueError, match="the layout of the configuration passed has"):
        open_released_table(folder, 1, config=other)
    with pytest.raises(ValueError, match=r"0 released tables of layer 2.*There are: deepseek_v41 layer 1"):
        open_released_table(folder, 2)


def test_a_bare_shard_says_what_was_not_checked(golden_folder):
    with pytest.warns(UserWarning, match="not checked.*: the number of rows against the layout, the tokenizer's map"):
        open_released_table(golden_folder / "deepseek_v41_rows_shard.safetensors", 1)


def test_the_tokenizers_map(small, deepseek_map, tmp_path):
    """The released one passes; one of the same size with two ids exchanged doesn't."""
    from sense_v2.engram.tokenizer import EngramTokenizer

    folder, _ = small
    np.save(tmp_path / "right.npy", deepseek_map)
    swapped = np.array(deepseek_map)
    low, high = (swapped == 10), (swapped == 11)
    swapped[low], swapped[high] = 11, 10
    np.save(tmp_path / "swapped.npy", swapped)
    np.save(tmp_path / "small.npy", np.arange(50, dtype=np.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no description.*|.*without.*|.*json.*", category=UserWarning)
        right, other, short = (EngramTokenizer(tmp_path / f"{name}.npy") for name in ("right", "swapped", "small"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "the tokenizer's map" in open_released_table(folder, 1, tokenizer=right).facts.checked
    with pytest.raises(ValueError, match="is that of another tokenizer, or of another revision"):
        open_released_table(folder, 1, tokenizer=other)
    with pytest.raises(ValueError, match=r"has 50 compressed ids, config\.json says 99092"):
        open_released_table(folder, 1, tokenizer=short)


# --- bad input ---

W, S = f"{DEEPSEEK}.weight", f"{DEEPSEEK}.scale"
GOOD = {W: ("F8_E4M3", (4, 256), None), S: ("F8_E8M0", (4, 8), None)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({W: GOOD[W]}, "its scale isn't there"),
        ({S: GOOD[S]}, "and no weight"),
        ({**GOOD, W: ("BF16", (4, 256), None)}, "is BF16; expected F8_E4M3"),
        ({**GOOD, S: ("U8", (4, 8), None)}, "is U8; expected F8_E8M0"),
        ({**GOOD, S: ("F8_E8M0", (3, 8), None)}, "scales of 3 rows beside 4 rows"),
        ({**GOOD, S: ("F8_E8M0", (4, 7), None)}, r"has shape \[4, 7\]; expected \[rows, 8\]"),
        ({**GOOD, W: ("F8_E4M3", (1024,), None)}, r"has shape \[1024\]; expected \[rows, width\]"),
        ({**GOOD, f"{DEEPSEEK}.shard_0.weight": GOOD[W]}, "whole and in parts"),
        ({f"{DEEPSEEK}.shard_0.weight": GOOD[W], f"{DEEPSEEK}.shard_2.weight": GOOD[W], S: GOOD[S]}, "shard 1 of 3"),
        ({f"{QWEN}.weight": ("BF16", (4, 16), None), f"{QWEN}.weight_scale": ("BF16", (1,), None)}, "have no scale"),
        ({f"{QWEN}.weight": ("F8_E4M3", (4, 16), None)}, "its scale isn't there"),
        (
            {f"{QWEN}.weight": ("F8_E4M3", (4, 16), None), f"{QWEN}.weight_scale": ("BF16", (4, 1), None)},
            "expected one number",
        ),
        ({"other": ("U8", (1,), None)}, "There are: none"),
    ],
)
def test_tensors_that_are_no_table_are_refused(tmp_path, tensors, message):
    write_shard(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        open_released_table(tmp_path / "a.safetensors", 1)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FINE = {W: entry("F8_E4M3", [4, 256], 0, 1024), S: entry("F8_E8M0", [4, 8], 1024, 1056)}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header(FINE) + bytes(1055), "was cut short"),
        (header(FINE) + bytes(1057), "bytes that no tensor owns"),
        (header({**FINE, S: entry("F8_E8M0", [4, 8], 1023, 1055)}) + bytes(1055), "overlaps the tensor before it"),
        (header({**FINE, S: entry("F8_E8M0", [4, 8], 1025, 1057)}) + bytes(1057), "leaves a gap before it"),
        (header({**FINE, S: entry("F8_E8M0", [5, 8], 1024, 1056)}) + bytes(1056), "40 bytes, but 32 by its offsets"),
        (header({**FINE, S: entry("F8_E8M0", [4, -8], 1024, 1056)}) + bytes(1056), "entry for .* is damaged"),
        (header({**FINE, S: 7}) + bytes(1056), "entry for .* is damaged"),
        (b"\x00" * 7, "7 bytes are no safetensors file"),
        (b"\xff" * 64, "header is said to have"),
        (b"\x08" + bytes(7) + b"not json", "its header is no JSON"),
        (b"\x0e" + bytes(7) + b'{"a":1,"a":2} ', "a name comes twice"),
        (b"\x02" + bytes(7) + b"[]", "no JSON object"),
    ],
)
def test_files_that_are_damaged_are_refused(tmp_path, raw, message):
    (tmp_path / "a.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        open_released_table(tmp_path, 1)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/a.safetensors", "", "x/../../a.safetensors"])
def test_an_index_that_points_outside_of_its_folder_opens_nothing(tmp_path, file):
    write_shard(tmp_path / "a.safetensors", GOOD)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {W: file, S: file}}))
    with pytest.raises(ValueError, match="which lies outside of its folder"):
        open_released_table(inner, 1)


def test_indexes_and_files_that_disagree(tmp_path):
    folder = write_checkpoint(tmp_path, {"a.safetensors": GOOD})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {W: "a.safetensors", f"{DEEPSEEK}.shard_1.scale": "a.safetensors"}}))
    with pytest.raises(ValueError, match=r"shard_1\.scale is in a\.safetensors, which doesn't have it"):
        open_released_table(folder, 1)
    index.write_text(json.dumps({"weight_map": {W: "b.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"missing, though .* names it"):
        open_released_table(folder, 1)
    index.write_text(json.dumps({"weights": {}}))
    with pytest.raises(ValueError, match="no weight_map"):
        open_released_table(folder, 1)
    index.unlink()
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ValueError, match=r"is in .*a\.safetensors and in .*b\.safetensors; name the file"):
        open_released_table(folder, 1)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        open_released_table(folder / "c.safetensors", 1)


# --- as the storage has it ---


@QUIET
def test_a_file_that_is_cut_while_open(tmp_path):
    write_shard(tmp_path / "a.safetensors", GOOD)
    table = open_released_table(tmp_path, 1)
    os.truncate(tmp_path / "a.safetensors", 100)
    with pytest.raises(OSError, match="the file was cut while it was open"):
        table(torch.tensor([0]))


def test_what_a_checkpoint_has(small):
    folder, _ = small
    (facts,) = released_tables(folder)
    assert (facts.variant, facts.layer, facts.width, facts.num_parts) == ("deepseek_v41", 1, 256, 1)
    assert facts.unchecked == ["the tokenizer's map"]
