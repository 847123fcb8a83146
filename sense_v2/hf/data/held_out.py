"""A trained model and a corpus -> the blocks of tokens that it is measured on.

By default they are those that training held out, as many and as long as its evaluation took: beside a model lies
what it was trained on. `eval`, `analyze` and `ablate` read them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.config import Config, TrainConfig
from sense_v2.core.errors import CommandError, number_of, one_line
from sense_v2.core.progress import Progress, no_progress
from sense_v2.hf.backbones import max_positions, token_stream
from sense_v2.hf.data.corpus import Batches, Corpus
from sense_v2.hf.data.large_corpus import open_corpus

CORPUS_FILE = "corpus.json"
"""In a model's folder: what it was trained on, {"paths": [path or dataset, …] or null, "text_column"}."""


@dataclass
class Blocks:
    """B blocks of T tokens, and where they come from."""

    token_ids_BT: torch.Tensor
    corpus: Corpus
    is_held_out: bool
    num_files: int
    num_tokens: int
    """Of the text that they were taken from."""
    trained_on: bool | None
    """Whether the model was trained on that corpus; None where its folder doesn't say."""

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
            "trained_on": self.trained_on,
        }

    def line(self) -> str:
        num_blocks, length = self.token_ids_BT.shape
        files = number_of(self.num_files, self.corpus.unit.removesuffix("s"))
        note = {
            True: "",
            False: "; not the corpus that the model was trained on",
            None: "; what the model was trained on isn't known",
        }[self.trained_on]
        sequences = number_of(num_blocks, "sequence")
        return f"{self.corpus.name}, {self.what} of {files}; {sequences} of {length} tokens{note}"


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
    """Blocks evenly spread over the corpus; without a corpus and numbers, those of the training of the model in
    `folder`. Where the folder doesn't name its corpus, the standard library.

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
    trained = _trained_corpus(folder)
    if trained is not None and not corpus:
        corpus, text_column = trained["paths"], trained["text_column"]
    try:
        text = open_corpus(corpus, settings, text_column=text_column)
    except FileNotFoundError as error:
        if trained is None or corpus != trained["paths"]:
            raise
        raise CommandError(
            f"{folder} was trained on a corpus that isn't there: {one_line(str(error))}", "--corpus names another"
        ) from error
    texts = [*text.train_texts, *text.held_out_texts] if all_files else text.held_out_texts
    token_ids = token_stream(texts, tokenizer, progress)
    if len(token_ids) < length:
        what, tokens = "text" if all_files else "held-out text", number_of(len(token_ids), "token")
        raise CommandError(
            f"corpus {text.name}: the {what} has {tokens}, less than one sequence of {length}",
            "more text, a shorter --sequence-length" + ("" if all_files else ", or --all-files"),
        )
    blocks_BT = Batches(token_ids, batch_size=1, sequence_length=length, seed=0).sample(sequences)
    is_same = None if trained is None else trained["paths"] == absolute_paths(corpus)
    return Blocks(blocks_BT, text, not all_files, 1 if text.is_cut else len(texts), len(token_ids), is_same)


def save_corpus(folder: Path, corpus: Sequence[str | Path] | None, text_column: str) -> None:
    """Write into a model's folder what it was trained on; None is the standard library."""
    record = {"paths": absolute_paths(corpus), "text_column": text_column}
    (folder / CORPUS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _trained_corpus(folder: Path) -> dict[str, Any] | None:
    path = folder / CORPUS_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"paths": record["paths"], "text_column": record["text_column"]}
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path} doesn't name a corpus", "remove it, and name one by --corpus") from error


def absolute_paths(corpus: Sequence[str | Path] | None) -> list[str] | None:
    """Return paths by which any folder finds the corpus; a dataset stays a name, None the standard library."""
    return [str(Path(one).resolve()) if Path(one).exists() else str(one) for one in corpus] if corpus else None


def settings_of(folder: Path) -> TrainConfig:
    """Those that the model was trained with, where `train` has left them."""
    path = folder / "config.yaml"
    return Config.load(path).train if path.is_file() else TrainConfig()
