"""Tables of ours <-> released checkpoints: there and back bit for bit, killed and gone on with, refused by name."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers.models.qwen4_exp", reason="a transformers before Qwen4-Exp")
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
from safetensors.torch import load_file, save_file
from tables import manifest, names
from test_qwen import text_config as qwen_text_config
from test_released_table import DEEPSEEK, QWEN, change_config, qwen_config
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from sense_v2.engram.head_layout import HeadLayout
from sense_v2.engram.model import EngramFusionLayer
from sense_v2.engram.released.exporting import export_tables
from sense_v2.engram.released.find_tables import released_config, released_tables
from sense_v2.engram.released.fusion_names import decode_blocks, encode_blocks, ours_from_theirs, theirs_from_ours
from sense_v2.engram.released.importing import import_table
from sense_v2.engram.released.released_table import open_released_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.table import disk
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.engram.upkeep import transfer
from sense_v2.engram.upkeep.check import check_table
from sense_v2.engram.variants import variant_config

pytestmark = pytest.mark.filterwarnings("ignore:.*not checked:UserWarning")
CONFIG = deepseek_config(5, [0, 0], hc_mult=2)
LAYOUT = HeadLayout.from_config(released_config(CONFIG))
C, S = 40, 2


def fusion_tensors(layer, seed=0):
    """Of DeepSeek's names, with numbers that float8 and its scales hold exactly: {name: (type, shape, bytes)}."""
    generator = torch.Generator().manual_seed(seed + layer)
    wkv = torch.randint(-8, 9, ((S + 1) * C, 24 * 256), generator=generator).float() / 4
    codes, scales = encode_blocks(wkv)
    norms = {f"{name}_weight": torch.randn(S, C, generator=generator).bfloat16() for name in "qk"}
    prefix = f"layers.{layer}.engram"
    return {
        f"{prefix}.wkv.weight": ("F8_E4M3", tuple(codes.shape), bits(codes)),
        f"{prefix}.wkv.scale": ("F8_E8M0", tuple(scales.shape), bits(scales)),
        **{f"{prefix}.{name}": ("BF16", (S, C), bits(norm)) for name, norm in norms.items()},
    }


@pytest.fixture
def deepseek(tmp_path):
    """A whole small checkpoint of two layers with their fusion, cut differently in each: folder, {layer: (codes,
    scales)}."""
    rows = {layer: deepseek_rows(LAYOUT.num_rows_L[place], seed=layer) for place, layer in enumerate((1, 14))}
    rows[1][0][3, 7] = 0x7F  # a NaN is kept as it is
    shards = {}
    for layer, (codes, scales) in rows.items():
        cut, prefix = 100 * layer, f"layers.{layer}.engram.embed"
        shards[f"{layer}-a.safetensors"] = {
            "other.bias": ("U8", (3,), b"abc"),
            f"{prefix}.shard_0.weight": ("F8_E4M3", (cut, 256), codes[:cut].tobytes()),
            f"{prefix}.scale": ("F8_E8M0", scales.shape, scales.tobytes()),
        }
        shards[f"{layer}-b.safetensors"] = {
            f"{prefix}.shard_1.weight": ("F8_E4M3", (len(codes) - cut, 256), codes[cut:].tobytes()),
            **fusion_tensors(layer),
        }
    shards["14-a.safetensors"].pop("other.bias")
    config = deepseek_config(5, list(LAYOUT.num_rows_L), hc_mult=S)
    return write_checkpoint(tmp_path / "released", shards, config), rows


def opened(path, dtype, **arguments):
    described = manifest(path)
    return MMapEmbeddingStorage(described["rows"], described["width"], path, dtype=dtype, mode="r", **arguments)


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_bits(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape, bits(tensor)) == (
            other[name].dtype,
            other[name].shape,
            bits(other[name]),
        ), name


# --- from released to ours ---


def test_deepseeks_table_is_one_of_ours_with_the_same_bytes(deepseek, tmp_path):
    folder, rows = deepseek
    advanced = []
    done = import_table(folder, 14, tmp_path / "ours.dat", advance=advanced.append)
    codes, scales = rows[14]
    assert (tmp_path / "ours.dat").read_bytes() == np.concatenate([codes, scales], axis=1).tobytes()
    assert sum(advanced) == 2 * len(codes) * 264
    assert (done.table.max_error, done.table.rms_error, done.table.resumed_rows) == (0, 0, 0)
    table = opened(tmp_path / "ours.dat", "float8_e4m3fn")
    ids = torch.arange(len(codes))
    assert bits(table(ids)) == bits(open_released_table(folder, 14)(ids)) == bits(slow_deepseek_rows(codes, scales))
    provenance = manifest(tmp_path / "ours.dat")["provenance"]
    assert (provenance["variant"], provenance["layer"], provenance["seed"]) == ("deepseek_v41", 14, 0)
    assert provenance["layout"] == LAYOUT.to_dict()
    assert provenance["compressed_vocab_size"] == 99_092
    assert provenance["shadow_map_sha256"].startswith("26b9be2936d236a1")
    assert provenance["converted_from"]["dtype"] == "F8_E4M3"
    assert not [finding.text for finding in check_table(tmp_path / "ours.dat").findings if finding.is_wrong]
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_the_released_rows_look_up_bit_for_bit(golden_folder, tmp_path):
    import_table(golden_folder / "deepseek_v41_rows_shard.safetensors", 1, tmp_path / "ours.dat")
    expected = load_file(golden_folder / "deepseek_v41_rows_expected.safetensors")
    found = opened(tmp_path / "ours.dat", "float8_e4m3fn")(expected["in.row_ids"])
    assert bits(found) == bits(expected["out.rows"])
    assert "layout" not in manifest(tmp_path / "ours.dat")["provenance"]  # a bare shard doesn't say it


def test_the_released_fusion_by_its_names(golden_folder):
    """With numbers of float32: the published layer's outputs, from weights that went through both tables of names."""
    golden = load_file(golden_folder / "deepseek_v41_fusion.safetensors")
    theirs = {f"engram.{name}": golden[f"param.{name}"] for name in ("wkv.weight", "q_weight", "k_weight")}
    weights = ours_from_theirs("deepseek_v41", theirs.get)
    config = variant_config(
        "deepseek_v41", table_size=5, engram_dim=96, num_heads=2, layer_indices=[1], num_streams=4
    )

    class Map:
        compressed_vocab_size, vocab_size, pad_token_id, num_spare_ids = 1000, 1000, 0, 0

        def __call__(self, ids):
            return ids

    # Only the fusion is called; this is what a fresh layer asks of its table.
    table = torch.nn.Identity()
    table.is_new, table.manifest = False, SimpleNamespace(commit=None)
    table.recorded_pad_id = lambda pad_id: pad_id
    layer = EngramFusionLayer(config, 32, 1, tokenizer=Map(), storage=table).eval()
    layer.load_state_dict(weights)
    hidden, valid = golden["in.hidden_states"], golden["in.token_mask"] != 0
    out = layer(hidden, memory=golden["in.embeddings"], valid_BT=valid)
    torch.testing.assert_close(out, golden["out.hidden_states"], atol=1e-5, rtol=0)
    back = theirs_from_ours("deepseek_v41", weights)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in back.items()} == {
        "engram.q_weight": (torch.bfloat16, (4, 32)),
        "engram.k_weight": (torch.bfloat16, (4, 32)),
        "engram.wkv.weight": (torch.float8_e4m3fn, (160, 96)),
        "engram.wkv.scale": (torch.float8_e8m0fnu, (5, 3)),
    }


def test_qwens_fusion_by_its_names():
    """Transformers' layer, and what it computes, from weights that went there and back."""
    config = qwen_text_config()
    torch.manual_seed(3)
    layer = Qwen4ExpTextPLELayer(config, 1, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.normal_(0, 0.5).bfloat16())  # norms less 1 are exact in bfloat16, too
    theirs = {f"ple.{name}": value for name, value in layer.state_dict().items() if "ngram" not in name}
    weights = ours_from_theirs("qwen_ple", theirs.get)
    assert torch.equal(weights["gate.key_norm.weight"], 1 + layer.norm_key.weight.view(config.hc_count, -1))
    assert torch.equal(weights["W_v.weight"], layer.value_proj.weight)
    back = theirs_from_ours("qwen_ple", weights)
    assert set(back) == {name for name in theirs if "ple_embedding" not in name}
    for name, tensor in back.items():
        torch.testing.assert_close(tensor.float(), theirs[name], atol=0.004, rtol=0)
        assert tensor.shape == theirs[name].shape


def test_widened_they_are_the_values_that_are_looked_up_and_train(deepseek, tmp_path):
    folder, rows = deepseek
    codes, scales = rows[14]
    expected = slow_deepseek_rows(codes, scales).float()
    done = import_table(folder, 14, tmp_path / "wide.dat", dtype="float32")
    found = np.fromfile(tmp_path / "wide.dat", dtype="<f4").reshape(len(codes), 256)
    exact = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    exact = exact * torch.from_numpy(2.0 ** (scales.astype(np.float64) - 127)).float().repeat_interleave(32, -1)
    assert np.array_equal(found, exact.numpy())
    assert done.table.max_error == 0
    assert torch.equal(torch.from_numpy(found).bfloat16().float(), expected)
    described = manifest(tmp_path / "wide.dat")
    table = MMapEmbeddingStorage(described["rows"], 256, tmp_path / "wide.dat")
    table.write(torch.tensor([0]), torch.ones(1, 256))
    table.commit(step=1)
    table.close()
    with pytest.raises(ValueError, match=r"row 3 holds NaN"):
        import_table(folder, 1, tmp_path / "nan.dat", dtype="bfloat16")


def test_rows_of_another_tokenizers_map_are_not_imported(deepseek, deepseek_map, tmp_path):
    """Of the released size, with two ids exchanged: another revision."""
    folder, _ = deepseek
    swapped = np.array(deepseek_map)
    low, high = (swapped == 10), (swapped == 11)
    swapped[low], swapped[high] = 11, 10
    np.save(tmp_path / "swapped.npy", swapped)
    with pytest.warns(UserWarning, match="json"):
        other = EngramTokenizer(tmp_path / "swapped.npy")
    with pytest.raises(ValueError, match="is that of another tokenizer, or of another revision"):
        import_table(folder, 14, tmp_path / "ours.dat", tokenizer=other)
    assert names(tmp_path) == ["released", "swapped.npy"]


def test_fusion_weights_that_were_trained_since_stay(deepseek, tmp_path):
    folder, _ = deepseek
    done = import_table(folder, 1, tmp_path / "ours.dat")
    trained = {name: 2 * value for name, value in load_file(done.fusion_path).items()}
    save_file(trained, done.fusion_path)
    again = import_table(folder, 1, tmp_path / "ours.dat")
    assert "it stays as it is" in again.table.notes[0]
    assert torch.equal(load_file(done.fusion_path)["W_v.weight"], trained["W_v.weight"])


def test_the_fusion_weights_come_along_under_our_names(deepseek, tmp_path):
    folder, _ = deepseek
    done = import_table(folder, 1, tmp_path / "ours.dat")
    assert done.fusion_path == tmp_path / "ours.fusion.safetensors"
    found, theirs = load_file(done.fusion_path), tensors_of(folder)
    wkv, scale = (theirs[f"layers.1.engram.wkv.{name}"] for name in ("weight", "scale"))
    values = wkv.float() * torch.exp2(scale.view(torch.uint8).float() - 127).repeat_interleave(32, 0)[
        : (S + 1) * C
    ].repeat_interleave(32, 1)
    assert torch.equal(found["W_k.weight"], values[: S * C])
    assert torch.equal(found["W_v.weight"], values[S * C :])
    assert torch.equal(found["gate.query_norm.weight"], theirs["layers.1.engram.q_weight"].float())
    assert torch.equal(found["gate.key_norm.weight"], theirs["layers.1.engram.k_weight"].float())


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_qwens_table(tmp_path, num_parts, dtype):
    num_rows = HeadLayout.from_config(released_config(qwen_config())).num_rows_L[0]
    values = torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(0))
    stored = values.to({"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[dtype])
    shards = {"a.safetensors": {}}
    for number, rows in enumerate(torch.tensor_split(torch.arange(num_rows), num_parts)):
        name = f"{QWEN}.weight" if num_parts == 1 else f"{QWEN}.shard_{number}.weight"
        raw = bits(stored.view(torch.uint8).view(num_rows, -1)[rows])
        shards["a.safetensors"][name] = (dtype, (len(rows), 16), raw)
    if dtype == "F8_E4M3":
        scale = torch.tensor([0.3], dtype=torch.bfloat16)
        shards["a.safetensors"][f"{QWEN}.weight_scale"] = ("BF16", (1,), bits(scale))
    folder = write_checkpoint(tmp_path / "released", shards, qwen_config())
    if dtype == "F8_E4M3":
        with pytest.raises(ValueError, match=r"with one scale \(0\.30\d*\) .*dtype='bfloat16' keeps every value"):
            import_table(folder, 1, tmp_path / "ours.dat")
    done = import_table(folder, 1, tmp_path / "ours.dat", dtype="bfloat16")
    ids = torch.arange(num_rows)
    assert bits(opened(tmp_path / "ours.dat", "bfloat16")(ids)) == bits(open_released_table(folder, 1)(ids))
    assert done.table.max_error == 0
    provenance = manifest(tmp_path / "ours.dat")["provenance"]
    assert (provenance["compressed_vocab_size"], provenance["pad_token_id"], provenance["seed"]) == (1000, 7, 1234)


# --- from ours to released ---


def test_there_and_back_every_bit_is_the_same(deepseek, tmp_path):
    """A whole checkpoint, two layers and their fusion."""
    folder, _ = deepseek
    imported = {layer: import_table(folder, layer, tmp_path / f"{layer}.dat") for layer in (1, 14)}
    fusion = {layer: load_file(done.fusion_path) for layer, done in imported.items()}
    done = export_tables([tmp_path / "14.dat", tmp_path / "1.dat"], tmp_path / "back", "deepseek_v41", fusion=fusion)
    assert names(tmp_path / "back") == ["config.json", *done.files, "model.safetensors.index.json"]
    assert done.files == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    expected = {name: tensor for name, tensor in tensors_of(folder).items() if "embed" not in name}
    expected.pop("other.bias")
    for layer in (1, 14):
        prefix = f"layers.{layer}.engram.embed"
        parts = [tensors_of(folder)[f"{prefix}.shard_{part}.weight"].view(torch.uint8) for part in (0, 1)]
        expected[f"{prefix}.weight"] = torch.cat(parts).view(torch.float8_e4m3fn)
        expected[f"{prefix}.scale"] = tensors_of(folder)[f"{prefix}.scale"]
    same_bits(tensors_of(tmp_path / "back"), expected)
    assert {layer: of["max_error"] for layer, of in done.errors.items()} == {1: 0, 14: 0}
    assert {layer: of["max_error"] for layer, of in done.fusion_errors.items()} == {1: 0, 14: 0}
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == done.num_bytes == sum(t.nbytes for t in expected.values())
    theirs = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "back/config.json").read_text())
    keys = [key for key in theirs if key.startswith(("engram_", "hc_"))]
    assert {key: written["text_config"][key] for key in keys} == {key: theirs[key] for key in keys}
    assert written["text_config"]["rms_norm_eps"] == 1e-6  # of the fusion's norms, which engines read there
    assert written["quantization_config"]["weight_block_size"] == [32, 32]
    facts = released_tables(tmp_path / "back")
    assert [(fact.layer, fact.num_parts, "rows against the layout" in fact.checked) for fact in facts] == [
        (1, 1, True),
        (14, 1, True),
    ]
    # And back again: the same table of ours.
    import_table(tmp_path / "back", 14, tmp_path / "again.dat")
    assert (tmp_path / "again.dat").read_bytes() == (tmp_path / "14.dat").read_bytes()


def trained(path, variant, dtype="float32", layer=1, num_rows=None, **changes):
    """A table with the released row ids and rows of noise, as `open_table` makes it; and its configuration."""
    from sense_v2.engram.model import open_table

    sizes = {
        "deepseek_v41": {"table_size": 5, "engram_dim": 24 * 32},
        "qwen_ple": {"table_size": 50, "engram_dim": 4 * 16, "num_heads": 2, "layer_indices": [1], "pad_token_id": 7},
    }[variant]
    settings = {**sizes, "dtype": dtype, "init_std": 0.5, "storage_path": str(path), **changes}
    config = variant_config(variant, **settings)

    class Map:
        compressed_vocab_size, sha256, tokenizer_name = 1000, "ab" * 32, "some"

    table = open_table(config, Map(), layer=layer)
    table.commit(step=1)
    table.close()
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_table_as_deepseeks_shard(tmp_path, dtype):
    trained(tmp_path / "ours.dat", "deepseek_v41", dtype)
    done = export_tables([tmp_path / "ours.dat"], tmp_path / "out", "deepseek_v41")
    ours = opened(tmp_path / "ours.dat", dtype)
    values = ours(torch.arange(ours.num_embeddings)).float()
    found = tensors_of(tmp_path / "out")
    codes, scales = found["layers.1.engram.embed.weight"], found["layers.1.engram.embed.scale"]
    assert (codes.dtype, scales.dtype, scales.shape) == (
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
        (ours.num_embeddings, 1),
    )
    back = codes.float() * torch.exp2(scales.view(torch.uint8).float() - 127)
    error = (back - values).double()
    assert done.errors[1]["max_error"] == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert done.errors[1]["rms_error"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-6)
    assert 0 < done.errors[1]["rms_error"] < 0.04 * done.errors[1]["rms"]
    table = open_released_table(tmp_path / "out", 1)
    assert bits(table(torch.arange(ours.num_embeddings))) == bits(back.bfloat16())
    assert "layer 14" in done.notes[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_trained_table_as_qwens(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("sense_v2.engram.released.layouts.PART_BYTES", 1000)
    trained(tmp_path / "ours.dat", "qwen_ple", "bfloat16")
    ours = opened(tmp_path / "ours.dat", "bfloat16")
    done = export_tables([tmp_path / "ours.dat"], tmp_path / "out", "qwen_ple", dtype=dtype)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    parts = [name for name in tensors_of(tmp_path / "out") if "shard_" in name]
    assert settings["text_config"]["split_ngram_parts"] == len(parts) > 1
    expected = ours(torch.arange(ours.num_embeddings))
    table = open_released_table(tmp_path / "out", 1)
    found = table(torch.arange(ours.num_embeddings))
    if dtype == "bfloat16":
        assert bits(found) == bits(expected)
        assert done.errors[1]["max_error"] == 0
    else:
        (scale,) = (t for name, t in tensors_of(tmp_path / "out").items() if name.endswith("weight_scale"))
        assert scale.dtype == torch.bfloat16
        assert 448 * scale.float() >= expected.float().abs().max() > 440 * scale.float()
        error = (found.float() - expected.float()).abs().max()
        assert 0 < float(error) == pytest.approx(done.errors[1]["max_error"], rel=1e-6)
        assert done.errors[1]["rms_error"] < 0.04 * done.errors[1]["rms"]


def test_blocks_of_float8():
    """Against a loop over the blocks; sizes that 32 doesn't divide, zeros, large and tiny numbers."""
    values = torch.randn(70, 45, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 45)
    values[:32, :32] = 0
    values[33, 33] = 448 * 2.0**9  # exactly the largest code of a power of two
    codes, scales = encode_blocks(values)
    back = decode_blocks(codes, scales)
    for row in range(0, 70, 32):
        for column in range(0, 45, 32):
            block = values[row : row + 32, column : column + 32].double()
            power = 2.0 ** (int(scales.view(torch.uint8)[row // 32, column // 32]) - 127)
            largest = float(block.abs().max())
            assert largest <= 448 * power
            assert largest == 0 or largest > 448 * power / 2
            expected = (block / power).float().to(torch.float8_e4m3fn).double() * power
            assert torch.equal(back[row : row + 32, column : column + 32].double(), expected)


# --- killed, and gone on with ---


def killed_until_done(call, monkeypatch):
    """SIGKILL, again and again and ever later, until a call comes through; in forks, which have all loaded."""
    monkeypatch.setattr(transfer, "PART_VALUES", 40 * 256)
    monkeypatch.setattr(transfer, "SAVE_BYTES", 1)
    seconds = 0.01
    for num_kills in range(40):
        child = os.fork()
        if child == 0:
            try:
                call()
                os._exit(0)
            except BaseException:
                os._exit(1)
        time.sleep(seconds)
        done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            seconds *= 1.6
            continue
        assert status == 0
        return num_kills
    return pytest.fail("no call came through")


def test_killed_at_random_it_ends_with_the_same_bytes(deepseek, tmp_path, monkeypatch):
    folder, _ = deepseek
    import_table(folder, 14, tmp_path / "14.dat")
    assert killed_until_done(lambda: import_table(folder, 14, tmp_path / "new.dat"), monkeypatch) > 0
    assert (tmp_path / "new.dat").read_bytes() == (tmp_path / "14.dat").read_bytes()
    export_tables([tmp_path / "14.dat"], tmp_path / "whole", "deepseek_v41")
    export = lambda: export_tables([tmp_path / "14.dat"], tmp_path / "new", "deepseek_v41")  # noqa: E731
    assert killed_until_done(export, monkeypatch) > 0
    assert names(tmp_path / "new") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def ended_after(parts, monkeypatch, call):
    """`call()` whose process dies after that many writes: nothing is tidied up."""
    write_at, calls = disk.write_at, []

    class Killed(BaseException):
        pass

    def write(fd, data, offset):
        if "converting" in os.readlink(f"/proc/self/fd/{fd}"):
            calls.append(offset)
            if len(calls) > parts:
                raise Killed
        write_at(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "PART_VALUES", 10 * 256)
        patch.setattr(transfer, "SAVE_BYTES", 1)
        patch.setattr(disk, "write_at", write)
        with pytest.raises(Killed):
            call()


def test_a_second_call_goes_on_and_a_third_finds_it_done(deepseek, tmp_path, monkeypatch):
    folder, _ = deepseek
    for layer in (1, 14):
        import_table(folder, layer, tmp_path / f"{layer}.dat")
    tables, out = [tmp_path / "1.dat", tmp_path / "14.dat"], tmp_path / "out"
    export_tables(tables, tmp_path / "whole", "deepseek_v41")
    # Its header, then two columns a part; the first table is done, and two parts of the second.
    first = 1 + 2 * -(-LAYOUT.num_rows_L[0] // 10)
    ended_after(first + 1 + 4, monkeypatch, lambda: export_tables(tables, out, "deepseek_v41"))
    assert not (out / "config.json").exists()
    advanced = []
    done = export_tables(tables, out, "deepseek_v41", advance=advanced.append)
    assert done.resumed_rows == LAYOUT.num_rows_L[0] + 20
    assert sum(advanced) == 2 * sum(LAYOUT.num_rows_L) * 264
    again = export_tables(tables, out, "deepseek_v41")
    assert again.resumed_rows == again.num_rows == sum(LAYOUT.num_rows_L)
    assert again.errors[14]["max_error"] == 0
    assert names(out) == names(tmp_path / "whole")
    for name in names(out):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_another_source_is_not_gone_on_with_and_what_is_there_is_kept(deepseek, tmp_path, monkeypatch):
    folder, rows = deepseek
    ended_after(5, monkeypatch, lambda: import_table(folder, 14, tmp_path / "ours.dat"))
    os.utime(folder / "14-a.safetensors", (1, 1))
    done = import_table(folder, 14, tmp_path / "ours.dat")
    assert (done.table.resumed_rows, len(done.table.notes)) == (0, 1)
    assert import_table(folder, 14, tmp_path / "ours.dat").table.resumed_rows == len(rows[14][0])
    with pytest.raises(FileExistsError, match="choose another --output"):
        import_table(folder, 1, tmp_path / "ours.dat")
    export_tables([tmp_path / "ours.dat"], tmp_path / "out", "deepseek_v41")
    import_table(folder, 1, tmp_path / "other.dat")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    with pytest.raises(FileExistsError, match=r"of something else; choose another --output"):
        export_tables([tmp_path / "other.dat"], tmp_path / "out", "deepseek_v41")
    theirs = {name: (folder / name).read_bytes() for name in names(folder)}
    with pytest.raises(FileExistsError, match=r"config\.json is there already, of something else"):
        export_tables([tmp_path / "ours.dat"], folder, "deepseek_v41")
    (folder / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"of another checkpoint; choose another --output"):
        export_tables([tmp_path / "ours.dat"], folder, "deepseek_v41")
    assert {name: (folder / name).read_bytes() for name in names(folder)} == {
        name: raw for name, raw in theirs.items() if name != "config.json"
    }
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


@pytest.mark.parametrize("way", ["import", "export"])
def test_what_is_read_back_must_be_what_was_written(deepseek, tmp_path, monkeypatch, way):
    folder, _ = deepseek
    import_table(folder, 14, tmp_path / "14.dat")
    write_at = disk.write_at

    def write(fd, data, offset):
        if "converting" in os.readlink(f"/proc/self/fd/{fd}") and isinstance(data, np.ndarray):
            data = np.array(data)
            data[0, 0] ^= 1
        write_at(fd, data, offset)

    monkeypatch.setattr(disk, "write_at", write)
    calls = {
        "import": lambda: import_table(folder, 14, tmp_path / "new.dat"),
        "export": lambda: export_tables([tmp_path / "14.dat"], tmp_path / "out", "deepseek_v41"),
    }
    with pytest.raises(ValueError, match="what was read back isn't what was written"):
        calls[way]()
    left = names(tmp_path / "out") if way == "export" else [n for n in names(tmp_path) if n.startswith("new")]
    assert not [name for name in left if not name.endswith(".lock")]


def test_memory_is_flat_and_holes_stay_holes_at_a_size_that_is_not(tmp_path):
    """8 million rows, 2.1 GB, all holes but for a few: both ways, in a process that may take 60 MB more."""
    config = deepseek_config(330_000, [0, 0])
    num_rows = HeadLayout.from_config(released_config(config)).num_rows_L[0]
    assert num_rows > 7_900_000
    codes, scales = deepseek_rows(3)
    known = [0, 4_345_678, num_rows - 1]
    kept = [(row, codes[i].tobytes(), scales[i].tobytes()) for i, row in enumerate(known)]
    tensors = {
        f"{DEEPSEEK}.weight": ("F8_E4M3", (num_rows, 256), {row: code for row, code, _ in kept}),
        f"{DEEPSEEK}.scale": ("F8_E8M0", (num_rows, 8), {row: scale for row, _, scale in kept}),
    }
    layout = HeadLayout.from_config(released_config(config))
    folder = write_checkpoint(
        tmp_path / "large", {"a.safetensors": tensors}, {**config, "engram_num_embeddings": list(layout.num_rows_L)}
    )
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from sense_v2.engram.released.importing import import_table\n"
        "from sense_v2.engram.released.exporting import export_tables\n"
        "def now(): return [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]\n"
        "before, most, calls = now(), 0, 0\n"
        "def look(_):\n    global most, calls; calls += 1\n    if calls % 50 == 0: most = max(most, now())\n"
        "import_table(sys.argv[1], 1, sys.argv[2], advance=look)\n"
        "export_tables([sys.argv[2]], sys.argv[3], 'deepseek_v41', advance=look)\n"
        "print((most - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "ours.dat", tmp_path / "back"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60
    assert (tmp_path / "ours.dat").stat().st_blocks * 512 < 1 << 20
    back = open_released_table(tmp_path / "back", 1)
    assert bits(back(torch.tensor(known))) == bits(slow_deepseek_rows(codes, scales))
    assert not back(torch.tensor([1, 4_345_677, num_rows - 2])).any()
    shard = tmp_path / "back" / "model-00001-of-00001.safetensors"
    assert shard.stat().st_size > 2_090_000_000 > 1000 * shard.stat().st_blocks * 512


# --- refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"variant": "sense"},
            r"of variant 'sense': one table for all layers, and row ids of its own.*Train a memory",
        ),
        ({"variant": "qwen_ple"}, r"of variant 'qwen_ple': another layout"),
        ({"seed": 3}, "its hash has seed 3, and the layout has no key for one"),
        ({"layout": None}, "doesn't say which layout its rows have"),
        ({"pad_token_id": None}, "doesn't say pad_token_id"),
        ({"layer": 7}, "doesn't say which layout its rows have"),
        ({"layer": 14}, r"rows, but layer 14 of its layout has"),
    ],
)
def test_what_the_layout_cannot_express_is_refused_by_name(tmp_path, change, message):
    trained(tmp_path / "ours.dat", "deepseek_v41")
    described = manifest(tmp_path / "ours.dat")
    described["provenance"] |= change
    (tmp_path / "ours.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=message):
        export_tables([tmp_path / "ours.dat"], tmp_path / "out", "deepseek_v41")
    assert not (tmp_path / "out").exists()


def test_other_things_that_cannot_be_written(tmp_path):
    trained(tmp_path / "narrow.dat", "deepseek_v41", engram_dim=24 * 16)
    with pytest.raises(ValueError, match=r"rows of 16 values, and the layout has a scale for each 32"):
        export_tables([tmp_path / "narrow.dat"], tmp_path / "out", "deepseek_v41")
    config = trained(tmp_path / "folded.dat", "deepseek_v41", normalization="nfkc")
    with pytest.raises(ValueError, match=r"folds by 'nfkc', and engines of that layout by 'deepseek'"):
        export_tables([tmp_path / "folded.dat"], tmp_path / "out", "deepseek_v41", config=config)
    with pytest.raises(ValueError, match=r"rows of int8: the released layout deepseek_v41 has float8_e4m3fn"):
        export_tables([tmp_path / "folded.dat"], tmp_path / "out", "deepseek_v41", dtype="int8")
    with pytest.raises(ValueError, match=r"'paper' is no released layout; there are deepseek_v41, qwen_ple"):
        export_tables([tmp_path / "folded.dat"], tmp_path / "out", "paper")
    with pytest.raises(ValueError, match="two tables of one layer"):
        export_tables([tmp_path / "folded.dat"] * 2, tmp_path / "out", "deepseek_v41")
    trained(tmp_path / "gaps.dat", "deepseek_v41", ngram_orders=[2, 4], engram_dim=16 * 32)
    with pytest.raises(ValueError, match=r"n-gram orders \[2, 4\]; the released layouts have all from 2 on"):
        export_tables([tmp_path / "gaps.dat"], tmp_path / "out", "deepseek_v41")
    trained(tmp_path / "other.dat", "deepseek_v41", layer=14, table_size=50)
    with pytest.raises(ValueError, match="differ in layout; they are of two memories"):
        export_tables([tmp_path / "folded.dat", tmp_path / "other.dat"], tmp_path / "out", "deepseek_v41")
    with pytest.raises(ValueError, match=r"fusion weights of layer 1 have no 'gate\.query_norm\.weight'"):
        export_tables([tmp_path / "folded.dat"], tmp_path / "out", "deepseek_v41", fusion={1: {"W_k.weight": 0}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("short", "was cut short"),
        ("no scale", "its scale isn't there"),
        ("dtype", r"is BF16; expected F8_E4M3"),
        ("config", r"rows, but the layout of config\.json has"),
        ("outside", "lies outside of its folder"),
        ("overlap", "overlaps the tensor before it"),
        ("no fusion scale", r"its fusion weights aren't whole \('engram\.wkv\.scale'\)"),
    ],
)
def test_a_damaged_checkpoint_is_not_imported(deepseek, tmp_path, damage, message):
    folder, _ = deepseek
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    if damage == "short":
        os.truncate(folder / "14-a.safetensors", (folder / "14-a.safetensors").stat().st_size - 1)
    elif damage == "no scale":
        listed["weight_map"].pop("layers.14.engram.embed.scale")
    elif damage == "dtype":
        rows = LAYOUT.num_rows_L[1]
        write_shard(folder / "c.safetensors", {"layers.14.engram.embed.weight": ("BF16", (rows, 256), None)})
        listed["weight_map"] = {name: file for name, file in listed["weight_map"].items() if ".shard_" not in name}
        listed["weight_map"]["layers.14.engram.embed.weight"] = "c.safetensors"
    elif damage == "config":
        change_config(folder, engram_vocab_size=6)
    elif damage == "overlap":
        raw = (folder / "14-a.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        for entry in list(entries.values())[1:]:
            entry["data_offsets"] = [offset - 1 for offset in entry["data_offsets"]]
        (folder / "14-a.safetensors").write_bytes(header(entries) + raw[8 + length : -1])
    elif damage == "no fusion scale":
        listed["weight_map"].pop("layers.14.engram.wkv.scale")
    else:
        listed["weight_map"]["layers.14.engram.embed.scale"] = "../a.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=message):
        import_table(folder, 14, tmp_path / "ours.dat")
    if damage != "no fusion scale":
        assert names(tmp_path) == ["released"]
