"""`EngramConfig`, `TrainConfig` and `Config`: defaults, every refusal with its words, JSON and YAML both ways."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import parsed

from sense_v2.core import config as config_module
from sense_v2.core.config import Config, EngramConfig, TrainConfig

CLASSES = (EngramConfig, TrainConfig, Config)


# Defaults: written out, so that a changed default is a changed test.


def test_engram_defaults() -> None:
    assert dataclasses.asdict(EngramConfig()) == {
        "enabled": True,
        "storage_path": None,
        "shadow_map_path": None,
        "table_size": 10_000_000,
        "engram_dim": 1024,
        "num_heads": 8,
        "ngram_orders": [2, 3],
        "layer_indices": [2, 15],
        "variant": "sense",
        "tokenizer_name": None,
        "normalization": "nfkc",
        "pad_token_id": None,
        "seed": 0,
        "dtype": "float32",
        "init_std": 0.02,
        "sparse": False,
        "causal": True,
        "num_streams": 1,
    }


def test_train_defaults() -> None:
    assert dataclasses.asdict(TrainConfig()) == {
        "steps": 300,
        "batch_size": 8,
        "sequence_length": 256,
        "learning_rate": 3e-3,
        "fusion_learning_rate": 1e-2,
        "value_learning_rate": 1e-3,
        "row_learning_rate": 0.1,
        "row_optimizer": "adagrad",
        "weight_decay": 0.1,
        "warmup_steps": 40,
        "max_grad_norm": 1.0,
        "train_backbone": True,
        "lora_rank": 0,
        "seed": 0,
        "eval_every": 50,
        "eval_sequences": 64,
        "commit_every": 100,
        "durability": "process",
    }


def test_config_holds_both_sections() -> None:
    sections = {"engram": EngramConfig().to_dict(), "train": TrainConfig().to_dict(), "trainer": {}}
    assert Config().to_dict() == sections


def test_default_lists_and_sections_are_not_shared() -> None:
    one, other = Config(), Config()
    one.engram.ngram_orders.append(4)
    one.engram.layer_indices.append(20)
    one.train.steps = 7
    assert other == Config()
    assert EngramConfig().ngram_orders == [2, 3]
    assert EngramConfig().layer_indices == [2, 15]


def test_to_dict_is_a_copy() -> None:
    config = EngramConfig()
    config.to_dict()["ngram_orders"].append(4)
    assert config.ngram_orders == [2, 3]


def test_default_geometry() -> None:
    config = EngramConfig()
    assert (config.total_heads, config.row_dim) == (16, 64)


@pytest.mark.parametrize(
    ("engram_dim", "num_heads", "orders", "total_heads", "row_dim"),
    [(6144, 8, [2, 3, 4], 24, 256), (64, 4, [2, 3], 8, 8), (5, 1, [7], 1, 5), (2, 1, [2, 16], 2, 1)],
)
def test_geometry(engram_dim: int, num_heads: int, orders: list[int], total_heads: int, row_dim: int) -> None:
    config = EngramConfig(engram_dim=engram_dim, num_heads=num_heads, ngram_orders=orders)
    assert (config.total_heads, config.row_dim) == (total_heads, row_dim)


# Refusals: (class, keyword arguments, the whole message).

HEADS = "divisible by the 16 heads (2 orders × 8 heads)"
VARIANTS = "one of sense, paper, deepseek_v41, qwen_ple, longcat_flash"
SEEDS = "from 0 to 2**63 - 1"
ORDERS = "orders from 2 to 16"
LAYERS = "layer numbers from 0, at least one"

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    # Types: a bool is no int, a string no list, None only where it means something.
    (EngramConfig, {"enabled": 1}, "enabled = 1: must be of type bool"),
    (EngramConfig, {"enabled": "yes"}, "enabled = 'yes': must be of type bool"),
    (EngramConfig, {"enabled": None}, "enabled = None: must be of type bool"),
    (EngramConfig, {"causal": 0}, "causal = 0: must be of type bool"),
    (EngramConfig, {"storage_path": 3}, "storage_path = 3: must be of type Optional[str]"),
    (EngramConfig, {"shadow_map_path": 3}, "shadow_map_path = 3: must be of type Optional[str]"),
    (EngramConfig, {"table_size": True}, "table_size = True: must be of type int"),
    (EngramConfig, {"table_size": 1e6}, "table_size = 1000000.0: must be of type int"),
    (EngramConfig, {"table_size": "10"}, "table_size = '10': must be of type int"),
    (EngramConfig, {"num_heads": None}, "num_heads = None: must be of type int"),
    (EngramConfig, {"engram_dim": False}, "engram_dim = False: must be of type int"),
    (EngramConfig, {"num_streams": 1.0}, "num_streams = 1.0: must be of type int"),
    (EngramConfig, {"ngram_orders": "23"}, "ngram_orders = '23': must be of type List[int]"),
    (EngramConfig, {"ngram_orders": (2, 3)}, "ngram_orders = (2, 3): must be of type List[int]"),
    (EngramConfig, {"ngram_orders": 2}, "ngram_orders = 2: must be of type List[int]"),
    (EngramConfig, {"ngram_orders": [2, "3"]}, "ngram_orders = [2, '3']: must be of type List[int]"),
    (EngramConfig, {"layer_indices": None}, "layer_indices = None: must be of type List[int]"),
    (EngramConfig, {"layer_indices": [True]}, "layer_indices = [True]: must be of type List[int]"),
    (EngramConfig, {"variant": None}, "variant = None: must be of type str"),
    (EngramConfig, {"tokenizer_name": 3}, "tokenizer_name = 3: must be of type Optional[str]"),
    (EngramConfig, {"pad_token_id": "0"}, "pad_token_id = '0': must be of type Optional[int]"),
    (EngramConfig, {"pad_token_id": False}, "pad_token_id = False: must be of type Optional[int]"),
    (EngramConfig, {"seed": None}, "seed = None: must be of type int"),
    (EngramConfig, {"dtype": 32}, "dtype = 32: must be of type str"),
    (EngramConfig, {"normalization": None}, "normalization = None: must be of type str"),
    (EngramConfig, {"init_std": "0.02"}, "init_std = '0.02': must be of type float (finite)"),
    (EngramConfig, {"init_std": True}, "init_std = True: must be of type float (finite)"),
    (EngramConfig, {"init_std": float("nan")}, "init_std = nan: must be of type float (finite)"),
    (EngramConfig, {"init_std": float("inf")}, "init_std = inf: must be of type float (finite)"),
    (EngramConfig, {"init_std": 10**309}, f"init_std = {10**309}: must be of type float (finite)"),
    # Values.
    (EngramConfig, {"storage_path": ""}, "storage_path = '': must be a path"),
    (EngramConfig, {"shadow_map_path": ""}, "shadow_map_path = '': must be a path"),
    (EngramConfig, {"table_size": 0}, "table_size = 0: must be at least 1"),
    (EngramConfig, {"engram_dim": 0}, "engram_dim = 0: must be at least 1"),
    (EngramConfig, {"num_heads": 0}, "num_heads = 0: must be at least 1"),
    (EngramConfig, {"num_heads": -8}, "num_heads = -8: must be at least 1"),
    (EngramConfig, {"num_streams": 0}, "num_streams = 0: must be at least 1"),
    (EngramConfig, {"ngram_orders": []}, f"ngram_orders = []: must be {ORDERS}"),
    (EngramConfig, {"ngram_orders": [1, 2]}, f"ngram_orders = [1, 2]: must be {ORDERS}"),
    (EngramConfig, {"ngram_orders": [2, 17]}, f"ngram_orders = [2, 17]: must be {ORDERS}"),
    (EngramConfig, {"ngram_orders": [3, 2]}, "ngram_orders = [3, 2]: must be ascending, each order once"),
    (EngramConfig, {"ngram_orders": [2, 2]}, "ngram_orders = [2, 2]: must be ascending, each order once"),
    (EngramConfig, {"layer_indices": []}, f"layer_indices = []: must be {LAYERS}"),
    (EngramConfig, {"layer_indices": [-1, 2]}, f"layer_indices = [-1, 2]: must be {LAYERS}"),
    (EngramConfig, {"layer_indices": [15, 2]}, "layer_indices = [15, 2]: must be ascending, each layer once"),
    (EngramConfig, {"layer_indices": [2, 2]}, "layer_indices = [2, 2]: must be ascending, each layer once"),
    (EngramConfig, {"engram_dim": 1000}, f"engram_dim = 1000: must be {HEADS}"),
    (EngramConfig, {"engram_dim": 8}, f"engram_dim = 8: must be {HEADS}"),
    (EngramConfig, {"variant": "paperr"}, f"variant = 'paperr': must be {VARIANTS}"),
    (EngramConfig, {"variant": "Sense"}, f"variant = 'Sense': must be {VARIANTS}"),
    (EngramConfig, {"normalization": "nfc"}, "normalization = 'nfc': must be one of nfkc, deepseek"),
    (
        EngramConfig,
        {"dtype": "float64"},
        "dtype = 'float64': must be one of float32, float16, bfloat16, float8_e4m3fn, int8, int4",
    ),
    (TrainConfig, {"value_learning_rate": 0.0}, "value_learning_rate = 0.0: must be above 0"),
    (EngramConfig, {"sparse": 1}, "sparse = 1: must be of type bool"),
    (EngramConfig, {"init_std": -0.02}, "init_std = -0.02: must be 0 or more"),
    (TrainConfig, {"durability": "full"}, "durability = 'full': must be one of process, power"),
    (TrainConfig, {"commit_every": -1}, "commit_every = -1: must be 0 or more"),
    (EngramConfig, {"pad_token_id": -1}, "pad_token_id = -1: must be a token id, or None"),
    (EngramConfig, {"seed": -1}, f"seed = -1: must be {SEEDS}"),
    (EngramConfig, {"seed": 2**63}, f"seed = {2**63}: must be {SEEDS}"),
    (EngramConfig, {"num_streams": 4}, "num_streams = 4: must be 1 in variant 'sense'"),
    (TrainConfig, {"steps": -1}, "steps = -1: must be 0 or more"),
    (TrainConfig, {"steps": 1.5}, "steps = 1.5: must be of type int"),
    (TrainConfig, {"batch_size": 0}, "batch_size = 0: must be at least 1"),
    (TrainConfig, {"eval_sequences": 0}, "eval_sequences = 0: must be at least 1"),
    (TrainConfig, {"sequence_length": 1}, "sequence_length = 1: must be at least 2 (a token and the next)"),
    (TrainConfig, {"learning_rate": 0.0}, "learning_rate = 0.0: must be above 0"),
    (TrainConfig, {"learning_rate": None}, "learning_rate = None: must be of type float (finite)"),
    (TrainConfig, {"fusion_learning_rate": 0.0}, "fusion_learning_rate = 0.0: must be above 0"),
    (TrainConfig, {"row_learning_rate": -1.0}, "row_learning_rate = -1.0: must be above 0"),
    (TrainConfig, {"max_grad_norm": 0}, "max_grad_norm = 0: must be above 0"),
    (TrainConfig, {"weight_decay": -0.1}, "weight_decay = -0.1: must be 0 or more"),
    (TrainConfig, {"lora_rank": -1}, "lora_rank = -1: must be 0 or more"),
    (TrainConfig, {"warmup_steps": -1}, "warmup_steps = -1: must be 0 or more"),
    (TrainConfig, {"eval_every": -1}, "eval_every = -1: must be 0 or more"),
    (TrainConfig, {"seed": -1}, f"seed = -1: must be {SEEDS}"),
    (TrainConfig, {"seed": 2**63}, f"seed = {2**63}: must be {SEEDS}"),
    (TrainConfig, {"row_optimizer": "sgd"}, "row_optimizer = 'sgd': must be one of adagrad, adam"),
    (TrainConfig, {"train_backbone": 1}, "train_backbone = 1: must be of type bool"),
    (Config, {"engram": {"seed": 1}}, "engram = {'seed': 1}: must be of type EngramConfig"),
    (Config, {"train": None}, "train = None: must be of type TrainConfig"),
    (Config, {"trainer": [1]}, "trainer = [1]: must be of type Dict[str, Any]"),
    (Config, {"trainer": {1: 2}}, "trainer = {1: 2}: must be of type Dict[str, Any]"),
]


def _case(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{k}={v!r}"[:40] for k, v in value.items())
    return value.__name__ if isinstance(value, type) else ""


@pytest.mark.parametrize(("owner", "arguments", "message"), REFUSED, ids=_case)
def test_refused_when_made(owner: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  (the whole message is compared)
        owner(**arguments)
    assert str(refused.value) == f"{owner.__name__}.{message}"


@pytest.mark.parametrize(("owner", "arguments", "message"), REFUSED, ids=_case)
def test_refused_when_assigned_and_validated(owner: type, arguments: dict[str, Any], message: str) -> None:
    config = owner()
    for name, value in arguments.items():
        setattr(config, name, value)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        config.validate()
    assert str(refused.value) == f"{owner.__name__}.{message}"


def test_every_field_is_refused_somewhere() -> None:
    """A new field without a case in the list above fails here."""
    for owner in CLASSES:
        refused = {name for case_owner, arguments, _ in REFUSED if case_owner is owner for name in arguments}
        assert refused == {f.name for f in dataclasses.fields(owner)}


def test_validate_of_config_reaches_its_sections() -> None:
    config = Config()
    config.train.steps = -1
    with pytest.raises(ValueError, match=r"^TrainConfig\.steps = -1: must be 0 or more$"):
        config.validate()
    config = Config()
    config.engram.num_heads = 3
    with pytest.raises(ValueError, match=r"engram_dim = 1024: .* the 6 heads \(2 orders × 3 heads\)"):
        config.validate()


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 2**63 - 1},
        {"pad_token_id": 0},
        {"ngram_orders": [2, 16]},
        {"layer_indices": [0]},
        {"init_std": 1},
        {"num_streams": 4, "variant": "paper"},
        {"table_size": 1},
        {"engram_dim": 16},
    ],
)
def test_values_at_the_edge_are_allowed(arguments: dict[str, Any]) -> None:
    config = EngramConfig(**arguments)
    assert {name: getattr(config, name) for name in arguments} == arguments


def test_train_values_at_the_edge_are_allowed() -> None:
    TrainConfig(weight_decay=0, warmup_steps=0, eval_every=0, sequence_length=2, steps=1, batch_size=1)


# Unknown keys.


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("table_sise", "table_size"), ("heads", "num_heads"), ("layers", "layer_indices"), ("init-std", "init_std")],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        EngramConfig.from_dict({key: 1})
    assert str(refused.value) == f"EngramConfig has no field {key!r}; did you mean {nearest!r}?"


def test_unknown_key_far_from_any_lists_the_fields() -> None:
    with pytest.raises(ValueError, match=r"^Config has no field 'zzz'; known fields: engram, train, trainer$"):
        Config.from_dict({"zzz": 1})


def test_unknown_key_that_is_no_string() -> None:
    with pytest.raises(ValueError, match=r"^Config has no field 3; known fields: engram, train, trainer$"):
        Config.from_yaml("3: 4")


def test_unknown_key_in_a_section_names_the_section() -> None:
    with pytest.raises(ValueError, match=r"^TrainConfig has no field 'step'; did you mean 'steps'\?$"):
        Config.from_dict({"train": {"step": 3}})


@pytest.mark.parametrize("value", [None, [], 3, "engram"])
def test_a_section_must_be_a_mapping(value: object) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Config.from_dict({"engram": value})
    assert str(refused.value) == f"EngramConfig is made from a mapping of fields, not from {value!r}"


def test_missing_keys_take_the_defaults() -> None:
    config = Config.from_dict({"engram": {"table_size": 1_000_003}})
    assert config == Config(engram=EngramConfig(table_size=1_000_003))


# JSON and YAML.

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.integers(1, 10**6)
seeds = st.integers(0, 2**63 - 1)
# Surrogates alone can't be written as UTF-8, hence can't be a path in a file.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def test_paths_that_are_left_open_are_apart_for_each_tokenizer_and_each_layout() -> None:
    config = EngramConfig()
    folders = {
        Path(one.paths(name)[0]).parent
        for one in (config, EngramConfig(table_size=5), EngramConfig(seed=1), EngramConfig(ngram_orders=[2]))
        for name in ("org/a", "org/b", None)
    }
    assert len(folders) == 12
    assert all(folder.parent == Path("data") for folder in folders)
    # What decides no row doesn't decide the place either.
    assert EngramConfig(enabled=False, causal=False).paths("a") == config.paths("a")
    assert EngramConfig(tokenizer_name="a").paths("b") == config.paths("a")
    assert EngramConfig(storage_path="x.dat").paths("a") == ("x.dat", config.paths("a")[1])
    assert EngramConfig(storage_path="x.dat", shadow_map_path="m.npy").paths() == ("x.dat", "m.npy")
    for name in ("../up", "a b/c d", "..", "C:\\x"):
        table = Path(EngramConfig().paths(name)[0])
        assert ".." not in table.parts
        assert len(table.parts) == 3


@st.composite
def engram_configs(draw: st.DrawFn) -> EngramConfig:
    orders = sorted(draw(st.sets(st.integers(2, 16), min_size=1)))
    num_heads = draw(st.integers(1, 64))
    variant = draw(st.sampled_from(config_module.VARIANT_NAMES))
    return EngramConfig(
        enabled=draw(st.booleans()),
        storage_path=draw(st.none() | texts),
        shadow_map_path=draw(st.none() | texts),
        table_size=draw(st.integers(1, 2**63)),
        engram_dim=len(orders) * num_heads * draw(st.integers(1, 512)),
        num_heads=num_heads,
        ngram_orders=orders,
        layer_indices=sorted(draw(st.sets(st.integers(0, 200), min_size=1))),
        variant=variant,
        tokenizer_name=draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]))),
        normalization=draw(st.sampled_from(config_module.NORMALIZATIONS)),
        pad_token_id=draw(st.none() | st.integers(0, 10**7)),
        seed=draw(seeds),
        dtype=draw(st.sampled_from(config_module.ROW_DTYPES)),
        init_std=draw(st.just(0.0) | positive),
        sparse=draw(st.booleans()),
        causal=draw(st.booleans()),
        num_streams=draw(st.integers(1, 8)) if variant != "sense" else 1,
    )


train_configs = st.builds(
    TrainConfig,
    steps=st.integers(1, 10**9),
    batch_size=st.integers(1, 10**6),
    sequence_length=st.integers(2, 10**6),
    learning_rate=positive,
    fusion_learning_rate=positive,
    value_learning_rate=positive,
    row_learning_rate=positive,
    row_optimizer=st.sampled_from(config_module.ROW_OPTIMIZERS),
    weight_decay=st.floats(0, 1),
    lora_rank=st.integers(0, 10**3),
    warmup_steps=st.integers(0, 10**6),
    max_grad_norm=positive,
    train_backbone=st.booleans(),
    seed=seeds,
    eval_every=st.integers(0, 10**6),
    eval_sequences=st.integers(1, 10**6),
)
configs = st.builds(Config, engram=engram_configs(), train=train_configs)


@settings(deadline=None)  # cores are shared
@given(configs)
def test_round_trips(config: Config) -> None:
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_json(config.to_json()) == config
    assert Config.from_yaml(config.to_yaml()) == config
    # Any parser reads the files, not only ours.
    assert json.loads(config.to_json()) == config.to_dict()
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("owner", CLASSES)
def test_save_and_load(tmp_path: Path, suffix: str, owner: Any) -> None:
    path = tmp_path / "new" / "folder" / f"config{suffix}"
    config = owner()
    target = config if owner is not Config else config.engram
    if owner is not TrainConfig:
        target.storage_path = "data/тест 表.dat"
    config.save(path)
    loaded = owner.load(str(path))
    assert loaded == config
    assert type(loaded) is owner


def test_saved_json_and_yaml_differ(tmp_path: Path) -> None:
    """Each suffix writes its own format: YAML's reader takes JSON too, so a round trip alone wouldn't show it."""
    Config().save(tmp_path / "a.json")
    Config().save(tmp_path / "a.yaml")
    assert json.loads((tmp_path / "a.json").read_text()) == Config().to_dict()
    assert (tmp_path / "a.yaml").read_text().startswith("engram:\n  enabled: true\n")


def test_yaml_keeps_the_order_of_the_fields() -> None:
    assert list(yaml.safe_load(EngramConfig().to_yaml())) == [f.name for f in dataclasses.fields(EngramConfig)]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}", "---\n"])
def test_empty_yaml_is_all_defaults(text: str) -> None:
    assert Config.from_yaml(text) == Config()


@pytest.mark.parametrize("text", ["3e-3", "3E-3", "0.003", "3.0e-3", "+3e-03", ".3e-2", "3.e-3"])
def test_yaml_reads_numbers_as_people_write_them(text: str) -> None:
    """YAML 1.1, which PyYAML implements, takes 3e-3 for a string."""
    assert TrainConfig.from_yaml(f"learning_rate: {text}").learning_rate == 3e-3


@pytest.mark.parametrize(
    "name", ["1e3", "3e-3", ".5e1", "null", "yes", "1_000", "0x10", "2020-01-01", "1:30", "~", "="]
)
def test_a_string_that_looks_like_something_else_stays_a_string(name: str) -> None:
    config = EngramConfig(storage_path=name)
    assert EngramConfig.from_yaml(config.to_yaml()) == config


def test_yaml_makes_no_objects() -> None:
    with pytest.raises(ValueError, match="not valid YAML"):
        Config.from_yaml("engram: !!python/object/apply:os.getcwd []")


def test_numpy_float_is_saved_as_a_float() -> None:
    config = EngramConfig(init_std=np.float64(0.02))
    assert EngramConfig.from_yaml(config.to_yaml()) == config
    assert EngramConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("name", "content", "evidence"),
    [
        ("a.json", b'{"engram": ', "not valid JSON: Expecting value: line 1 column 12"),
        ("a.json", b"", "not valid JSON: Expecting value"),
        ("a.json", b"[]", "Config is made from a mapping of fields, not from []"),
        ("a.json", b'{"engram": {"table_size": 0}}', "EngramConfig.table_size = 0: must be at least 1"),
        ("a.json", b'{"train": {"learning_rate": NaN}}', "TrainConfig.learning_rate = nan: must be of type float"),
        ("a.json", b"\xff\xfe", "can't decode byte 0xff"),
        ("a.yaml", b"engram: {table_size: 1", "not valid YAML: while parsing a flow mapping"),
        ("a.yml", b"engram:\n\ttable_size: 1", "not valid YAML: while scanning"),
        ("a.yaml", b"- engram", "Config is made from a mapping of fields, not from ['engram']"),
        ("a.yaml", b"engram:", "EngramConfig is made from a mapping of fields, not from None"),
        ("a.yaml", b"engram: {table_sise: 1}", "EngramConfig has no field 'table_sise'; did you mean 'table_size'?"),
        ("a.yaml", b"engram: {table_size: 1e7}", "EngramConfig.table_size = 10000000.0: must be of type int"),
        ("a.yaml", b"\xff\xfe\x00", "can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, name: str, content: bytes, evidence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Config.load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert evidence in str(refused.value)


@pytest.mark.parametrize("name", ["config.toml", "config", "config.JSON"])
def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder" / name
    message = "a configuration file ends in .json, .yaml or .yml"
    with pytest.raises(ValueError, match=message):
        Config().save(path)
    assert not path.parent.exists()
    with pytest.raises(ValueError, match=message):
        Config.load(path)


def test_a_missing_file_stays_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Config.load(tmp_path / "nothing.json")


def test_the_environment_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for f in dataclasses.fields(EngramConfig):
        monkeypatch.setenv(f.name.upper(), "1")
        monkeypatch.setenv(f"ENGRAM_{f.name.upper()}", "1")
    assert EngramConfig() == EngramConfig.from_dict({})
    assert "environ" not in inspect.getsource(config_module).replace("environment", "")


# Documentation.


@pytest.mark.parametrize("owner", CLASSES)
def test_every_field_has_its_docstring(owner: type) -> None:
    """A string right below each field, as long as it takes to say something."""
    body = parsed(inspect.getsource(owner)).body[0].body  # type: ignore[attr-defined]
    documented = {
        statement.target.id
        for statement, following in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and len(str(following.value.value)) > 8
    }
    assert documented == {f.name for f in dataclasses.fields(owner)}


def test_the_settings_of_a_saved_memory_make_another_one(tmp_path: Path) -> None:
    config = EngramConfig(
        table_size=5_000, layer_indices=[1], storage_path="a/table.dat", shadow_map_path="a/map.npy"
    )
    config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "engram" / "config.json").read_text())["storage_path"] is None
    found = EngramConfig.from_pretrained(tmp_path / "saved")
    assert found == EngramConfig(table_size=5_000, layer_indices=[1])
    assert EngramConfig.from_pretrained(str(tmp_path / "saved")) == found


def test_a_folder_without_a_memory_has_no_settings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no memory was saved there; name a saved model's"):
        EngramConfig.from_pretrained(tmp_path)
