"""How far a model has moved from the untouched one: zero where nothing moved, and the sums of NumPy elsewhere."""

import contextlib

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake

from sense_v2.hf.attach import attach_engram
from sense_v2.hf.insight.damage import damage, own_samples
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import memory_of


@pytest.fixture
def model(tmp_path):
    return attach_engram(tiny_model("llama"), tiny_config(tmp_path), tiny_tokenizer())


def test_samples_are_the_untouched_model_s_own_and_repeat(model):
    first_B = torch.tensor([3, 5, 7])
    state = torch.get_rng_state()
    with memory_off(memory_of(model)):
        before_BT = own_samples(model, first_B, num_tokens=9, seed=4)
    wake(memory_of(model))
    with memory_off(memory_of(model)):
        again_BT = own_samples(model, first_B, num_tokens=9, seed=4)
    assert before_BT.shape == (3, 9)
    assert torch.equal(before_BT[:, 0], first_B)
    assert torch.equal(before_BT, again_BT)
    assert not torch.equal(before_BT, own_samples(model, first_B, num_tokens=9, seed=5))
    assert torch.equal(torch.get_rng_state(), state)


def test_damage_is_the_mean_divergence_and_the_share_of_other_tokens(model):
    token_ids_BT = torch.randint(3, 90, (5, 8), generator=torch.Generator().manual_seed(0))
    untouched = lambda: memory_off(memory_of(model))  # noqa: E731
    assert damage(model, untouched, token_ids_BT).divergence == 0
    wake(memory_of(model), scale=2.0)
    found = damage(model, untouched, token_ids_BT, batch_size=2)

    def probabilities(where):
        with where, torch.no_grad():
            logits = model(input_ids=token_ids_BT, use_cache=False).logits.double().numpy()
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    before, now = probabilities(untouched()), probabilities(contextlib.nullcontext())
    assert found.divergence == pytest.approx(np.sum(before * np.log(before / now), -1).mean(), rel=1e-4)
    assert found.changed == (before.argmax(-1) != now.argmax(-1)).mean() > 0
    assert found.tokens == 40
