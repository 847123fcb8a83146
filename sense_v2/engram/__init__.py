"""The memory itself: token ids to row ids to rows, and the fused hidden states.

The flow, one module per arrow:

    token_ids_BT ──tokenizer──▶ compressed_ids_BT ──hashing──▶ row_ids_BTH ──storage──▶ rows_BTHD
    rows_BTHD + hidden_BTC ──model──▶ hidden_BTC          row gradients ──optim──▶ updated rows on disk

B batch, T sequence, H rows a position (n-gram orders × heads), D row width, C hidden size, N rows of the table.

Public names are imported on first use, so a process that only reads rows (`sense_v2.engram.storage`) never loads
`transformers`.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "EngramFusionLayer": "model",
    "EngramTokenizer": "tokenizer",
    "EngramTokenizerBuilder": "tokenizer",
    "HeadLayout": "head_layout",
    "MMapEmbeddingStorage": "storage",
    "NgramHasher": "hashing",
    "OverlayStorage": "delta.overlay",
    "RowAdam": "optim",
    "RowWiseAdagrad": "optim",
    "open_released_table": "released.released_table",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
