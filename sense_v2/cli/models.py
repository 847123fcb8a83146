"""A name or a folder -> a model and its tokenizer, or a corpus, as `train`, `eval` and `generate` take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from sense_v2.cli.errors import one_line
from sense_v2.cli.progress import ByteProgress
from sense_v2.core.config import TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.data.corpus import Corpus, encode, read_corpus
from sense_v2.hf.data.large_corpus import has_documents, is_hub_dataset, open_large_corpus, text_bytes
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import EngramMemory, attached_memory
from sense_v2.hf.saving.folder import MEMORY_FOLDER
from sense_v2.hf.training.fresh_model import END_OF_TEXT, fresh_backbone, train_bpe

MIN_CORPUS_BYTES = 16 * 2**20
BYTES_PER_TOKEN = 8  # a token is rarely longer
# Text takes several times its size while it is tokenised; more than this of it is streamed.
MAX_RESIDENT_BYTES = 256 * 2**20
MIN_HELD_OUT_BYTES = 2**20


@dataclass
class Backbone:
    """A model without memory, and what belongs to it."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    """A transformers tokenizer, or a `tokenizers.Tokenizer`."""
    tokenizer_name: str


def new_backbone(texts: list[str], corpus_name: str, *, seed: int, sequence_length: int) -> Backbone:
    """A small Llama that has learned nothing, and a BPE made from `texts`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(texts), eos_token=END_OF_TEXT)
    model = fresh_backbone(len(tokenizer), seed, max_positions=max(512, sequence_length))
    return Backbone("a fresh llama", model, tokenizer, tokenizer_name=f"BPE of {corpus_name}")


def named_backbone(name: str) -> Backbone:
    """A model of the hub or of a folder, in float32. Raises `OSError` naming what was tried, or `CommandError`."""
    if (Path(name) / MEMORY_FOLDER).is_dir():
        raise CommandError(
            f"{name} has a memory already, and training on isn't part of this version",
            "name the model that it was made from, or the folder of one without memory",
        )
    EngramTokenizerBuilder(name)  # asks the hub once, with a time limit, and says what was tried
    local = Path(name).is_dir()
    try:
        tokenizer = saved_tokenizer(Path(name)) if local else AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local, dtype=torch.float32)
    except Exception as error:  # whatever is wrong with a repository's files
        raise _unusable(name, error) from error
    return Backbone(name, model, tokenizer, tokenizer_name=name)


def open_trained(folder: str | Path) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) that `train`, `demo` or `save_pretrained` saved, the memory attached read-only."""
    folder = Path(folder)
    try:
        model = from_pretrained(folder, mode="r")
    except (OSError, ValueError, IndexError):
        raise
    except Exception as error:  # a damaged weights file, a tensor of another shape
        raise _unusable(str(folder), error) from error
    return model, saved_tokenizer(folder)


def open_with_memory(folder: Path, purpose: str) -> tuple[PreTrainedModel, Any, EngramMemory]:
    """(model, tokenizer, memory), as `open_trained`. Raises `CommandError` where there is no memory to `purpose`."""
    model, tokenizer = open_trained(folder)
    memory = attached_memory(model)
    if memory is None:
        raise CommandError(f"{folder}: this model has no memory to {purpose}", "name the folder of one with memory")
    return model, tokenizer, memory


def saved_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder: a transformers tokenizer, or a `tokenizers.Tokenizer` from a lone file."""
    file = folder / "tokenizer.json"
    try:
        if (folder / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if file.is_file():
            return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise _unusable(str(folder), error) from error
    raise FileNotFoundError(f"{file}: the model's tokenizer is missing; copy it back")


def separator_id(tokenizer: Any) -> int | None:
    """The token that ends a text, if the tokenizer has one."""
    if isinstance(tokenizer, Tokenizer):
        found: int | None = tokenizer.token_to_id(END_OF_TEXT)
        return found
    return tokenizer.eos_token_id


def token_stream(texts: Sequence[str], tokenizer: Any, *, echo: Callable[[str], Any]) -> np.ndarray:
    """All texts as one int32 stream of token ids, the model's separator between them; shows how far it is."""
    with ByteProgress("tokenising", sum(map(len, texts)), unit="characters", echo=echo) as advance:
        return encode(texts, tokenizer, separator_id=separator_id(tokenizer), advance=advance)


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model can take at once, where it has such a limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def open_corpus(corpus: Sequence[str | Path] | None, settings: TrainConfig, *, text_column: str = "text") -> Corpus:
    """As much of the corpus (none named: the standard library) as a run of `settings` needs. Text past that only
    costs time to tokenise. The same settings give the same part, so that `eval` reads what `train` held out.

    Documents (JSON lines, Parquet, a dataset of the hub) and text that takes too much memory are read while they are
    trained on."""
    num_tokens = settings.steps * settings.batch_size * settings.sequence_length
    max_bytes = max(MIN_CORPUS_BYTES, BYTES_PER_TOKEN * num_tokens)
    if corpus and (
        is_hub_dataset(corpus)
        or has_documents(corpus)
        or (max_bytes > MAX_RESIDENT_BYTES and text_bytes(corpus) > MAX_RESIDENT_BYTES)
    ):
        held_out_bytes = max(MIN_HELD_OUT_BYTES, BYTES_PER_TOKEN * settings.eval_sequences * settings.sequence_length)
        return open_large_corpus(
            corpus, held_out_bytes=held_out_bytes, sample_bytes=MIN_CORPUS_BYTES, text_column=text_column
        )
    return read_corpus(corpus or None, max_bytes=max_bytes)


def _unusable(name: str, error: Exception) -> CommandError:
    return CommandError(
        f"{name}: the model can't be loaded: {type(error).__name__}: {one_line(str(error))[:300]}",
        "copy its files again, or name another model",
    )
