"""What a memory does at each token: against the files, and against calls of the model that are made one by one."""

import numpy as np
import pytest
import torch
from test_save import with_memory
from tiny import tiny_model, tiny_tokenizer

from sense_v2.hf.attach import detach_engram
from sense_v2.hf.insight.evaluation import evaluating, gate_strengths
from sense_v2.hf.insight.inspection import inspect_text
from sense_v2.hf.memory import memory_of

TEXT = "word1 WORD2 word3 Word1 WORD2"


def test_everything_about_a_text(tmp_path):
    model, tokenizer = with_memory(tmp_path, layer_indices=[0, 2]), tiny_tokenizer()
    found = inspect_text(model, tokenizer, TEXT)
    token_ids = tokenizer.encode(TEXT).ids
    assert (found["tokens"], found["token_ids"], found["dropped_tokens"]) == (TEXT.split(), token_ids, 0)
    assert found["compressed_ids"] == np.load(tmp_path / "shadow_map.npy")[token_ids].tolist()
    assert found["compressed_ids"][0] == found["compressed_ids"][3]
    assert {order: texts[2].split() for order, texts in found["ngrams"].items()} == {
        2: ["WORD2", "word3"],
        3: ["word1", "WORD2", "word3"],
    }
    assert [texts[0] for texts in found["ngrams"].values()] == ["word1", "word1"]

    rows_ND = np.memmap(tmp_path / "engram_table.dat", "<f4").reshape(-1, 8)
    gates = gate_strengths(model, torch.tensor(token_ids))
    for number, layer in enumerate(memory_of(model)):
        shown = found["layers"][number]
        assert shown["layer"] == layer.layer_id
        assert shown["gates"] == pytest.approx(gates[layer.layer_id])
        assert [len(shares) for shares in shown["shares"].values()] == [5, 5]
        assert shown["row_ids"] == layer.row_ids(torch.tensor([token_ids]))[0].tolist()
        np.testing.assert_allclose(shown["row_norms"], np.linalg.norm(rows_ND[shown["row_ids"]], axis=-1), rtol=1e-5)
        # "word1 WORD2" is "Word1 WORD2" to the memory, whatever comes before.
        assert shown["row_ids"][1][:2] == shown["row_ids"][4][:2]
        assert shown["row_ids"][1][2:] != shown["row_ids"][4][2:]

    for name in ("with_memory", "without_memory"):
        if name == "without_memory":
            detach_engram(model)
        with evaluating(model):
            for place, probability in enumerate(found["probabilities"][name]):
                if place == 0:
                    assert probability is None
                    continue
                logits_V = model(torch.tensor([token_ids[:place]])).logits[0, -1]
                assert probability == pytest.approx(float(logits_V.softmax(-1)[token_ids[place]]), rel=1e-4)


def test_of_a_long_text_the_end_is_shown(tmp_path):
    model = with_memory(tmp_path)
    found = inspect_text(model, tiny_tokenizer(), " ".join(["word1"] * 200 + ["word2"] * 10), max_tokens=12)
    assert (found["dropped_tokens"], len(found["tokens"]), found["tokens"][-1]) == (198, 12, "word2")
    assert len(found["layers"][0]["gates"]) == 12


def test_a_text_of_one_token_and_of_none(tmp_path):
    model = with_memory(tmp_path)
    one = inspect_text(model, tiny_tokenizer(), "word1")
    assert (one["tokens"], one["probabilities"]["with_memory"]) == (["word1"], [None])
    two = inspect_text(model, tiny_tokenizer(), "word1 word2")
    assert one["layers"][0]["gates"] == pytest.approx(two["layers"][0]["gates"][:1])
    assert one["layers"][0]["row_ids"] == two["layers"][0]["row_ids"][:1]
    none = inspect_text(model, tiny_tokenizer(), "")
    assert (none["tokens"], none["layers"], none["ngrams"]) == ([], [], {2: [], 3: []})


def test_without_memory_there_is_nothing_to_see():
    with pytest.raises(ValueError, match="no memory attached"):
        inspect_text(tiny_model("llama"), tiny_tokenizer(), TEXT)
