"""Rows of GGUF's blocks, decoded in NumPy and gathered and decoded by the extension, against the package gguf."""

import gguf
import numpy as np
import pytest
import torch

from sense_v2.engram.reading import gather as gather_module
from sense_v2.engram.reading.block_rows import BLOCK_FORMATS, decode_blocks
from sense_v2.engram.reading.gather import MANY_IDS, BlockGather, OutOfRangeError

N = 300
NAMES = tuple(BLOCK_FORMATS)
needs_compiled = pytest.mark.skipif(gather_module.compiled is None, reason="no _gather")
needs_exchange = pytest.mark.skipif(gather_module._exchange is None, reason="this PyTorch can't be handed memory")
WAYS = [
    "plain",
    pytest.param("compiled", marks=[needs_compiled, needs_exchange]),
    pytest.param("compiled, an older PyTorch", marks=needs_compiled),
]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(gather_module, "compiled", None)
    elif request.param != "compiled":
        monkeypatch.setattr(gather_module, "_exchange", None)
    return request.param


def random_rows(name: str, num_blocks: int = 3, seed: int = 0) -> np.ndarray:
    """Any bytes at all: scales that are infinite, NaN, subnormal and negative are among them."""
    return np.random.default_rng(seed).integers(
        0, 256, (N, num_blocks * BLOCK_FORMATS[name].block_bytes), dtype=np.uint8
    )


def of_gguf(rows_UB: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.dequantize(rows_UB, gguf.GGMLQuantizationType[name])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, with one NaN as good as another."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), is_nan)
    assert np.array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


def test_the_formats_are_those_of_gguf():
    for name, blocks in BLOCK_FORMATS.items():
        kind = gguf.GGMLQuantizationType[name]
        assert (blocks.name, blocks.number) == (name, kind.value)
        assert (blocks.block_values, blocks.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", NAMES)
def test_numpy_decodes_any_bytes_as_gguf_does(name):
    rows_NB = random_rows(name)
    with np.errstate(all="ignore"):
        assert_same_bits(decode_blocks(rows_NB, BLOCK_FORMATS[name]), of_gguf(rows_NB, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_ids", [0, 1, 7, MANY_IDS + 1])
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
def test_gathered_rows_are_ggufs(way, name, num_ids, id_dtype):
    rows_NB = random_rows(name, seed=1)
    ids = torch.randint(0, N, (num_ids,), generator=torch.Generator().manual_seed(2)).to(id_dtype)
    gather = BlockGather(rows_NB, BLOCK_FORMATS[name])
    with np.errstate(all="ignore"):
        found = gather(ids)
    expected = of_gguf(rows_NB[ids.numpy()], name) if num_ids else np.empty((0, gather.width), np.float32)
    assert_same_bits(found.numpy(), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_large_results_over_several_threads(way, num_threads):
    rows_NB = random_rows("Q4_K")
    ids = torch.randint(0, N, (5_001,), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with np.errstate(all="ignore"):
            found = BlockGather(rows_NB, BLOCK_FORMATS["Q4_K"])(ids)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found.numpy(), of_gguf(rows_NB[ids.numpy()], "Q4_K"))


def test_shapes_and_a_result_of_the_callers(way):
    rows_NB = random_rows("Q8_0")
    gather = BlockGather(rows_NB, BLOCK_FORMATS["Q8_0"])
    ids = torch.arange(24).reshape(2, 3, 4)
    with np.errstate(all="ignore"):
        for view in (ids, ids.transpose(0, 2), ids[:, 1:, ::2], ids[0, 0, 0], ids[:0]):
            out = torch.full((*view.shape, 96), 7.0)
            assert gather(view, out=out) is out
            expected = of_gguf(rows_NB[view.numpy()].reshape(-1, 102), "Q8_0") if view.numel() else np.empty(0)
            assert_same_bits(out.numpy().ravel(), expected.ravel().astype(np.float32))
            assert_same_bits(gather(view).numpy(), out.numpy())


@pytest.mark.parametrize("bad", [-1, N, -(2**63), 2**63 - 1])
def test_an_id_outside_is_refused(way, bad):
    gather = BlockGather(random_rows("Q4_0"), BLOCK_FORMATS["Q4_0"])
    for position, num_ids in ((0, 1), (3, 7), (MANY_IDS, MANY_IDS + 4)):
        ids = torch.zeros(num_ids, dtype=torch.int64)
        ids[position] = bad
        with pytest.raises(OutOfRangeError, match=f"row id {bad}: there are rows 0 to {N - 1}"):
            gather(ids)


def test_denormals_that_torch_flushes_are_decoded(way):
    """A scale below 2⁻¹⁴ is a subnormal float16, and a normal float32."""
    rows_NB = np.zeros((2, 34), dtype=np.uint8)
    rows_NB[:, 0], rows_NB[:, 2:] = 3, 100
    torch.set_flush_denormal(True)
    try:
        found = BlockGather(rows_NB, BLOCK_FORMATS["Q8_0"])(torch.tensor([1]))
    finally:
        torch.set_flush_denormal(False)
    assert found[0].tolist() == [3 * 2.0**-24 * 100] * 32
