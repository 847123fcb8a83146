"""torch.compile of the forward and of the decode step: the numbers and the graphs of the model without memory.

The backend is aot_eager, which traces as the default one does and generates no code, or, where graphs are counted,
eager, which only traces; one test uses the default.
"""

import copy
import logging

import pytest
import torch
from test_generation import (
    CACHE,
    CAPACITY,
    NEW,
    assert_same,
    bare_model,
    forward,
    full_greedy,
    full_logits,
    in_parts,
    new_cache,
    padded,
    positions_of,
    remembering,
    some_ids,
)
from tiny import tiny_config, tiny_model, tiny_tokenizer, wake
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from sense_v2.engram import operators
from sense_v2.engram.optim import RowAdam
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.insight.interventions import memory_off


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # What the compiler traces goes to this logger, and pytest would keep all of it: half of a test's time.
    logging.getLogger("torch.__trace").disabled = True
    yield
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    """A compiled model that allows no graph break, and how many graphs it has."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def decode(model, step, cache, ids):
    """Logits: the first five tokens at once and uncompiled, as generate does, then one by one."""
    parts = [forward(model, cache, ids[:, :5])]
    with torch.no_grad():
        for place in range(5, ids.shape[1]):
            parts.append(step(ids[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "lfm2", "falcon_h1"))]
)
def test_the_forward_is_one_graph(name):
    model, ids = remembering(name), some_ids()
    whole, graphs = compiled(model)
    with torch.no_grad():
        assert_same(whole(ids, use_cache=False).logits, full_logits(model, ids))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_the_forward_with_padding_and_documents_is_one_graph():
    model, (ids, mask) = remembering("llama"), padded()
    whole, graphs = compiled(model)
    given = {"attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}
    with torch.no_grad():
        assert_same(whole(ids, **given).logits, model(ids, **given).logits)
    assert graphs.frame_count == 1
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]).expand(3, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        assert_same(whole(ids, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "static"),
        pytest.param("llama", "dynamic", marks=pytest.mark.slow),
        pytest.param("mistral", "static", marks=pytest.mark.slow),
        pytest.param("mistral", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_the_decode_step_has_as_many_graphs_as_without_memory(name, kind):
    ids, found = some_ids(), {}
    for memory, model in ((False, bare_model(name)), (True, remembering(name))):
        torch._dynamo.reset()
        static = kind == "static"
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY) if static else new_cache(model)
        step, graphs = compiled(model, "eager")
        assert_same(decode(model, step, cache, ids), full_logits(model, ids))
        found[memory] = graphs.frame_count
    assert found[True] == found[False]


@pytest.mark.slow
def test_generate_compiles_the_decode_step_when_asked():
    model = remembering("llama")
    graphs = []

    def counting(graph, _):  # a function, for generate copies its settings
        graphs.append(graph)
        return graph

    settings = CompileConfig(backend=counting, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    ids, mask = padded()
    given = {"max_new_tokens": NEW, "do_sample": False, "cache_implementation": "static", "compile_config": settings}
    out = model.generate(ids, attention_mask=mask, **given)
    assert torch.equal(out, full_greedy(model, ids, mask)[0])
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_default_backend_generates_code_for_the_decode_step():
    model, ids = remembering("llama"), some_ids()
    step, graphs = compiled(model, "inductor")
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    assert_same(decode(model, step, cache, ids), full_logits(model, ids))
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_a_cache_goes_on_uncompiled_where_a_compiled_step_left_it():
    model, ids = remembering("llama"), some_ids()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    step, _ = compiled(model)
    decode(model, step, cache, ids[:, :9])
    assert_same(in_parts(model, cache, ids[:, 9:], (1, 2)), full_logits(model, ids)[:, 9:])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_stops_at_a_cache_that_went_on_without_memory(backend):
    model, bare, ids = remembering("llama"), bare_model("llama"), some_ids()
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    step, graphs = compiled(model, backend)
    decode(model, step, cache, ids[:, :8])
    forward(bare, cache, ids[:, 8:9])
    with pytest.raises(RuntimeError, match="the cache holds other tokens than the memory has seen"), torch.no_grad():
        step(ids[:, 9:10], use_cache=True, **{CACHE: cache})
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_training_compiles_around_the_lookup_and_the_rows_learn(tmp_path):
    """The lookup of rows that are trained breaks the graph; loss and gradients are those without a compiler."""
    model, ids = copy.deepcopy(bare_model("llama")).train(), some_ids()
    attach_engram(model, tiny_config(tmp_path), tiny_tokenizer())
    wake(model.engram)

    def gradients(called):
        loss = called(ids, labels=ids, use_cache=False).loss
        loss.backward()
        weights = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        rows = model.engram.storage.gradients()
        model.zero_grad()
        model.engram.storage.clear_gradients()
        return loss.detach(), weights, rows

    loss, weights, (row_ids, rows) = gradients(model)
    found_loss, found_weights, (found_ids, found_rows) = gradients(torch.compile(model, backend="aot_eager"))
    assert_same(found_loss, loss)
    assert found_weights.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(found_weights[name], weights[name], atol=1e-4, rtol=1e-4)
    assert torch.equal(found_ids, row_ids)
    torch.testing.assert_close(found_rows, rows, atol=1e-5, rtol=1e-4)
    assert rows.abs().max() > 0
    RowAdam(model.engram.storage, lr=0.1).step()
    detach_engram(model)


def test_an_unknown_token_is_named_in_a_graph_as_well():
    whole, _ = compiled(remembering("llama"))
    with pytest.raises(IndexError, match=r"token id 96|index out of range"), torch.no_grad():
        whole(torch.tensor([[5, 96]]), use_cache=False)


@pytest.mark.parametrize("how", ["torch.compile", "method"])
def test_a_model_that_was_compiled_before_takes_memory_on_and_off(tmp_path, how):
    model, ids = tiny_model("llama", layers=1), some_ids()
    called = torch.compile(model, backend="eager") if how == "torch.compile" else model
    if how == "method":
        model.compile(backend="eager")
    with torch.no_grad():
        bare = called(ids, use_cache=False).logits
        attach_engram(model, tiny_config(tmp_path, layer_indices=[0]), tiny_tokenizer())
        wake(model.engram)
        with torch.compiler.set_stance("force_eager"):
            expected = called(ids, use_cache=False).logits
        assert_same(called(ids, use_cache=False).logits, expected)
        assert not torch.allclose(expected, bare, atol=1e-2)
        with memory_off(model.engram):
            assert_same(called(ids, use_cache=False).logits, bare)
        detach_engram(model)
        assert_same(called(ids, use_cache=False).logits, bare)


def test_an_exported_program_reads_its_own_table_or_none(tmp_path):
    """In another process it would find what is open there; here its own model is gone before it runs."""
    ids = some_ids()

    def opened(folder, mode):
        model = tiny_model("llama", layers=1)
        attach_engram(model, tiny_config(tmp_path / folder, layer_indices=[0]), tiny_tokenizer(), mode=mode)
        model.config.use_cache = False
        return model

    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        model = opened(folder, "r+")
        wake(model.engram)
        detach_engram(model)
    model = opened("one", "r")
    torch.nn.init.normal_(model.engram.layers["0"].W_v.weight)
    expected = model(ids).logits
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids}).module()
    detach_engram(model)
    other = opened("other", "r")
    with pytest.raises(RuntimeError, match="an exported program runs where no model with its table is open"):
        program(input_ids=ids)
    detach_engram(other)
    again = opened("one", "r")
    assert_same(program(input_ids=ids).logits, expected)
    detach_engram(again)


# --- the operators on their own ---


@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_hold_torchs_rules_for_operators(masked):
    """Fake and real kernels agree in shape and dtype, no output is an input, no input changes."""
    memory, (ids, mask) = remembering("llama").engram, padded()
    fusion = memory.layers["0"]
    valid = mask > 0 if masked else None
    documents = torch.ones_like(ids) if masked else None
    history = torch.tensor([[4, -1], [3, 2], [-1, 7]]) if masked else None
    sizes = (len(memory.layers), 4)
    torch.library.opcheck(operators.hash_tokens, (ids, history, valid, documents, *sizes, memory.handle))
    row_ids = fusion.row_ids(ids)
    given = (row_ids, valid, 32, torch.float32, fusion.handle)
    torch.library.opcheck(operators.read_rows, given)
    assert torch.equal(operators.read_rows(*given), fusion.lookup(row_ids, valid))


def test_a_graph_of_a_memory_that_is_gone_says_so():
    with pytest.raises(RuntimeError, match="a memory that isn't here"):
        operators.read_rows(torch.zeros(1, 1, 4, dtype=torch.int64), None, 32, torch.float32, 10**9)


def test_a_copy_of_a_layer_answers_for_itself(tmp_path):
    model = remembering("llama")
    memory, twin = model.engram, copy.deepcopy(model).engram
    assert twin.handle != memory.handle
    assert twin.layers["0"].handle != memory.layers["0"].handle
