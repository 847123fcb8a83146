"""A pytest plugin: every model that a test of transformers builds has a memory that shows in its outputs.

    pytest -p audible_memory --outcomes FILE [--bare] …

A test class of transformers names what it builds in `all_model_classes`. While one of its tests runs, an object of
such a class has memory from its `__init__` on; not so where `from_pretrained` makes it, with weights still on meta.
`--bare` leaves the models as they are; `--outcomes` writes {test: [outcome, what its error says]}.
"""

import json
import tempfile
import weakref
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_tokenizer, wake

from sense_v2.hf.attach import attach_engram


def pytest_addoption(parser):
    parser.addoption("--bare", action="store_true")
    parser.addoption("--outcomes", required=True)


@pytest.fixture(autouse=True)
def memory_in_every_model(request, monkeypatch):
    if request.config.getoption("--bare"):
        return
    for model_class in getattr(request.cls, "all_model_classes", ()):
        monkeypatch.setattr(model_class, "__init__", _attaching(model_class, model_class.__init__))


def attach_audible(model):
    """A memory that shows in the model's outputs, the same for each model; its table goes when the model does."""
    folder = tempfile.TemporaryDirectory()
    weakref.finalize(model, folder.cleanup)
    text = model.config.get_text_config()
    layer = min(1, text.num_hidden_layers - 1)
    attach_engram(model, tiny_config(Path(folder.name), layer_indices=[layer]), tiny_tokenizer(text.vocab_size))
    wake(model.engram)


def _attaching(model_class, init):
    def init_and_attach(model, *args, **kwargs):
        init(model, *args, **kwargs)
        if type(model) is model_class and not model.get_input_embeddings().weight.is_meta:
            attach_audible(model)

    return init_and_attach


_outcomes = {}


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr.reprcrash.message) if hasattr(report.longrepr, "reprcrash") else ""
        _outcomes[report.nodeid.split("::", 1)[1]] = [report.outcome, " ".join(text.split())[:160]]


def pytest_sessionfinish(session):
    Path(session.config.getoption("--outcomes")).write_text(json.dumps(_outcomes))
