"""Qwen4-Exp with its table on disk: the same tokens as the unmodified model, in less memory by the table."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.qwen4_exp", reason="a transformers before Qwen4-Exp")
from qwen_generate import PROMPTS, generated, write_model
from test_qwen import text_config
from tiny import tiny_model
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from sense_v2.hf.offload import EmbeddingOnDisk, load_with_tables_on_disk, offload_ngram_table

TESTS = Path(__file__).parent


def config(**changes):
    # One table, so that its size is what is saved.
    return text_config(ple_layer_ids=[2], **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_logits_and_tokens(tmp_path, dtype):
    write_model(tmp_path, config(), dtype=torch.bfloat16)
    theirs = Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    prompt = torch.tensor(PROMPTS)
    with torch.no_grad():
        expected = theirs(prompt).logits
        zeroed = Qwen4ExpForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        zeroed.model.layers[1].ple.ple_embedding.ngram_embedding.weight.zero_()
        assert not torch.equal(zeroed(prompt).logits, expected), "the table doesn't matter in this model"
    tokens = generated(theirs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not checked.*")
        ours = load_with_tables_on_disk(tmp_path, dtype=dtype).eval()
        assert offload_ngram_table(theirs, tmp_path) is theirs
    assert type(ours) is Qwen4ExpForCausalLM
    for model in (ours, theirs):
        assert isinstance(model.model.layers[1].ple.ple_embedding.ngram_embedding, EmbeddingOnDisk)
        with torch.no_grad():
            assert torch.equal(model(prompt).logits, expected)
        assert generated(model) == tokens
        assert not any("ngram_embedding" in name for name in model.state_dict())


def test_memory_is_smaller_by_the_table(tmp_path):
    """Each in a process of its own: 8 heads of half a million rows of 32 values."""
    num_bytes = write_model(tmp_path, config(ngram_vocab_size_base=500_000, ple_embed_dim=256))
    assert num_bytes > 256_000_000
    found = {}
    for way in ("memory", "disk"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        command = [sys.executable, str(TESTS / "qwen_generate.py"), str(tmp_path), way]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        found[way] = json.loads(run.stdout.splitlines()[-1])
    assert found["disk"]["token_ids"] == found["memory"]["token_ids"]
    # Pages of the mapped files count as resident, too; those are the page cache's, which gives them back.
    assert found["memory"]["anonymous_bytes"] - found["disk"]["anonymous_bytes"] > 0.95 * num_bytes, found


def test_what_doesnt_fit_is_refused_and_leaves_the_model(tmp_path):
    write_model(tmp_path, config())
    model = Qwen4ExpForCausalLM(config(ngram_vocab_size_base=90))
    before = model.model.layers[1].ple.ple_embedding.ngram_embedding
    with pytest.raises(ValueError, match="the layout of the configuration passed has"):
        offload_ngram_table(model, tmp_path)
    assert model.model.layers[1].ple.ple_embedding.ngram_embedding is before
    with pytest.raises(ValueError, match="LlamaForCausalLM has no n-gram table"):
        offload_ngram_table(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="built without its n-gram table"):
        EmbeddingOnDisk(4, 2, torch.nn.Identity(), None)(torch.tensor([0]))
