"""The plugin's parts, without vLLM: steps as its model runner describes them, against a memory alone.

tests/vllm runs the engine itself, where there is one.
"""

from types import SimpleNamespace

import pytest
import torch
from test_save import with_memory
from test_serve import tokenizer
from tiny import VOCABULARY

from sense_v2.hf import save_pretrained
from sense_v2.hf.serving import vllm_plugin
from sense_v2.hf.serving.vllm_plugin import SlotCall, SlotState, open_memory

PAGE = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    save_pretrained(with_memory(folder / "table"), folder / "model", tokenizer=tokenizer())
    return folder / "model"


def described(tables, done, counts):
    """What vLLM says of a step of these sequences."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    slots = [
        t[p // PAGE] * PAGE + p % PAGE for t, d, c in zip(tables, done, counts, strict=True) for p in range(d, d + c)
    ]
    return SimpleNamespace(
        query_start_loc=starts.int(),
        seq_lens=torch.tensor([d + c for d, c in zip(done, counts, strict=True)], dtype=torch.int32),
        block_table=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        num_actual_tokens=int(starts[-1]),
    )


def test_steps_find_the_rows_of_whole_sequences(saved):
    memory = open_memory(saved, 32, 0, VOCABULARY)
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (11, 9)]
    inputs = [torch.randn(len(tokens), 6, generator=generator) for tokens in sequences]
    tables, done, state = [[5, 0, 3], [1, 4, 2]], [0, 0], SlotState(6 * PAGE, PAGE)
    for counts in ([7, 1], [1, 5], [3, 3]):
        metadata = described(tables, done, counts)
        vllm_plugin.refuse_other_slots(metadata, PAGE)
        call = SlotCall(state, metadata, num_new=sum(counts), reach=memory.reach)
        parts = [slice(d, d + c) for d, c in zip(done, counts, strict=True)]
        new = torch.cat([tokens[part] for tokens, part in zip(sequences, parts, strict=True)])
        rows = call.rows(memory, new[None])
        whole = [memory.hash_tokens(tokens[None])[1] for tokens in sequences]
        whole = [found[:, :, part] for found, part in zip(whole, parts, strict=True)]
        assert torch.equal(rows.row_ids_LBTH, torch.cat(whole, 2))
        new_TX = torch.cat([values[part] for values, part in zip(inputs, parts, strict=True)])
        found = call.remember(7, new_TX[None])[0]
        expected = []
        for values, part in zip(inputs, parts, strict=True):
            before = torch.cat([torch.zeros(memory.reach, 6), values[: part.start]])[-memory.reach :]
            expected += [before, values[part]]
        assert torch.equal(found, torch.cat(expected))
        done = [part.stop for part in parts]
    assert {name: tuple(pages.shape) for name, pages in state.pages.items()} == {None: (24, 2), 7: (24, 6)}


def test_slots_of_another_layout_are_refused():
    metadata = described([[5, 0, 3]], [0], [7])
    metadata.slot_mapping += 1
    with pytest.raises(ValueError, match="memory isn't served with it"):
        vllm_plugin.refuse_other_slots(metadata, PAGE)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_config": SimpleNamespace(enforce_eager=False)}, "--enforce-eager"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline"),
        ({"speculative_config": object()}, "speculative"),
    ],
)
def test_what_the_memory_cant_run_in_is_refused(changes, why):
    given = {
        "model_config": SimpleNamespace(enforce_eager=True),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "speculative_config": None,
    }
    vllm_plugin.refuse(SimpleNamespace(**given))
    with pytest.raises(ValueError, match=why):
        vllm_plugin.refuse(SimpleNamespace(**{**given, **changes}))
