"""Evaluation against numbers computed another way."""

import math

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sense_v2.hf.attach import attach_engram
from sense_v2.hf.insight.evaluation import (
    Evaluation,
    count_text_bytes,
    evaluate,
    evaluating,
    gate_strengths,
    rows_touched,
)
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.fresh_model import train_bpe


def with_memory(folder, **changes):
    torch.manual_seed(1)
    model = attach_engram(tiny_model("llama"), tiny_config(folder, **changes), tiny_tokenizer())
    wake(memory_of(model))
    return model


def ids(batch=5, length=9) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


# --- loss ---


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_is_the_mean_of_log_softmax_over_predicted_tokens(tmp_path, batch_size):
    model = with_memory(tmp_path)
    losses = []
    for row in ids():
        with torch.no_grad():
            logits = model(row[None]).logits[0].double().numpy()
        for position in range(len(row) - 1):
            scores = logits[position]
            losses.append(-(scores[row[position + 1]] - np.log(np.exp(scores - scores.max()).sum()) - scores.max()))
    found = evaluate(model, ids(), batch_size=batch_size)
    assert found.tokens == len(losses) == 5 * 8
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.text_bytes == 0


def test_evaluating_twice_gives_the_same_and_changes_nothing(tmp_path):
    model = with_memory(tmp_path).train()
    rows = memory_of(model).storage.path.read_bytes()
    assert evaluate(model, ids()) == evaluate(model, ids())
    assert model.training
    assert memory_of(model).storage.gradients() is None
    assert memory_of(model).storage.path.read_bytes() == rows


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3, 0), (4,)])
def test_nothing_to_predict_is_an_error(shape):
    with pytest.raises(ValueError, match=rf"shape \[{', '.join(map(str, shape))}\] have nothing to predict"):
        evaluate(tiny_model("llama"), torch.zeros(shape, dtype=torch.long))


def test_perplexity_and_bits_per_byte():
    found = Evaluation(loss=math.log(8), tokens=10, text_bytes=15)
    assert found.perplexity == pytest.approx(8)
    assert found.bits_per_byte == pytest.approx(3 * 10 / 15)
    assert Evaluation(loss=1e4, tokens=1, text_bytes=1).perplexity == math.inf
    assert math.isnan(Evaluation(loss=math.nan, tokens=1, text_bytes=1).perplexity)
    assert math.isnan(Evaluation(loss=1.0, tokens=10, text_bytes=0).bits_per_byte)


# --- bytes ---

TEXT = "Ein Café, naïve 漢字 漢字\n\tand 🙂🙂 a tail.  Two  spaces."


def byte_level() -> Tokenizer:
    return train_bpe(["Ein Café, naïve and a tail."])


def byte_fallback() -> Tokenizer:
    """As Llama's: words with ▁ for a space, and bytes for what has no token."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Eincafpsotdl.", "▁a", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    characters = ["<unk>", "▁", *sorted(set(TEXT))]
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate(characters)}, [], unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: PreTrainedTokenizerFast(tokenizer_object=t)])
@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])
def test_bytes_are_counted_where_a_block_cuts_a_character(make, wrap):
    tokenizer = make()
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    whole = len(TEXT.encode())
    counts = [count_text_bytes(torch.tensor([token_ids[:cut]]), wrap(tokenizer)) for cut in range(len(token_ids) + 1)]
    assert counts[0] == 0
    assert counts[-1] == whole
    for cut, count in enumerate(counts):
        assert count + count_text_bytes(torch.tensor([token_ids[cut:]]), wrap(tokenizer)) == whole
    if make is not metaspace:
        # Some cut does go through a character, where decoding alone would go wrong.
        assert any("\ufffd" in tokenizer.decode(token_ids[:cut]) for cut in range(len(token_ids)))


def test_special_tokens_have_no_bytes_and_other_added_ones_do():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<thïnk>", special=False)])
    token_ids = tokenizer.encode("a<thïnk><|endoftext|>b").ids
    assert count_text_bytes(torch.tensor([token_ids]), tokenizer) == 2 + len("<thïnk>".encode())
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert count_text_bytes(torch.tensor([token_ids]), wrapped) == 2 + len("<thïnk>".encode())


def test_a_tokenizer_of_words_is_asked_to_decode():
    tokenizer = tiny_tokenizer()
    token_ids = torch.tensor([[4, 5], [7, 1]])
    expected = sum(len(tokenizer.decode(row)) for row in token_ids.tolist())
    assert expected > 20
    assert count_text_bytes(token_ids, tokenizer) == expected


def test_an_id_without_a_token_has_no_bytes():
    tokenizer = byte_level()
    beyond = tokenizer.get_vocab_size() + 5
    assert count_text_bytes(torch.tensor([[beyond, 70]]), tokenizer) == 1


def test_only_predicted_tokens_count():
    """The first token of each block isn't predicted, so its bytes don't count."""
    tokenizer = byte_level()
    token_ids = tokenizer.encode("漢" * 30).ids
    width = len(token_ids) // 3
    blocks = torch.tensor(token_ids[: 3 * width]).reshape(3, width)
    model = tiny_model("llama", vocabulary=tokenizer.get_vocab_size())
    found = evaluate(model, blocks, tokenizer=tokenizer)
    assert found.tokens == blocks[:, 1:].numel()
    assert found.text_bytes == count_text_bytes(blocks, tokenizer) - count_text_bytes(blocks[:, :1], tokenizer)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * found.tokens / found.text_bytes)


# --- the mode ---


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_gives_each_module_its_mode_back(tmp_path, fails):
    model = with_memory(tmp_path).train()
    model.model.layers[0].eval()  # a part that somebody keeps from training
    before = {name: module.training for name, module in model.named_modules()}
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {True, False}
    assert torch.is_grad_enabled()


# --- gates ---


def test_gates_are_those_computed_by_hand(tmp_path):
    model = with_memory(tmp_path)
    (layer,) = memory_of(model)
    tokens = ids(1, 9)[0]
    with torch.no_grad():
        # What enters the layer is what the plain model's first layer puts out.
        hidden = tiny_model("llama")(tokens[None], output_hidden_states=True).hidden_states[1][0].double().numpy()
    table = np.fromfile(tmp_path / "engram_table.dat", dtype="<f4").reshape(1_500, 8).astype(np.float64)
    weights = {name: value.double().numpy() for name, value in layer.state_dict().items()}

    def norm(vector):
        return vector / math.sqrt((vector**2).mean() + 1e-6)

    expected = []
    for state, rows in zip(hidden, layer.row_ids(tokens[None])[0].tolist(), strict=True):
        key = weights["W_k.weight"] @ table[rows].reshape(-1) + weights["W_k.bias"]
        expected.append(1 / (1 + math.exp(-norm(state) @ norm(key) / math.sqrt(len(state)))))
    found = gate_strengths(model, tokens)
    assert list(found) == [1]
    assert found[1] == pytest.approx(expected, abs=1e-6)
    assert np.std(expected) > 0.01


def test_gates_of_several_layers_and_no_hook_left(tmp_path):
    model = with_memory(tmp_path, layer_indices=[0, 2]).train()
    found = gate_strengths(model, ids(1, 7)[0])
    assert {layer: len(gates) for layer, gates in found.items()} == {0: 7, 2: 7}
    assert found[0] != found[2]
    assert model.training
    with pytest.raises(IndexError):
        gate_strengths(model, torch.tensor([3, VOCABULARY + 4]))
    assert all(not layer.gate._forward_hooks for layer in memory_of(model))
    assert model.training


def test_a_model_without_memory_has_no_gates():
    with pytest.raises(ValueError, match="no memory attached"):
        gate_strengths(tiny_model("llama"), ids()[0])


# --- rows touched ---


def test_rows_touched_equals_a_loop_over_positions(tmp_path):
    model = with_memory(tmp_path, layer_indices=[0, 2], ngram_orders=[2, 3])
    memory = memory_of(model)
    batches = [ids(3, 10), ids(2, 4)]
    compressed = np.load(tmp_path / "shadow_map.npy")
    pad = int(compressed[0])
    expected = []
    for position, layer in enumerate(memory):
        layout, multipliers = layer.hasher.layout, [int(m) for m in layer.hasher.multipliers]
        for head in range(4):
            order = [2, 2, 3, 3][head]
            prime = layout.primes_LH[position][head]
            seen = set()
            for batch in batches:
                for row in batch.tolist():
                    for t in range(len(row)):
                        mix = 0
                        for back in range(order):
                            mix ^= (int(compressed[row[t - back]]) if t >= back else pad) * multipliers[back]
                        seen.add(mix % prime)
            expected.append(
                {"layer": layer.layer_id, "order": order, "head": head % 2, "rows": prime, "touched": len(seen)}
            )
    found = rows_touched(model, iter(batches))
    assert found == expected
    assert 10 < found[0]["touched"] < 38


def test_no_batches_touch_no_rows(tmp_path):
    assert {head["touched"] for head in rows_touched(with_memory(tmp_path), [])} == {0}
