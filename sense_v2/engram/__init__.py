"""The memory itself: token ids to row ids to rows, and the fused hidden states.

The flow, one module per arrow:

    token_ids_BT ──tokenizer──▶ compressed_ids_BT ──hashing──▶ row_ids_BTH ──storage──▶ rows_BTHD
    rows_BTHD + hidden_BTC ──model──▶ hidden_BTC          row gradients ──optim──▶ updated rows on disk

B batch, T sequence, H rows a position (n-gram orders × heads), D row width, C hidden size, N rows of the table.

Public names are imported on first use, so a process that only reads rows (`sense_v2.engram.storage`) never loads
`transformers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sense_v2.engram.delta.overlay import OverlayStorage as OverlayStorage
    from sense_v2.engram.hashing import NgramHasher as NgramHasher
    from sense_v2.engram.head_layout import HeadLayout as HeadLayout
    from sense_v2.engram.model import EngramFusionLayer as EngramFusionLayer
    from sense_v2.engram.optim import RowAdam as RowAdam
    from sense_v2.engram.optim import RowWiseAdagrad as RowWiseAdagrad
    from sense_v2.engram.released.released_table import open_released_table as open_released_table
    from sense_v2.engram.storage import MMapEmbeddingStorage as MMapEmbeddingStorage
    from sense_v2.engram.tokenizer import EngramTokenizer as EngramTokenizer
    from sense_v2.engram.tokenizer import EngramTokenizerBuilder as EngramTokenizerBuilder

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


if not TYPE_CHECKING:  # or a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
