"""With memory and without, side by side: against the same model with its memory taken off for good."""

import pytest
import torch
from test_save import with_memory
from tiny import tiny_model, tiny_tokenizer

from sense_v2.hf.attach import detach_engram
from sense_v2.hf.insight.comparison import compare, continue_text
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import memory_of

PROMPT = "word1 WORD2 word3 word4"


def endless(folder, **changes):
    model = with_memory(folder, **changes)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("variant", ["sense", "paper"])
def test_memory_off_is_the_backbone_bit_for_bit(tmp_path, variant):
    model = endless(tmp_path, variant=variant)
    token_ids_BT = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        on_BTV = model(token_ids_BT).logits
        with memory_off(memory_of(model)):
            off_BTV = model(token_ids_BT).logits
            continued = model.generate(token_ids_BT, max_new_tokens=8, do_sample=False)
        assert torch.equal(model(token_ids_BT).logits, on_BTV)
        detach_engram(model)
        assert torch.equal(off_BTV, model(token_ids_BT).logits)
        assert torch.equal(continued, model.generate(token_ids_BT, max_new_tokens=8, do_sample=False))
    assert not torch.equal(on_BTV, off_BTV)


def test_without_memory_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="no memory attached"):
        compare(tiny_model("llama"), tiny_tokenizer(), PROMPT)


def test_both_sides_and_what_each_says_of_the_others_text(tmp_path):
    tokenizer = tiny_tokenizer()
    models = {name: endless(tmp_path / name) for name in ("with_memory", "without_memory")}
    found = compare(models["with_memory"], tokenizer, PROMPT, max_new_tokens=6)
    assert (found["prompt_tokens"], found["dropped_tokens"]) == (4, 0)
    detach_engram(models["without_memory"])
    prompt_1T = torch.tensor([tokenizer.encode(PROMPT).ids])
    for name, other_name in (("with_memory", "without_memory"), ("without_memory", "with_memory")):
        model, other, side = models[name], models[other_name], found[name]
        with evaluating(model), evaluating(other):
            ids_1T = model.generate(prompt_1T, max_new_tokens=6, do_sample=False)
            assert side["tokens"] == [tokenizer.id_to_token(i) for i in ids_1T[0, 4:].tolist()]
            for place in range(6):
                own_V, other_V = (m(ids_1T[:, : 4 + place]).logits[0, -1].softmax(-1) for m in (model, other))
                token_id = int(ids_1T[0, 4 + place])
                assert side["probabilities"][place] == pytest.approx(float(own_V[token_id]), rel=1e-4)
                assert side["other_probabilities"][place] == pytest.approx(float(other_V[token_id]), rel=1e-4)
                likeliest = [tokenizer.id_to_token(i) for i in own_V.argsort(descending=True)[:5].tolist()]
                assert [text for text, _ in side["candidates"][place]] == likeliest
                assert side["candidates"][place][0][1] == pytest.approx(float(own_V.max()), rel=1e-4)
    assert found["with_memory"]["tokens"] != found["without_memory"]["tokens"]


def test_draws_follow_the_seed_and_leave_the_global_one_alone(tmp_path):
    model, tokenizer = endless(tmp_path), tiny_tokenizer()
    state = torch.get_rng_state()
    drawn = [compare(model, tokenizer, PROMPT, max_new_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1]
    assert drawn[0]["with_memory"]["tokens"] != drawn[2]["with_memory"]["tokens"]


def test_of_a_long_prompt_the_end_is_used(tmp_path):
    model, tokenizer = endless(tmp_path), tiny_tokenizer()
    words = [f"word{number % 30}" for number in range(300)]
    long = compare(model, tokenizer, " ".join(words), max_new_tokens=6, max_tokens=40)
    assert (long["prompt_tokens"], long["dropped_tokens"]) == (34, 266)
    assert long["with_memory"] == compare(model, tokenizer, " ".join(words[-34:]), max_new_tokens=6)["with_memory"]


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_an_empty_prompt_is_refused(tmp_path, prompt):
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        compare(endless(tmp_path), tiny_tokenizer(), prompt)


def test_a_continuation_as_text(tmp_path):
    model, tokenizer = endless(tmp_path), tiny_tokenizer()
    text = continue_text(model, tokenizer, PROMPT, max_new_tokens=6)
    assert text.split() == compare(model, tokenizer, PROMPT, max_new_tokens=6)["with_memory"]["tokens"]
