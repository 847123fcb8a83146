"""A trained model and a corpus -> the blocks of tokens that it is measured on.

By default they are those that training holds out, as many and as long as its evaluation took. `eval`, `analyze` and
`ablate` read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.config import Config, TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.core.progress import Progress, no_progress
from sense_v2.hf.backbones import max_positions, token_stream
from sense_v2.hf.data.corpus import Batches, Corpus
from sense_v2.hf.data.large_corpus import open_corpus


@dataclass
class Blocks:
    """B blocks of T tokens, and where they come from."""

    token_ids_BT: torch.Tensor
    corpus: Corpus
    is_held_out: bool
    num_files: int
    num_tokens: int
    """Of the text that they were taken from."""

    @property
    def what(self) -> str:
        return "held-out text" if self.is_held_out else "text"

    def description(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.corpus.name,
            "files": self.num_files,
            "held_out": self.is_held_out,
            "tokens": self.num_tokens,
        }

    def line(self) -> str:
        num_blocks, length = self.token_ids_BT.shape
        unit = self.corpus.unit
        files = f"{self.num_files} {unit.removesuffix('s') if self.num_files == 1 else unit}"
        return f"{self.corpus.name}, {self.what} of {files}; {num_blocks} sequences of {length} tokens"


def read_blocks(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    corpus: Sequence[str | Path] | None,
    sequences: int | None,
    sequence_length: int | None,
    all_files: bool,
    text_column: str = "text",
    progress: Progress = no_progress,
) -> Blocks:
    """Blocks evenly spread over the corpus; without numbers, those that the model in `folder` was trained with.

    Raises `CommandError`, and what reading the corpus raises.
    """
    settings = settings_of(folder)
    sequences = sequences or settings.eval_sequences
    limit = max_positions(model)
    length = sequence_length or min(settings.sequence_length, limit or settings.sequence_length)
    if limit is not None and length > limit:
        raise CommandError(
            f"--sequence-length {length}, but {folder} takes {limit} tokens at most", f"{limit}, or less"
        )
    text = open_corpus(corpus, settings, text_column=text_column)
    texts = [*text.train_texts, *text.held_out_texts] if all_files else text.held_out_texts
    token_ids = token_stream(texts, tokenizer, progress)
    if len(token_ids) < length:
        what = "text" if all_files else "held-out text"
        raise CommandError(
            f"corpus {text.name}: the {what} has {len(token_ids)} tokens, less than one sequence of {length}",
            "more text, a shorter --sequence-length" + ("" if all_files else ", or --all-files"),
        )
    blocks_BT = Batches(token_ids, batch_size=1, sequence_length=length, seed=0).sample(sequences)
    return Blocks(blocks_BT, text, not all_files, len(texts), len(token_ids))


def settings_of(folder: Path) -> TrainConfig:
    """Those that the model was trained with, where `train` has left them."""
    path = folder / "config.yaml"
    return Config.load(path).train if path.is_file() else TrainConfig()
