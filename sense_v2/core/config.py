"""Every setting: `EngramConfig` (the memory), `TrainConfig` (a run), `Config` (both).

Keyword arguments, a dictionary, JSON or YAML become a validated dataclass that is saved beside the table, so that a
table always says how it was made. Validation runs when a configuration is made and again where it is used
(`validate()`), because dataclass fields can be assigned to.

A field that is wrong raises `ValueError` naming the field, the value and what is allowed; an unknown key names
the nearest known one. Nothing is read from environment variables.

`yaml_text` says what YAML a configuration may have.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, TypeVar, Union  # noqa: UP035  (evaluated at run time on Python 3.10)

from sense_v2.core.errors import what_and_way_out, with_way_out

VARIANT_NAMES = ("sense", "paper", "deepseek_v41", "qwen_ple", "longcat_flash")
NORMALIZATIONS = ("nfkc", "deepseek")
ROW_DTYPES = ("float32", "float16", "bfloat16")
COMPACT_DTYPES = ("float8_e4m3fn", "int8", "int4")
ROW_OPTIMIZERS = ("adagrad", "adam")
DURABILITIES = ("process", "power")
SAVED_CONFIG = "engram/config.json"
"""Where a saved model's folder has the settings of its memory."""

T = TypeVar("T", bound="_Serializable")


def _require(ok: bool, owner: object, name: str, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{type(owner).__name__}.{name} = {getattr(owner, name)!r}: must be {allowed}")


def matches(value: Any, hint: Any) -> bool:
    """Return True if `value` is of the annotated type. A bool is no int here, and an int is a float."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(matches(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        # The comparison is false for nan and inf, and unlike math.isfinite it takes an int of any size.
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


class _Serializable:
    """Dictionary, JSON and YAML, both ways, for the dataclasses below."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises `ValueError` naming the first field whose value isn't allowed."""
        for name, hint in typing.get_type_hints(type(self)).items():
            _require(matches(getattr(self, name), hint), self, name, f"of type {type_name(hint)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any]) -> T:
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} is made from a mapping of fields, not from {values!r}")
        hints = typing.get_type_hints(cls)
        arguments = {}
        for key, value in values.items():
            if key not in hints:
                raise with_way_out(ValueError(f"{cls.__name__} has no field {key!r}"), nearest(str(key), hints))
            nested = hints[key]
            is_config = isinstance(nested, type) and issubclass(nested, _Serializable)
            arguments[key] = nested.from_dict(value) if is_config else value
        return cls(**arguments)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON: {error}") from error
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        from sense_v2.core.yaml_text import write_yaml

        # Through JSON, so that a np.float64, which is a float, is written as one; YAML's dumper refuses it.
        return write_yaml(json.loads(self.to_json()))

    @classmethod
    def from_yaml(cls: type[T], text: str) -> T:
        from sense_v2.core.yaml_text import read_yaml

        values = read_yaml(text)
        return cls.from_dict({} if values is None else values)

    def save(self, path: str | Path) -> None:
        """Writes JSON or YAML, by the path's suffix (.json, .yaml, .yml)."""
        path = Path(path)
        text = self.to_json() if _is_json(path) else self.to_yaml()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Reads what `save` wrote; a `ValueError` about its content names the file."""
        path = Path(path)
        read = cls.from_json if _is_json(path) else cls.from_yaml
        try:
            return read(path.read_text(encoding="utf-8"))
        except ValueError as error:
            what, way_out = what_and_way_out(error)
            raise with_way_out(ValueError(f"{path}: {what}"), way_out) from error


def _is_json(path: Path) -> bool:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{path}: a configuration file ends in .json, .yaml or .yml")
    return path.suffix == ".json"


def type_name(hint: Any) -> str:
    """Name a type for an error message."""
    if hint is float:
        return "float (finite)"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the known names was meant, or list them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"


def yaml_value(text: str) -> Any:
    """Read one value as a configuration file would; what isn't YAML is the text itself.

    >>> yaml_value("1e-3"), yaml_value("true"), yaml_value("adamw"), yaml_value("[a, b]")
    (0.001, True, 'adamw', ['a', 'b'])
    """
    from sense_v2.core.yaml_text import read_yaml

    try:
        return read_yaml(text)
    except ValueError:
        return text


@dataclass
class EngramConfig(_Serializable):
    """The memory: which n-grams, how many rows, which layers, which files.

    H = heads per order × number of orders is the number of rows that make one memory vector; D = engram_dim / H is
    a row's width.

    >>> config = EngramConfig(engram_dim=64, num_heads=4, ngram_orders=[2, 3])
    >>> config.total_heads, config.row_dim
    (8, 8)
    """

    enabled: bool = True
    """False: `attach_engram` attaches nothing and says so."""
    storage_path: Optional[str] = None  # noqa: UP045
    """The table: raw rows, C order, little-endian. Its manifest lies beside it with the suffix .json. None: a folder
    of its own for each tokenizer and layout, see `paths`."""
    shadow_map_path: Optional[str] = None  # noqa: UP045
    """The map from token ids to compressed ids, written by `EngramTokenizerBuilder`. None: beside the table, in the
    folder that `paths` names."""
    table_size: int = 10_000_000
    """Variant sense: rows of the whole file, shared by all layers, orders and heads. The other variants: the least
    number of rows one head has, as their configurations count it."""
    engram_dim: int = 1024
    """Width of the whole memory vector: all H rows of a position, concatenated."""
    num_heads: int = 8
    """Hash heads per n-gram order."""
    ngram_orders: List[int] = field(default_factory=lambda: [2, 3])  # noqa: UP006
    """The lengths of the n-grams that are looked up; each ends with the current token."""
    layer_indices: List[int] = field(default_factory=lambda: [2, 15])  # noqa: UP006
    """The memory is added before these layers of the backbone, counted from 0."""

    variant: str = "sense"
    """Which published architecture: head layout, gate and convolution (see sense_v2/engram/variants.py)."""
    tokenizer_name: Optional[str] = None  # noqa: UP045
    """Name of the tokenizer the shadow map belongs to, recorded in the manifest. None: taken from the map's JSON."""
    normalization: str = "nfkc"
    """How token texts are folded: nfkc (NFKC, lowercase, strip) or deepseek (the released rule)."""
    pad_token_id: Optional[int] = None  # noqa: UP045
    """Token id that stands for positions before a sequence. None: the model's, else the tokenizer's, else 0."""
    seed: int = 0
    """Decides the hash multipliers and the rows' initial noise."""
    dtype: str = "float32"
    """Row type on disk: float32, float16 or bfloat16; of a table that is only read (made by `sense-engram convert`)
    also float8_e4m3fn or int8."""
    init_std: float = 0.02
    """Standard deviation of the rows' initial noise, with a W_v that starts at zero. 0: the rows start at zero, and
    W_v at noise."""
    sparse: bool = False
    """True: a new table takes disk space only where it is written to; its rows start at zero, whatever init_std."""
    causal: bool = True
    """True for decoders: the convolution sees no later position. False for encoders: it is centred."""
    num_streams: int = 1
    """Residual streams of the backbone (hyper-connections); more than one only in the published variants."""

    @property
    def total_heads(self) -> int:
        """H: rows that make one memory vector."""
        return len(self.ngram_orders) * self.num_heads

    @property
    def row_dim(self) -> int:
        """D: width of one row."""
        return self.engram_dim // self.total_heads

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **download: Any) -> EngramConfig:
        """Read the settings of a saved memory, to make a new one like it.

        The paths are left open, because the saved table is the saved model's. `sense_v2.hf.from_pretrained` opens the
        trained memory itself.

        Args:
            name: A folder; or, if there is no such folder, a model of the hub.
            **download: Those of huggingface_hub's `hf_hub_download` (`revision`, `token`, `cache_dir`, …).

        Raises:
            FileNotFoundError: The folder holds no memory.
            ValueError: The file is damaged.
            OSError: The hub has no such model, or can't be reached.
        """
        path = Path(name) / SAVED_CONFIG
        if not Path(name).exists() and isinstance(name, str):
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, SAVED_CONFIG, **download))
        if not path.is_file():
            raise with_way_out(FileNotFoundError(f"{path}: no memory was saved there"), "name a saved model's folder")
        return dataclasses.replace(cls.load(path), storage_path=None, shadow_map_path=None)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the settings, without the paths, where `from_pretrained` finds them."""
        dataclasses.replace(self, storage_path=None, shadow_map_path=None).save(Path(folder) / SAVED_CONFIG)

    def paths(self, tokenizer_name: str | None = None) -> tuple[str, str]:
        """Return the table's path and the shadow map's.

        Those that are None lie in a folder of data/ that is named after the tokenizer and what decides the rows, so
        that memories of two tokenizers, or of two layouts, never meet in one file.

        >>> EngramConfig().paths("org/gpt2")
        ('data/gpt2-ae5a7c7f/engram_table.dat', 'data/gpt2-ae5a7c7f/shadow_map.npy')
        """
        own = ("enabled", "storage_path", "shadow_map_path", "tokenizer_name", "causal", "num_streams")
        decides = {name: value for name, value in self.to_dict().items() if name not in own}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
        stem = re.sub(r"[^\w.-]+", "_", Path(self.tokenizer_name or tokenizer_name or "engram").name)
        folder = f"data/{stem}-{digest}"
        table, shadow_map = f"{folder}/engram_table.dat", f"{folder}/shadow_map.npy"
        return self.storage_path or table, self.shadow_map_path or shadow_map

    def validate(self) -> None:
        super().validate()
        for name in ("storage_path", "shadow_map_path"):
            _require(getattr(self, name) != "", self, name, "a path")
        for name in ("table_size", "engram_dim", "num_heads", "num_streams"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        orders = self.ngram_orders
        # The shortest n-gram has two tokens: a 1-gram is the token embedding that the model has already.
        _require(len(orders) > 0 and all(2 <= n <= 16 for n in orders), self, "ngram_orders", "orders from 2 to 16")
        _require(orders == sorted(set(orders)), self, "ngram_orders", "ascending, each order once")
        layers = self.layer_indices
        _require(len(layers) > 0 and min(layers) >= 0, self, "layer_indices", "layer numbers from 0, at least one")
        _require(layers == sorted(set(layers)), self, "layer_indices", "ascending, each layer once")
        _require(
            self.engram_dim % self.total_heads == 0,
            self,
            "engram_dim",
            f"divisible by the {self.total_heads} heads ({len(orders)} orders × {self.num_heads} heads)",
        )
        _require(self.variant in VARIANT_NAMES, self, "variant", f"one of {', '.join(VARIANT_NAMES)}")
        _require(self.normalization in NORMALIZATIONS, self, "normalization", f"one of {', '.join(NORMALIZATIONS)}")
        dtypes = (*ROW_DTYPES, *COMPACT_DTYPES)
        _require(self.dtype in dtypes, self, "dtype", f"one of {', '.join(dtypes)}")
        _require(self.init_std >= 0, self, "init_std", "0 or more")
        _require(self.pad_token_id is None or self.pad_token_id >= 0, self, "pad_token_id", "a token id, or None")
        # The multipliers' generator takes no negative seed (hashing.py adds 10007 × layer to it).
        _require(0 <= self.seed < 2**63, self, "seed", "from 0 to 2**63 - 1")
        _require(
            self.num_streams == 1 or self.variant != "sense",
            self,
            "num_streams",
            f"1 in variant {self.variant!r}",
        )


@dataclass
class TrainConfig(_Serializable):
    """One training run.

    Rates are peaks. All rise linearly over the warm-up. Those of the weights then fall along a cosine to a tenth; the
    rows' stays, because a row that is first met late has as much to learn. With a `lr_scheduler_type` among
    `Config.trainer`, all of them follow that schedule.
    """

    steps: int = 300
    """Optimizer steps; each reads one batch. 0: rows are counted, and nothing is trained."""
    batch_size: int = 8
    """Sequences a step."""
    sequence_length: int = 256
    """Tokens a sequence."""
    learning_rate: float = 3e-3
    """Backbone (AdamW)."""
    fusion_learning_rate: float = 1e-2
    """Fusion layers (AdamW, no decay), W_v in front of a table of zeros apart."""
    value_learning_rate: float = 1e-3
    """W_v in front of a table whose rows began as zeros: it began as noise that points everywhere, and rows that were
    written have to go on fitting it."""
    row_learning_rate: float = 0.1
    """Rows of the table. Far above the backbone's in short runs: a row is met only a few times."""
    row_optimizer: str = "adagrad"
    """adagrad (one float a row) or adam (two floats a value)."""
    weight_decay: float = 0.1
    """On the backbone's matrices; rows have none."""
    warmup_steps: int = 40
    """Steps over which the rates rise from 0 to their peaks."""
    max_grad_norm: float = 1.0
    """Gradients, the rows' included, are scaled down to this norm together."""
    train_backbone: bool = True
    """False: only the memory learns, and the adapter of `lora_rank` if there is one."""
    lora_rank: int = 0
    """Rank of a LoRA (peft) on all linear layers of the backbone, whose own weights then stay; 0: none."""
    seed: int = 0
    """Decides the backbone's initial weights and the order of the batches."""
    eval_every: int = 50
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_sequences: int = 64
    """Held-out sequences an evaluation reads."""
    commit_every: int = 100
    """Steps between commits of the table; 0: only at the end. A run that dies loses what came after the last one."""
    durability: str = "process"
    """What a commit survives: process (the death of the process) or power (a power cut as well, for more syncs). The
    one at the end survives both."""

    @property
    def trains_beside_memory(self) -> bool:
        """True if the backbone's weights, or an adapter on them, are trained."""
        return self.train_backbone or self.lora_rank > 0

    def validate(self) -> None:
        super().validate()
        for name in ("batch_size", "eval_sequences"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.sequence_length >= 2, self, "sequence_length", "at least 2 (a token and the next)")
        for name in (
            "learning_rate",
            "fusion_learning_rate",
            "value_learning_rate",
            "row_learning_rate",
            "max_grad_norm",
        ):
            _require(getattr(self, name) > 0, self, name, "above 0")
        for name in ("steps", "lora_rank", "weight_decay", "warmup_steps", "eval_every", "commit_every"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        _require(0 <= self.seed < 2**63, self, "seed", "from 0 to 2**63 - 1")
        _require(self.durability in DURABILITIES, self, "durability", f"one of {', '.join(DURABILITIES)}")
        _require(self.row_optimizer in ROW_OPTIMIZERS, self, "row_optimizer", f"one of {', '.join(ROW_OPTIMIZERS)}")


@dataclass
class Config(_Serializable):
    """Everything a run needs: the memory and how it is trained.

    >>> Config.from_yaml("engram: {table_size: 1000003, num_heads: 4, engram_dim: 64}").engram.table_size
    1000003
    """

    engram: EngramConfig = field(default_factory=EngramConfig)
    """The memory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How it is trained."""
    trainer: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    """Further settings of training, by their names in `transformers.TrainingArguments`: bf16, report_to, …"""

    def validate(self) -> None:
        super().validate()
        self.engram.validate()
        self.train.validate()
