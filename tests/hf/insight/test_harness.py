"""lm-evaluation-harness through HFLM: tasks in local files, and its numbers against the model's own forward."""

import json
import math
import socket
import sys

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer, wake
from transformers import PreTrainedTokenizerFast

from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.insight.harness import harness_model, run_tasks
from sense_v2.hf.insight.interventions import memory_off
from sense_v2.hf.memory import memory_of

QUESTIONS = [
    {"text": "word1 word2", "choices": ["word3", "word4 word5"], "answer": 0},
    {"text": "word7", "choices": ["word8 word9 word10", "word11"], "answer": 1},
    {"text": "word1 word2 word12 word13 word14", "choices": ["Word15", "word16"], "answer": 1},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<pad>")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(1)
    model = attach_engram(tiny_model("llama"), tiny_config(tmp_path), tiny_tokenizer())
    wake(memory_of(model), scale=1.0)
    return model


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of choices and one of a text's perplexity, over local data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "questions.json")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
    }
    choices = {
        **local,
        "task": "word_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    texts = {
        **local,
        "task": "word_texts",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for name, task in (("choice.yaml", choices), ("texts.yaml", texts)):
        (folder / name).write_text(yaml.safe_dump(task))
    return folder


def score(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether each of its tokens is the likeliest: one text, no padding."""
    context_ids = tokenizer.encode(context) or [tokenizer.eos_token_id]
    token_ids = context_ids + tokenizer.encode(continuation)
    with torch.no_grad():
        logits_TV = model(torch.tensor([token_ids]), use_cache=False).logits[0].double()
    log_probabilities_TV = logits_TV.log_softmax(-1)
    total, likeliest = 0.0, True
    for place in range(len(context_ids), len(token_ids)):
        total += float(log_probabilities_TV[place - 1, token_ids[place]])
        likeliest &= int(log_probabilities_TV[place - 1].argmax()) == token_ids[place]
    return total, likeliest


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_the_models_own_forward(model, tokenizer, batch_size):
    pairs = [(one["text"], f" {choice}") for one in QUESTIONS for choice in one["choices"]]
    pairs += [("", "word4 word5"), ("word1 " * 20, " word2")]
    lm = harness_model(model, tokenizer, batch_size=batch_size)
    found = lm.loglikelihood(requests("loglikelihood", pairs))
    for pair, (value, is_likeliest) in zip(pairs, found, strict=True):
        expected = score(model, tokenizer, *pair)
        assert value == pytest.approx(expected[0], abs=1e-4), pair
        assert is_likeliest == expected[1]
    with memory_off(memory_of(model)):
        assert lm.loglikelihood(requests("loglikelihood", pairs[:1]))[0][0] != pytest.approx(found[0][0], abs=1e-2)


def test_a_left_padded_batch_generates_what_each_text_does_alone(model, tokenizer):
    contexts = ["word1 word2 word3 word4 word5 word6", "word7", "word8 word9 word10"]
    settings = {"until": ["never"], "max_gen_toks": 6, "do_sample": False}
    arguments = [(context, settings) for context in contexts]
    together = harness_model(model, tokenizer, batch_size=3).generate_until(requests("generate_until", arguments))
    for context, text in zip(contexts, together, strict=True):
        token_ids = tokenizer.encode(context)
        for _ in range(6):  # the model's own forward, without a cache
            with torch.no_grad():
                logits_V = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            token_ids.append(int(logits_V.argmax()))
            if token_ids[-1] == model.generation_config.eos_token_id:
                break
        assert text.split() == tokenizer.decode(token_ids).split()[len(context.split()) :]


def test_tasks_in_files_with_memory_and_without(model, tokenizer, tasks):
    found = run_tasks(model, tokenizer, [tasks / "choice.yaml", "word_texts"], include_path=tasks)
    by_task = {one["task"]: one for one in found}
    assert set(by_task) == {"word_choice", "word_texts"}

    def right(one) -> bool:
        scores = [score(model, tokenizer, one["text"], f" {choice}")[0] for choice in one["choices"]]
        return scores.index(max(scores)) == one["answer"]

    def perplexity() -> float:
        total = sum(score(model, tokenizer, "", one["text"])[0] for one in QUESTIONS)
        return math.exp(-total / sum(len(one["text"].split()) for one in QUESTIONS))

    choice = by_task["word_choice"]
    assert choice["value"] == pytest.approx(sum(map(right, QUESTIONS)) / len(QUESTIONS))
    assert (choice["metric"], choice["samples"], choice["higher_is_better"]) == ("acc", 3, True)
    assert choice["stderr"] > 0 or choice["value"] in (0, 1)
    assert by_task["word_texts"]["value"] == pytest.approx(perplexity(), rel=1e-4)
    detach_engram(model)
    without = run_tasks(model, tokenizer, [tasks / "texts.yaml"])
    assert without[0]["value"] == pytest.approx(perplexity(), rel=1e-4)
    assert without[0]["value"] != pytest.approx(by_task["word_texts"]["value"], rel=1e-2)


def test_the_tokenizer_stays_and_one_without_an_end_is_refused(model):
    unended = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"no token that ends a text.*Set tokenizer\.eos_token"):
        harness_model(model, unended)
    ended = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="word1")
    lm = harness_model(model, ended)
    assert ended.pad_token_id is None
    assert lm.tokenizer.pad_token_id == ended.eos_token_id < VOCABULARY
    assert len(lm.tokenizer) == VOCABULARY


def test_without_the_harness_the_error_names_the_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ImportError, match=r'pip install "sense-v2\[eval\]"'):
        run_tasks(model, tokenizer, ["anything"])
