"""Tables in GGUF files, in place: rows against the package gguf, names and metadata as llama.cpp's converter writes
them, the released size, and what is refused before the first lookup."""

import os
import shutil
import time
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import DEEPSEEK, QWEN, rows_of, slow_rows, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS
from sense_v2.engram.released.find_tables import released_tables
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.tokenizer import map_sha256
from sense_v2.engram.variants import variant_config

QUIET = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
KINDS = ("F32", "F16", "BF16", *BLOCK_FORMATS)
TABLE = DEEPSEEK.format(layer=1)
TORCH = {"F16": torch.float16, "BF16": torch.bfloat16}


def qwen_memory(**changes):
    return variant_config(
        "qwen_ple", **{"table_size": 50, "num_heads": 2, "engram_dim": 4 * 32, "pad_token_id": 7, **changes}
    )


def qwen_metadata(config, vocab_size, **changes):
    """The keys that conversion/qwen4exp.py writes, of a memory of ours."""
    layout = HeadLayout.from_config(config)
    hasher = NgramHasher.from_config(config, layer_id=1, compressed_vocab_size=vocab_size, pad_id=config.pad_token_id)
    keys = {
        "ple.layers": list(config.layer_indices),
        "ple.ngram_size": max(config.ngram_orders),
        "ple.heads_per_ngram": config.num_heads,
        "ple.conv_kernel": 4,
        "ple.eos_token_id": config.pad_token_id,
        "embedding_length_per_layer_input": config.row_dim,
        "hyper_connection.count": 4,
        "ple.layer_multipliers": hasher.multipliers.tolist(),
        "ple.head_offsets": list(layout.offsets_LH[0]),
        "ple.head_vocab_sizes": list(layout.primes_LH[0]),
        **changes,
    }
    named = {f"qwen4exp.{key}": value for key, value in keys.items() if value is not None}
    if vocab_size != 248_320:
        named["tokenizer.ggml.tokens"] = [f"t{number}" for number in range(vocab_size)]
    return named


def deepseek_memory(**changes):
    return variant_config(
        "deepseek_v41",
        **{"table_size": 5, "num_heads": 2, "ngram_orders": [2, 3], "engram_dim": 4 * 64, "layer_indices": [1, 2]}
        | changes,
    )


TOKEN_MAP = [0, 1, 2, 3, 1, 4, 5, 0, 6]


def deepseek_metadata(config, token_map=TOKEN_MAP, **changes):
    """The keys that src/models/deepseek41.cpp reads."""
    layout, size = HeadLayout.from_config(config), max(token_map) + 1
    multipliers = [
        number
        for layer in config.layer_indices
        for number in NgramHasher.from_config(
            config, layer_id=layer, compressed_vocab_size=size, pad_id=0
        ).multipliers.tolist()
    ]
    keys = {
        "engram.layer_ids": list(config.layer_indices),
        "engram.head_count": config.num_heads,
        "engram.key_length": config.row_dim,
        "engram.max_ngram_size": max(config.ngram_orders),
        "engram.multipliers": multipliers,
        "engram.primes": [prime for of_layer in layout.primes_LH for prime in of_layer],
        "engram.offsets": [offset for of_layer in layout.offsets_LH for offset in of_layer],
        "engram.token_map": list(token_map),
        "engram.pad_id": 2,
        **changes,
    }
    return {f"deepseek41.{key}": value for key, value in keys.items() if value is not None}


def write_qwen(path, kind="Q8_0", num_rows=256, content=None, memory=None, **changes):
    memory = memory or qwen_memory()
    rows = rows_of(kind, num_rows, memory.row_dim).tobytes() if content is None else content
    metadata = qwen_metadata(memory, 1000, **changes)
    return write_gguf(path, {QWEN: (kind, (num_rows, memory.row_dim), rows)}, metadata, arch="qwen4exp")[0]


def write_deepseek(path, kind="Q4_0", content=None, most=0, token_map=TOKEN_MAP, **changes):
    memory = deepseek_memory()
    tensors = {"token_embd.weight": ("F32", (2, 8), bytes(64))}
    for layer, num_rows in zip(memory.layer_indices, HeadLayout.from_config(memory).num_rows_L, strict=True):
        rows = rows_of(kind, num_rows, memory.row_dim, seed=layer)
        tensors[DEEPSEEK.format(layer=layer)] = (kind, (num_rows, memory.row_dim), rows.tobytes())
    return write_gguf(path, tensors, deepseek_metadata(memory, token_map, **changes), arch="deepseek41", most=most)


def everything_checked(*arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return open_released_table(*arguments, **settings)


# --- rows ---


@QUIET
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_type_are_ggufs(tmp_path, kind):
    rows_NB = rows_of(kind, 300, 512)
    (file,) = write_gguf(
        tmp_path / "m.gguf", {"a": ("F32", (1,), bytes(4)), TABLE: (kind, (300, 512), rows_NB.tobytes())}
    )
    table = open_released_table(file, 1)
    expected = slow_rows(rows_NB, kind)
    ids = torch.tensor([[0, 299, 7], [7, 7, 150]])
    assert (table.num_embeddings, table.embedding_dim, table.dtype) == (300, 512, TORCH.get(kind, torch.float32))
    assert np.array_equal(table(ids).float().numpy(), expected[ids.numpy()])
    many = torch.randint(0, 300, (5000,), generator=torch.Generator().manual_seed(1))
    table.prefetch(many)
    assert np.array_equal(table(many.int()).float().numpy(), expected[many.numpy()])
    assert np.array_equal(table.rows_as(ids, torch.float32).numpy(), expected[ids.numpy()])
    assert table(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 512)
    assert table.facts.num_bytes == rows_NB.size
    table.close()


@QUIET
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_rows_that_gguf_has_quantized(tmp_path, kind):
    values = np.random.default_rng(0).standard_normal((50, 160)).astype(np.float32)
    raw = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: (kind, (50, 160), raw.tobytes())})
    found = open_released_table(file, 1)(torch.arange(50)).numpy()
    assert np.array_equal(found, slow_rows(raw, kind))
    assert np.abs(found - values).max() < 0.5


def test_a_model_of_two_tables_in_several_files(tmp_path):
    files = write_deepseek(tmp_path / "m.gguf", most=1)
    for layer in (1, 2):
        with pytest.warns(UserWarning, match="not checked.*: the tokenizer's map"):
            table = open_released_table(files[0], layer)
        assert table.tensors.weights[0].path == files[layer]
        expected = slow_rows(rows_of("Q4_0", table.num_embeddings, 64, seed=layer), "Q4_0")
        assert np.array_equal(table(torch.arange(table.num_embeddings)).numpy(), expected)
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00001-of-00003\.gguf isn't there"):
        open_released_table(files[1], 1)


# --- what the metadata says ---


def test_a_qwen_table_is_checked_and_its_ids_are_those_of_the_memory(tmp_path):
    memory = qwen_memory()
    table = everything_checked(write_qwen(tmp_path / "m.gguf"), 1)
    assert (table.facts.variant, table.facts.layer, table.facts.dtype) == ("qwen_ple", 1, "Q8_0")
    assert "the hash's multipliers" in table.facts.checked
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6]])
    sizes = {"layer_id": 1, "compressed_vocab_size": 1000, "pad_id": 7}
    assert torch.equal(
        NgramHasher.from_config(table.config, **sizes)(ids), NgramHasher.from_config(memory, **sizes)(ids)
    )
    assert (table.config.num_streams, table.config.pad_token_id, table.config.row_dim) == (4, 7, 32)
    assert table.belongs_to.compressed_vocab_size == 1000


def test_a_deepseek_table_is_checked_with_its_token_map(tmp_path):
    (file,) = write_deepseek(tmp_path / "m.gguf")
    assert [(facts.layer, facts.dtype) for facts in released_tables(file)] == [(1, "Q4_0"), (2, "Q4_0")]
    with pytest.warns(UserWarning, match="not checked.*: the tokenizer's map"):
        table = open_released_table(file, 2)
    assert table.belongs_to.compressed_vocab_size == 7
    assert table.belongs_to.map_sha256 == map_sha256(np.array(TOKEN_MAP, dtype=np.int64))
    assert (table.config.pad_token_id, table.config.layer_indices, table.config.row_dim) == (2, [1, 2], 64)


def test_a_table_alone_says_what_was_not_checked(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: ("Q8_0", (4, 32), None)})
    with pytest.warns(
        UserWarning, match="not checked.*the number of rows against the layout, the hash's multipliers"
    ):
        open_released_table(file, 1)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("ple.layers", [1, 2], r"qwen4exp\.ple\.layers has 2 numbers; expected 1"),
        ("ple.layers", 1, r"qwen4exp\.ple\.layers must be a list of integers"),
        ("ple.layers", [10**6], r"qwen4exp\.ple\.layers = \[1000000\]: must be a layer, counted from 0"),
        ("ple.layers", None, r"qwen4exp\.ple\.layers isn't there"),
        ("ple.ngram_size", 10**9, r"qwen4exp\.ple\.ngram_size = 1000000000: must be from 2 to 16"),
        ("ple.ngram_size", "3", r"qwen4exp\.ple\.ngram_size = 3: must be from 2 to 16"),
        ("ple.heads_per_ngram", 4_000_000_000, r"ple\.heads_per_ngram = 4000000000: must be from 1"),
        ("ple.heads_per_ngram", 3, r"ple\.head_vocab_sizes has 4 numbers; expected 6"),
        ("ple.head_vocab_sizes", [53, 59, 61, 71], r"has 71 for head 3, and the layout 67: .* another layout"),
        ("ple.head_vocab_sizes", [52, 59, 61, 67], r"has 52 for head 0, and the layout 53"),
        ("ple.head_vocab_sizes", [2**62, 59, 61, 67], r"has 4 heads of 59 to 4611686018427387904 rows"),
        ("ple.head_vocab_sizes", [0, 59, 61, 67], "has 4 heads of 0 to 67 rows"),
        ("ple.head_offsets", [0, 53, 112, 174], r"ple\.head_offsets has 174 for head 3, and the layout 173"),
        ("ple.layer_multipliers", [3, 5, 7], r"ple\.layer_multipliers aren't those of seed 1234 and 1000 ids"),
        ("ple.layer_multipliers", [3, 5], r"ple\.layer_multipliers has 2 numbers; expected 3"),
        ("ple.layer_multipliers", None, r"ple\.layer_multipliers isn't there, though other keys"),
        ("ple.eos_token_id", 1000, r"ple\.eos_token_id = 1000: must be from 0 to 999"),
        ("embedding_length_per_layer_input", 64, "rows of 32 values; its metadata says 64"),
    ],
)
def test_metadata_that_doesnt_fit_is_refused(tmp_path, key, value, text):
    file = write_qwen(tmp_path / "m.gguf", **{key: value})
    with pytest.raises(ValueError, match=text) as error:
        open_released_table(file, 1)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"engram.layer_ids": [2, 1]}, r"engram\.layer_ids = \[2, 1\]: must be layers in ascending order"),
        ({"engram.layer_ids": list(range(100))}, r"engram\.layer_ids must be a list of 1 to 64 integers"),
        ({"engram.layer_ids": [1, 5]}, r"engram\.multipliers aren't those of seed 0"),
        ({"engram.primes": [5, 7, 11, 13]}, r"engram\.primes has 4 numbers; expected 8"),
        ({"engram.multipliers": None}, r"engram\.multipliers isn't there"),
        ({"engram.multipliers": [1] * 6}, r"engram\.multipliers aren't those of seed 0 and 7 ids"),
        ({"engram.pad_id": 7}, r"engram\.token_map is no map of tokens to ids from 0 on, with the pad id 7"),
        ({"engram.key_length": 128}, "rows of 64 values; its metadata says 128"),
    ],
)
def test_deepseeks_metadata_too(tmp_path, changes, text):
    (file,) = write_deepseek(tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=text):
        open_released_table(file, 2)


def test_fewer_rows_than_the_heads_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="239 rows, but the layout of its metadata has 478"):
        open_released_table(write_qwen(tmp_path / "m.gguf", num_rows=239), 1)
    everything_checked(write_qwen(tmp_path / "n.gguf", num_rows=240), 1)
    everything_checked(write_qwen(tmp_path / "o.gguf", num_rows=300), 1)


def test_the_callers_layout_and_layer_are_compared(tmp_path):
    file = write_qwen(tmp_path / "m.gguf")
    everything_checked(file, 1, config=qwen_memory())
    with pytest.raises(ValueError, match="rows of 32 values; the configuration passed says 16"):
        open_released_table(file, 1, config=qwen_memory(engram_dim=64))
    with pytest.raises(ValueError, match=r"0 released tables of layer 2.*There are: qwen_ple layer 1"):
        open_released_table(file, 2)


def test_somebody_elses_tensor_of_that_name_is_no_table(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {QWEN: ("F32", (4, 8), bytes(128))}, arch="gemma4")
    assert released_tables(file) == []


@QUIET
def test_a_layer_has_one_name(tmp_path):
    rows_NB = rows_of("Q8_0", 4, 32)
    tensors = dict.fromkeys(("blk.01.engram_embd.weight", "blk.1.engram_embd.weight.old"), ("Q8_0", (4, 32), None))
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: ("Q8_0", (4, 32), rows_NB.tobytes()), **tensors})
    assert np.array_equal(open_released_table(file, 1)(torch.arange(4)).numpy(), slow_rows(rows_NB, "Q8_0"))


@pytest.mark.parametrize("kind", ["I8", "MXFP4", "IQ4_XS"])
def test_types_that_are_not_served_are_named(tmp_path, kind):
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: (kind, (4, 256), None)})
    with pytest.raises(ValueError, match=rf"m\.gguf: blk\.1\.engram_embd\.weight is {kind}; expected F32 or F16 or"):
        open_released_table(file, 1)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 32)])
def test_shapes_that_are_no_table_are_refused(tmp_path, shape):
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: ("F32", shape, None)})
    with pytest.raises(ValueError, match=r"expected \[rows, width\]"):
        open_released_table(file, 1)


@QUIET
def test_a_file_that_is_cut_while_open(tmp_path):
    (file,) = write_gguf(tmp_path / "m.gguf", {TABLE: ("Q8_0", (4, 32), None)})
    table = open_released_table(file, 1)
    os.truncate(file, 100)
    with pytest.raises(OSError, match="the file was cut while it was open"):
        table(torch.tensor([0]))


# --- at the released size ---


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_released_size_opens_is_checked_and_looks_up_in_flat_memory(tmp_path):
    """Qwen's 320 M rows of 160 values in Q4_0: 28.8 GB, all holes but for a few rows."""
    memory = variant_config("qwen_ple")
    num_rows = HeadLayout.from_config(memory).num_rows_L[0]
    known = [0, 1, 163_840_000, num_rows - 1]
    rows_NB = rows_of("Q4_0", len(known), 160)
    content = {row: rows_NB[place].tobytes() for place, row in enumerate(known)}
    tensors = {QWEN: ("Q4_0", (num_rows, 160), content)}
    (file,) = write_gguf(tmp_path / "m.gguf", tensors, qwen_metadata(memory, 248_320), arch="qwen4exp")
    try:
        assert (num_rows, file.stat().st_blocks * 512 < 1 << 20) == (320_001_536, True)
        before, started = resident_bytes(), time.perf_counter()
        table = everything_checked(file, 1)
        assert time.perf_counter() - started < 30
        assert np.array_equal(table(torch.tensor(known)).numpy(), slow_rows(rows_NB, "Q4_0"))
        hasher = NgramHasher.from_config(table.config, layer_id=1, compressed_vocab_size=248_320, pad_id=248_044)
        row_ids_BTH = hasher(torch.randint(0, 248_320, (1, 64), generator=torch.Generator().manual_seed(0)))
        table.prefetch(row_ids_BTH)
        assert not table(row_ids_BTH).any()
        assert resident_bytes() - before < 200 << 20
        table.close()
    finally:
        shutil.rmtree(tmp_path)


# --- damage ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write_qwen(tmp_path_factory.mktemp("whole") / "m.gguf", kind="Q4_0").read_bytes()


def rows_or_refused(path: Path, raw: bytes) -> None:
    """Refused by name, or the rows that the package gguf reads of the same bytes."""
    path.write_bytes(raw)
    try:
        table = open_released_table(path, 1)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return
    (tensor,) = gguf.GGUFReader(path).tensors
    with np.errstate(all="ignore"):
        expected = slow_rows(tensor.data, tensor.tensor_type.name)
    found = table(torch.arange(table.num_embeddings)).float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    table.close()


@QUIET
@given(at=st.integers(0, 1500), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_of_the_header_gives_no_other_rows(whole, tmp_path, at, bit):
    rows_or_refused(tmp_path / "m.gguf", whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])


@QUIET
@given(at=st.integers(0, 1500), new=st.binary(min_size=1, max_size=8))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_were_changed_give_no_other_rows(whole, tmp_path, at, new):
    rows_or_refused(tmp_path / "m.gguf", whole[:at] + new + whole[at + len(new) :])


def test_every_part_that_can_be_cut_off_is_missed(whole, tmp_path):
    path = tmp_path / "m.gguf"
    for length in [*range(0, 1600, 7), len(whole) // 2, len(whole) - 33, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            open_released_table(path, 1)
