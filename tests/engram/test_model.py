"""The fusion layer: against the paper's numbers, a plain-loop oracle, and what must never leak."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCABULARY, tiny_config, tiny_tokenizer

from sense_v2.core.config import EngramConfig
from sense_v2.engram.hashing import packed_documents
from sense_v2.engram.model import EngramFusionLayer, ShortConv, compressed_pad_id, open_table
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder
from sense_v2.engram.variants import variant_config

HIDDEN = 12


def make_layer(folder, *, awake=True, hidden=HIDDEN, **changes) -> EngramFusionLayer:
    config = tiny_config(folder, **changes)
    EngramTokenizerBuilder(tiny_tokenizer()).build_mapping(config.shadow_map_path)
    torch.manual_seed(1)
    layer = EngramFusionLayer(config, hidden, 1)
    if awake:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.5)
            layer.storage.weight.mul_(50)
    return layer.eval()


def inputs(batch=2, length=7, hidden=HIDDEN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return torch.randn(batch, length, hidden, generator=generator), ids


# --- what it computes ---


def oracle(layer, hidden, ids, valid, documents, causal):
    """One position, one channel at a time, from DESIGN's formulas, in float64 NumPy."""
    weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    table = np.fromfile(layer.storage.path, dtype="<f4").reshape(-1, layer.storage.embedding_dim)
    hidden = hidden.double().numpy()
    batch, length, channels = hidden.shape
    row_ids = layer.row_ids(
        ids,
        attention_mask=torch.tensor(valid),
        sequence_ids=torch.tensor(documents),
    ).numpy()
    out = hidden.copy()

    def norm(x, weight):
        return x / math.sqrt((x * x).mean() + 1e-6) * weight

    for b in range(batch):
        gated = np.zeros((length, channels))
        for t in range(length):
            if not valid[b][t]:
                continue
            memory = np.concatenate([table[row].astype(np.float64) for row in row_ids[b, t]])
            key = weights["W_k.weight"] @ memory + weights["W_k.bias"]
            value = weights["W_v.weight"] @ memory + weights["W_v.bias"]
            query = norm(hidden[b, t], weights["gate.query_norm.weight"][0])
            score = query @ norm(key, weights["gate.key_norm.weight"][0]) / math.sqrt(channels)
            gated[t] = value / (1 + math.exp(-score))
        taps = (-2, -1, 0) if causal else (-1, 0, 1)
        for t in range(length):
            if not valid[b][t]:
                continue
            out[b, t] += gated[t]
            for tap, shift in enumerate(taps):
                if 0 <= t + shift < length and documents[b][t + shift] == documents[b][t]:
                    out[b, t] += weights["conv.weight"][:, 0, tap] * gated[t + shift]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_equal_to_a_loop_over_positions(tmp_path, causal, packed):
    layer = make_layer(tmp_path, causal=causal)
    hidden, ids = inputs()
    valid = [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]
    positions = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]] if packed else [list(range(7))] * 2
    documents = [[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2, 2]] if packed else [[1] * 7] * 2
    out = layer(hidden, ids, torch.tensor(valid), torch.tensor(positions))
    expected = oracle(layer, hidden, ids, valid, documents, causal)
    np.testing.assert_allclose(out.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("streams", [1, 4])
def test_the_papers_fusion_is_reproduced(tmp_path, golden_folder, streams):
    golden = load_file(golden_folder / f"paper_fusion_hc{streams}.safetensors")
    config = variant_config(
        "paper",
        storage_path=str(tmp_path / "engram_table.dat"),
        shadow_map_path=str(tmp_path / "shadow_map.npy"),
        table_size=20,
        engram_dim=64,
        num_heads=2,
        layer_indices=[1],
        pad_token_id=0,
        num_streams=streams,
    )
    EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(config.shadow_map_path)
    layer = EngramFusionLayer(config, 32, 1).eval()
    names = {
        "W_k.weight": [f"key_projs.{i}.weight" for i in range(streams)],
        "W_k.bias": [f"key_projs.{i}.bias" for i in range(streams)],
        "W_v.weight": ["value_proj.weight"],
        "W_v.bias": ["value_proj.bias"],
        "gate.key_norm.weight": [f"norm1.{i}.weight" for i in range(streams)],
        "gate.query_norm.weight": [f"norm2.{i}.weight" for i in range(streams)],
        "conv_norm.weight": [f"short_conv.norms.{i}.weight" for i in range(streams)],
        "conv.weight": ["short_conv.conv.weight"],
    }
    state = {}
    for ours, theirs in names.items():
        parts = [golden[f"param.{name}"] for name in theirs]
        state[ours] = torch.stack(parts) if ours.endswith("norm.weight") else torch.cat(parts)
    layer.load_state_dict(state)
    gates = []
    layer.gate.register_forward_hook(lambda module, args, alpha: gates.append(alpha))
    hidden = golden["in.hidden_states"]
    delta = layer(hidden, memory=golden["in.embeddings"]) - hidden
    torch.testing.assert_close(delta, golden["out.residual_delta"], atol=1e-5, rtol=0)
    torch.testing.assert_close(gates[0][..., None], golden["out.gate"], atol=1e-5, rtol=0)


def test_the_released_fusion_is_reproduced(tmp_path, golden_folder):
    """Four streams, no convolution, a mask; wkv holds the keys of all streams, then the value."""
    golden = load_file(golden_folder / "deepseek_v41_fusion.safetensors")
    config = variant_config(
        "deepseek_v41",
        storage_path=str(tmp_path / "engram_table.dat"),
        shadow_map_path=str(tmp_path / "shadow_map.npy"),
        table_size=5,
        engram_dim=96,
        num_heads=2,
        layer_indices=[1],
        pad_token_id=0,
        num_streams=4,
    )
    EngramTokenizerBuilder(tiny_tokenizer(), normalization="deepseek").build_mapping(config.shadow_map_path)
    storage = MMapEmbeddingStorage(100, 16, tmp_path / "rows.dat")
    layer = EngramFusionLayer(config, 32, 1, storage=storage).eval()
    wkv = golden["param.wkv.weight"]
    layer.load_state_dict(
        {
            "W_k.weight": wkv[: 4 * 32],
            "W_v.weight": wkv[4 * 32 :],
            "gate.key_norm.weight": golden["param.k_weight"],
            "gate.query_norm.weight": golden["param.q_weight"],
        }
    )
    gates = []
    layer.gate.register_forward_hook(lambda module, args, alpha: gates.append(alpha))
    hidden, valid = golden["in.hidden_states"], golden["in.token_mask"] != 0
    assert not valid.all()
    out = layer(hidden, memory=golden["in.embeddings"], valid_BT=valid)
    torch.testing.assert_close(out, golden["out.hidden_states"], atol=1e-5, rtol=0)
    torch.testing.assert_close(gates[0][valid], golden["out.gate"][valid], atol=1e-5, rtol=0)
    assert torch.equal(out[~valid], hidden[~valid])
    assert layer.reach == 3


@pytest.mark.parametrize("variant", ["sense", "paper"])
def test_a_fresh_layer_is_the_identity(tmp_path, variant):
    sizes = {"table_size": 20} if variant == "paper" else {}
    layer = make_layer(tmp_path, awake=False, variant=variant, **sizes)
    hidden, ids = inputs()
    assert torch.equal(layer(hidden, ids), hidden)
    assert not torch.equal(layer.storage.weight, torch.zeros_like(layer.storage.weight))


@pytest.mark.parametrize("variant", ["sense", "paper"])
@pytest.mark.parametrize("zeros", [{"init_std": 0.0}, {"sparse": True}])
def test_rows_of_zeros_have_noise_in_front_of_them_and_learn_at_once(tmp_path, variant, zeros):
    sizes = {"table_size": 20} if variant == "paper" else {}
    layer = make_layer(tmp_path, awake=False, variant=variant, **sizes, **zeros).train()
    hidden, ids = inputs()
    assert not layer.storage.weight.any()
    assert torch.equal(layer(hidden, ids), hidden)
    layer(hidden, ids).square().sum().backward()
    _, grads_UD = layer.storage.gradients()
    assert grads_UD.any()


def test_rows_that_began_as_zeros_and_have_learned_are_met_by_a_zero_w_v(tmp_path):
    layer = make_layer(tmp_path, awake=False, init_std=0.0)
    assert layer.W_v.weight.any()
    layer.storage.write(torch.tensor([3]), torch.ones(1, layer.storage.embedding_dim))
    layer.storage.commit()
    layer.storage.close()
    again = make_layer(tmp_path, awake=False, init_std=0.0)
    assert not again.W_v.weight.any()


def test_disabled_passes_hidden_states_through_and_opens_nothing(tmp_path):
    layer = EngramFusionLayer(tiny_config(tmp_path, enabled=False), HIDDEN, 1)
    hidden, ids = inputs()
    assert layer(hidden, ids) is hidden
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_those_of_the_hidden_states(tmp_path, dtype):
    layer = make_layer(tmp_path / "half").to(dtype)
    hidden, ids = inputs()
    full = make_layer(tmp_path / "full")(hidden, ids)
    out = layer(hidden.to(dtype), ids)
    assert out.dtype == dtype
    assert out.shape == hidden.shape
    assert (out.float() - full).abs().mean() < 0.05 * full.abs().mean()


@pytest.mark.parametrize("table_dtype", ["float16", "bfloat16"])
def test_rows_of_half_width_are_read_and_trained(tmp_path, table_dtype):
    layer = make_layer(tmp_path, dtype=table_dtype).train()
    hidden, ids = inputs()
    layer(hidden, ids).square().sum().backward()
    row_ids_U, grads_UD = layer.storage.gradients()
    assert grads_UD.dtype == torch.float32
    assert grads_UD.abs().sum() > 0
    assert set(row_ids_U.tolist()) == set(layer.row_ids(ids).flatten().tolist())


# --- what must not leak ---


@pytest.mark.parametrize("variant", ["sense", "paper"])
@pytest.mark.parametrize("changed", range(7))
def test_no_position_sees_a_later_token(tmp_path, variant, changed):
    sizes = {"table_size": 20} if variant == "paper" else {}
    layer = make_layer(tmp_path, variant=variant, **sizes)
    hidden, ids = inputs()
    before = layer(hidden, ids)
    ids, hidden = ids.clone(), hidden.clone()
    ids[:, changed] = (ids[:, changed] + 31) % VOCABULARY
    hidden[:, changed] += 1
    after = layer(hidden, ids)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_a_centred_layer_sees_the_next_token(tmp_path):
    layer = make_layer(tmp_path, causal=False)
    hidden, ids = inputs()
    before = layer(hidden, ids)
    ids[:, 3] = (ids[:, 3] + 31) % VOCABULARY
    after = layer(hidden, ids)
    moved = (before != after).any(-1).any(0).tolist()
    # The token itself, its later n-grams and the tap behind them, and the tap before it.
    assert moved == [False, False, True, True, True, True, True]


def test_the_last_position_reads_all_three_taps(tmp_path):
    """Shifting within T instead of padding to T + 1 loses the last position and still passes a leak test."""
    layer = make_layer(tmp_path)
    hidden, ids = inputs(length=3)
    with torch.no_grad():
        before = layer(hidden, ids)
        for tap in range(3):
            layer.conv.weight[:, :, tap] += 1
            after = layer(hidden, ids)
            assert not torch.equal(before[:, 2], after[:, 2]), f"tap {tap} doesn't reach the last position"
            layer.conv.weight[:, :, tap] -= 1


@pytest.mark.parametrize("variant", ["sense", "paper"])
def test_packed_documents_equal_documents_on_their_own(tmp_path, variant):
    sizes = {"table_size": 20} if variant == "paper" else {}
    layer = make_layer(tmp_path, variant=variant, **sizes)
    hidden, ids = inputs(batch=1, length=12)
    lengths = [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = layer(hidden, ids, position_ids=positions)
    alone = [layer(h, i) for h, i in zip(hidden.split(lengths, 1), ids.split(lengths, 1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_is_passed_through(tmp_path, side):
    layer = make_layer(tmp_path)
    hidden, ids = inputs(batch=1, length=4)
    noise, junk = torch.randn(1, 3, HIDDEN), torch.randint(3, VOCABULARY, (1, 3))
    order = (noise, hidden) if side == "left" else (hidden, noise)
    padded_ids = torch.cat((junk, ids) if side == "left" else (ids, junk), 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0, 0]])
    out = layer(torch.cat(order, 1), padded_ids, mask)
    real = slice(3, 7) if side == "left" else slice(0, 4)
    pad = slice(0, 3) if side == "left" else slice(4, 7)
    torch.testing.assert_close(out[:, real], layer(hidden, ids), atol=1e-6, rtol=0)
    assert torch.equal(out[:, pad], noise)


def test_across_padding_in_the_middle_the_convolution_reads_and_n_grams_do_not(tmp_path):
    layer = make_layer(tmp_path)
    hidden, ids = inputs(batch=1, length=5)
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    rows = layer.row_ids(ids, attention_mask=mask > 0)
    assert torch.equal(rows[:, 3:], layer.row_ids(ids[:, 3:]))
    gated = layer(torch.zeros_like(hidden), memory=layer.lookup(rows, mask > 0), valid_BT=mask > 0)
    out = layer(hidden, ids, mask)
    assert torch.equal(out[:, 2], hidden[:, 2])
    changed = hidden.clone()
    changed[:, 1] += 1  # another gate at 1, two positions before 3 and three before 4
    differs = (layer(changed, ids, mask) - changed - (out - hidden)).abs().amax((0, 2)) > 0
    assert differs.tolist() == [False, True, False, True, False]
    assert gated.isfinite().all()


def test_masked_positions_neither_touch_nor_train_rows(tmp_path):
    layer = make_layer(tmp_path).train()
    hidden, ids = inputs(batch=1, length=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    layer(hidden, ids, mask).sum().backward()
    trained = set(layer.storage.gradients()[0].tolist())
    row_ids = layer.row_ids(ids, attention_mask=mask)
    assert trained == set(row_ids[:, 2:].flatten().tolist())
    asked = []
    layer.storage.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    layer(hidden, ids, torch.zeros(1, 6, dtype=torch.long))
    assert all(len(row_ids) == 0 for row_ids in asked)


# --- training ---


def test_rows_have_a_zero_gradient_first_and_none_after(tmp_path):
    layer = make_layer(tmp_path, awake=False).train()
    hidden, ids = inputs()
    target = torch.randn_like(hidden)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sizes = []
    for _ in range(2):
        (layer(hidden, ids) - target).square().mean().backward()
        sizes.append(layer.storage.gradients()[1].abs().max().item())
        layer.storage.clear_gradients()
        optimizer.step()
        optimizer.zero_grad()
    assert sizes[0] == 0.0
    assert sizes[1] > 0.0


def test_gradients_reach_the_rows_as_autograd_gives_them(tmp_path):
    """Against the same layer with its rows as an ordinary parameter."""
    layer = make_layer(tmp_path).train()
    hidden, ids = inputs()
    layer(hidden, ids).square().sum().backward()
    row_ids_U, grads_UD = layer.storage.gradients()
    table = torch.tensor(np.fromfile(layer.storage.path, dtype="<f4").reshape(-1, layer.storage.embedding_dim))
    table.requires_grad_()
    memory = table[layer.row_ids(ids)].flatten(-2)
    layer(hidden, memory=memory).square().sum().backward()
    torch.testing.assert_close(grads_UD, table.grad[row_ids_U])
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[row_ids_U] = False
    assert not table.grad[untouched].any()


def test_training_rows_behind_a_zero_frozen_w_v_is_refused(tmp_path):
    layer = make_layer(tmp_path, awake=False).train()
    hidden, ids = inputs()
    layer.W_v.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="W_v is zero and frozen"):
        layer(hidden, ids)
    layer.storage.requires_grad_(False)
    assert torch.equal(layer(hidden, ids), hidden)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, use_reentrant):
    layer = make_layer(tmp_path).train()
    hidden, ids = inputs()
    hidden.requires_grad_()
    layer(hidden, ids).square().sum().backward()
    expected = layer.storage.gradients()
    layer.storage.clear_gradients()
    out = torch.utils.checkpoint.checkpoint(layer, hidden, ids, use_reentrant=use_reentrant)
    out.square().sum().backward()
    found = layer.storage.gradients()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


# --- opening, and bad input ---


def test_open_table_has_exactly_table_size_rows_and_says_what_it_is(tmp_path, golden):
    layer = make_layer(tmp_path)
    assert layer.storage.path.stat().st_size == 1_500 * 8 * 4
    import json

    provenance = json.loads((tmp_path / "engram_table.json").read_text())["provenance"]
    assert provenance["variant"] == "sense"
    assert provenance["shadow_map_sha256"] == layer.tokenizer.sha256
    assert provenance["layout"]["primes"] == [list(layer.hasher.layout.primes_LH[0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"engram_dim": 64}, "width"),
        ({"table_size": 1_501}, "rows"),
        ({"num_heads": 1}, "width"),
    ],
)
def test_a_table_of_another_configuration_is_refused_by_name(tmp_path, change, message):
    tokenizer = make_layer(tmp_path).tokenizer
    with pytest.raises(ValueError, match=message):
        open_table(tiny_config(tmp_path, **change), tokenizer)


def test_a_table_of_another_map_of_equal_size_is_refused(tmp_path):
    layer = make_layer(tmp_path)
    swapped = np.load(tmp_path / "shadow_map.npy").copy()
    swapped[[5, 8]] = swapped[[8, 5]]
    np.save(tmp_path / "other.npy", swapped)
    with pytest.warns(UserWarning, match=r"other\.json"):
        other = EngramTokenizer(tmp_path / "other.npy")
    assert other.compressed_vocab_size == layer.tokenizer.compressed_vocab_size
    layer.storage.close()
    with pytest.raises(ValueError, match="shadow_map_sha256"):
        open_table(layer.config, other)


def test_a_layout_with_a_table_per_layer_is_refused(tmp_path):
    tokenizer = make_layer(tmp_path).tokenizer
    with pytest.raises(ValueError, match="one table per layer"):
        open_table(variant_config("deepseek_v41", storage_path=str(tmp_path / "x.dat")), tokenizer)
    assert not (tmp_path / "x.dat").exists()


def test_shapes_that_do_not_fit_are_named(tmp_path):
    layer = make_layer(tmp_path)
    hidden, ids = inputs()
    with pytest.raises(ValueError, match=r"hidden_states have shape \(2, 7, 12\); expected \(2, 6, 12\)"):
        layer(hidden, ids[:, :6])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 6\)"):
        layer(hidden, ids, torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"position_ids have shape \(3, 7\)"):
        layer(hidden, ids, position_ids=torch.arange(7).expand(3, 7))
    with pytest.raises(ValueError, match=r"input_ids have shape \(7,\)"):
        layer(hidden, ids[0])
    with pytest.raises(IndexError, match="token id 96"):
        layer(hidden, ids.clamp_min(VOCABULARY))


def test_an_even_convolution_has_no_centre(tmp_path):
    with pytest.raises(ValueError, match="4-tap convolution"):
        make_layer(tmp_path, variant="paper", table_size=20, causal=False)


def test_the_pad_id_comes_from_the_configuration_then_the_model_then_the_map_then_zero(tmp_path):
    tokenizer = make_layer(tmp_path).tokenizer
    compressed = lambda token_id: int(tokenizer(torch.tensor([token_id]))[0])  # noqa: E731
    config = tiny_config(tmp_path)
    assert compressed_pad_id(tiny_config(tmp_path, pad_token_id=8), tokenizer, 5) == compressed(8)
    assert compressed_pad_id(config, tokenizer, 5) == compressed(5)
    assert tokenizer.pad_token_id is None
    assert compressed_pad_id(config, tokenizer, None) == compressed(0)
    with pytest.raises(ValueError, match="pad_token_id = 96 is outside"):
        compressed_pad_id(tiny_config(tmp_path, pad_token_id=96), tokenizer, None)


def test_documents_begin_where_positions_restart():
    assert packed_documents(torch.tensor([[0, 1, 2, 3]])) is None
    found = packed_documents(torch.tensor([[0, 1, 0, 1], [3, 4, 5, 0]]))
    assert found.tolist() == [[1, 1, 2, 2], [1, 1, 1, 2]]


def test_positions_that_stand_still_begin_no_document():
    for group in (2, 3):
        assert packed_documents((torch.arange(9) // group)[None]) is None
    assert packed_documents(torch.tensor([[4, 5, 5, 5, 6]])) is None  # an image's
    of_one_token = packed_documents(torch.tensor([[0, 0, 0, 1, 2, 0, 0]]))
    assert of_one_token.tolist() == [[1, 2, 3, 3, 3, 4, 5]]


def test_layers_share_a_table_and_a_map(tmp_path):
    first = make_layer(tmp_path, layer_indices=[1, 2])
    second = EngramFusionLayer(first.config, HIDDEN, 2, tokenizer=first.tokenizer, storage=first.storage)
    ids = inputs()[1]
    assert not set(first.row_ids(ids).flatten().tolist()) & set(second.row_ids(ids).flatten().tolist())


@pytest.mark.parametrize(("kernel", "dilation", "causal"), [(3, 1, True), (3, 1, False), (4, 3, True)])
def test_the_convolution_is_conv1d_s_on_a_padded_input(kernel, dilation, causal):
    torch.manual_seed(0)
    conv = ShortConv(5, kernel, dilation, causal=causal).double()
    span = (kernel - 1) * dilation
    for length in (1, 2, span, 20):
        inputs_BXT = torch.randn(2, 5, length, dtype=torch.float64)
        padded = torch.nn.functional.pad(inputs_BXT, (span, 0) if causal else (span // 2, span // 2))
        expected = torch.nn.functional.conv1d(padded, conv.weight, dilation=dilation, groups=5)
        torch.testing.assert_close(conv(inputs_BXT), expected)
        one_document = conv(inputs_BXT, torch.ones(2, length, dtype=torch.int64))
        assert torch.equal(one_document, conv(inputs_BXT))


def test_a_position_s_convolution_has_the_same_bits_however_many_come_with_it():
    torch.manual_seed(0)
    conv = ShortConv(64, 3, 1, causal=True)
    inputs_BXT = torch.randn(1, 64, 300)
    whole = conv(inputs_BXT)
    for end in (3, 17, 300):
        assert torch.equal(conv(inputs_BXT[..., end - 3 : end])[..., -1], whole[..., end - 1])


@pytest.mark.parametrize(("kernel", "dilation", "causal"), [(3, 1, True), (3, 1, False), (4, 3, True)])
@pytest.mark.parametrize("documents", [None, [[1] * 4 + [2] * 7, [1] * 11]])
def test_the_convolution_of_the_last_positions_alone_has_the_same_bits(kernel, dilation, causal, documents):
    torch.manual_seed(0)
    conv = ShortConv(5, kernel, dilation, causal=causal)
    inputs_BXT = torch.randn(2, 5, 11)
    documents_BT = None if documents is None else torch.tensor(documents)
    whole = conv(inputs_BXT, documents_BT)
    for num_last in (1, 2, 8, 10, 11):
        assert torch.equal(conv(inputs_BXT, documents_BT, num_last=num_last), whole[..., -num_last:])


def test_the_flow_imports_no_transformers():
    code = (
        "import sys, sense_v2.engram.model, sense_v2.engram.optim\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_and_storage_types_are_the_documented_ones(tmp_path):
    layer = make_layer(tmp_path)
    assert isinstance(layer.storage, MMapEmbeddingStorage)
    assert isinstance(layer.config, EngramConfig)
    assert isinstance(layer.conv, torch.nn.Conv1d)
    assert (layer.conv.kernel_size, layer.conv.padding, layer.conv.groups) == ((3,), (1,), HIDDEN)
    assert isinstance(layer.W_k, torch.nn.Linear)
    assert (layer.W_v.in_features, layer.W_v.out_features) == (32, HIDDEN)
