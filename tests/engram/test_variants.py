"""The table of published architectures, held against numbers that public implementations printed (tests/golden)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sense_v2.core.config import VARIANT_NAMES, EngramConfig
from sense_v2.engram.variants import VARIANTS, variant_config

GOLDEN = Path(__file__).parents[1] / "golden"


def _golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_names_agree_with_the_configuration() -> None:
    assert tuple(VARIANTS) == VARIANT_NAMES
    assert all(variant.name == name for name, variant in VARIANTS.items())


PUBLISHED: dict[str, dict[str, Any]] = {
    "sense": {
        "head_sizes": "budget",
        "one_table": True,
        "gate": "sigmoid",
        "conv_kernel": 3,
        "conv_dilation": "one",
        "projection_bias": True,
        "defaults": {},
    },
    "paper": {
        "head_sizes": "per_head",
        "one_table": True,
        "gate": "signed_sqrt",
        "conv_kernel": 4,
        "conv_dilation": "largest_order",
        "projection_bias": True,
        "defaults": {
            "table_size": 646_400,
            "engram_dim": 1024,
            "num_heads": 8,
            "ngram_orders": [2, 3],
            "layer_indices": [1, 15],
            "normalization": "deepseek",
            "pad_token_id": 2,
            "seed": 0,
        },
    },
    "deepseek_v41": {
        "head_sizes": "per_head",
        "one_table": False,
        "gate": "signed_sqrt",
        "conv_kernel": 0,
        "conv_dilation": "one",
        "projection_bias": False,
        "defaults": {
            "table_size": 16_000_000,
            "engram_dim": 6144,
            "num_heads": 8,
            "ngram_orders": [2, 3, 4],
            "layer_indices": [1, 14],
            "normalization": "deepseek",
            "pad_token_id": 2,
            "seed": 0,
        },
    },
    "qwen_ple": {
        "head_sizes": "per_head",
        "one_table": False,
        "gate": "signed_sqrt",
        "conv_kernel": 4,
        "conv_dilation": "largest_order",
        "projection_bias": False,
        "compresses": False,
        "lookback_ends": "end_of_sequence",
        "multipliers": "splitmix64",
        "row_multiple": 128,
        "defaults": {
            "table_size": 20_000_000,
            "engram_dim": 2560,
            "num_heads": 8,
            "ngram_orders": [2, 3],
            "layer_indices": [1],
            "pad_token_id": 248_044,
            "seed": 1234,
        },
    },
    "longcat_flash": {
        "head_sizes": "by_twos",
        "one_table": False,
        "gate": "open",
        "conv_kernel": 0,
        "conv_dilation": "one",
        "projection_bias": False,
        "compresses": False,
        "vocab_size": 131_072,
        "lookback_ends": "end_of_sequence",
        "multipliers": "powers",
        "averages": True,
        "defaults": {
            "table_size": 10_223_616,
            "engram_dim": 3072,
            "num_heads": 4,
            "ngram_orders": [2, 3, 4],
            "layer_indices": [0],
            "pad_token_id": 2,
            "seed": 0,
        },
    },
}


def test_every_variant_is_held_here() -> None:
    assert set(PUBLISHED) == set(VARIANTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    """What the fusion does with the numbers of the norms is held by the reference outputs in test_model.py."""
    for field_name, value in PUBLISHED[name].items():
        assert getattr(VARIANTS[name], field_name) == value, field_name


def test_sense_is_the_default_configuration() -> None:
    assert variant_config("sense") == EngramConfig()


def test_paper_against_the_demo_s_own_numbers() -> None:
    published, config = _golden("paper_demo_hash.json")["config"], variant_config("paper")
    assert published["engram_vocab_size"] == [config.table_size] * len(config.ngram_orders)
    assert published["n_head_per_ngram"] == config.num_heads
    assert published["n_embed_per_ngram"] == config.row_dim * config.num_heads
    assert list(range(2, published["max_ngram_size"] + 1)) == config.ngram_orders
    assert published["layer_ids"] == config.layer_indices
    assert (published["pad_id"], published["seed"]) == (config.pad_token_id, config.seed)


def test_deepseek_v41_against_the_released_numbers() -> None:
    published, config = _golden("deepseek_v41_hash.json")["config"], variant_config("deepseek_v41")
    assert published["engram_vocab_size"] == config.table_size
    assert published["n_heads"] == config.num_heads
    assert published["head_dim"] == config.row_dim
    assert list(range(2, published["max_ngram_size"] + 1)) == config.ngram_orders
    assert published["layer_ids"] == config.layer_indices
    assert published["pad_token_id"] == config.pad_token_id
    # 24 heads just above 16,000,000 rows each; the counts are the released tables'.
    assert all(0 < rows - config.total_heads * config.table_size < 20_000 for rows in published["num_embeddings"])


def test_qwen_ple_against_transformers_own_numbers() -> None:
    published, config = _golden("qwen_ple_hash.json")["config"], variant_config("qwen_ple")
    assert published["ngram_vocab_size_base"] == config.table_size
    assert published["vocab_size"] == VARIANTS["qwen_ple"].vocab_size
    assert published["heads_per_ngram"] == config.num_heads
    assert list(range(2, published["ngram_size"] + 1)) == config.ngram_orders
    assert published["make_ngram_vocab_size_divisible_by"] == VARIANTS["qwen_ple"].row_multiple
    assert (published["eos_token_id"], published["seed"]) == (config.pad_token_id, config.seed)


@pytest.mark.parametrize("name", VARIANTS)
def test_fields_take_the_values_they_document(name: str) -> None:
    variant = VARIANTS[name]
    assert variant.head_sizes in ("budget", "per_head", "by_twos")
    assert variant.gate in ("sigmoid", "signed_sqrt", "open")
    assert variant.conv_dilation in ("one", "largest_order")
    assert variant.conv_kernel >= 0
    assert variant.lookback_ends in ("padding", "end_of_sequence")
    assert variant.multipliers in ("numpy", "splitmix64", "powers")
    assert variant.row_multiple >= 1


@pytest.mark.parametrize("name", VARIANTS)
def test_defaults_are_fields_of_the_configuration(name: str) -> None:
    assert set(VARIANTS[name].defaults) <= {f.name for f in dataclasses.fields(EngramConfig)} - {"variant"}
    assert variant_config(name).variant == name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_s_configuration_survives_a_file(name: str, tmp_path: Path) -> None:
    config = variant_config(name)
    config.save(tmp_path / "config.yaml")
    assert EngramConfig.load(tmp_path / "config.yaml") == config


def test_overrides_win() -> None:
    config = variant_config("paper", storage_path="p.dat", table_size=1009, layer_indices=[0], num_streams=4)
    assert (config.storage_path, config.table_size, config.layer_indices) == ("p.dat", 1009, [0])
    assert (config.num_heads, config.num_streams) == (8, 4)


def test_configurations_share_no_lists() -> None:
    config = variant_config("paper")
    config.layer_indices.append(20)
    config.ngram_orders.append(4)
    assert variant_config("paper").layer_indices == [1, 15]
    assert VARIANTS["paper"].defaults["ngram_orders"] == [2, 3]


def test_unknown_variant_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"^no variant 'deepseek'; there are sense, paper, deepseek_v41, qwen_ple, longcat_flash$"
    ):
        variant_config("deepseek")


def test_overrides_are_validated() -> None:
    with pytest.raises(ValueError, match=r"^EngramConfig\.table_size = 0: must be at least 1$"):
        variant_config("paper", table_size=0)
    with pytest.raises(ValueError, match=r"^EngramConfig has no field 'table_sise'; did you mean 'table_size'\?$"):
        variant_config("paper", table_sise=1)


def test_a_variant_can_t_be_named_twice() -> None:
    """It would have one variant's sizes and the other's gate."""
    with pytest.raises(ValueError, match=r"^variant_config\('paper', variant='sense'\); name one variant$"):
        variant_config("paper", variant="sense")


def test_a_variant_can_t_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["paper"].gate = "sigmoid"  # type: ignore[misc]
