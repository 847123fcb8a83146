"""A corpus of any size -> a `Corpus` whose text to train on is read while it trains.

    text files             whole files are held out, as `read_corpus` does it; of a single one the end
    JSON lines, Parquet,   documents are held out, by a digest of their text: copies are on one side, and the same
    a dataset of the hub   ones wherever they are looked for

Only as much is read here as evaluation needs of the text that is held out, and a tokenizer of the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sense_v2.core.config import TrainConfig
from sense_v2.hf.data.corpus import (
    Corpus,
    find_files,
    held_out_threshold,
    in_order,
    read_corpus,
    read_text,
    share_of,
    warn_of_left_out,
)
from sense_v2.hf.data.streaming import FORMATS, open_documents, text_documents

MIN_CORPUS_BYTES = 16 * 2**20
BYTES_PER_TOKEN = 8  # a token is rarely longer
# Text takes several times its size while it is tokenised; more than this of it is streamed.
MAX_RESIDENT_BYTES = 256 * 2**20
MIN_HELD_OUT_BYTES = 2**20

HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")
"""user/dataset, or user/dataset:configuration."""


def is_hub_dataset(paths: Sequence[str | Path]) -> bool:
    """Whether a corpus is the name of a dataset on the hub: no path, and in no folder that is there."""
    if len(paths) != 1 or not HUB_NAME.fullmatch(str(paths[0])):
        return False
    path = Path(paths[0])
    return not path.exists() and not path.parent.exists()


def has_documents(paths: Sequence[str | Path]) -> bool:
    """Whether a corpus is files of documents, all of one kind: JSON (lines) or Parquet."""
    kinds = {FORMATS.get(file.suffix) for file in find_files([Path(path) for path in paths])}
    return len(kinds) == 1 and None not in kinds


def text_bytes(paths: Sequence[str | Path]) -> int:
    """How large the files of a corpus are together."""
    return sum(file.stat().st_size for file in find_files([Path(path) for path in paths]))


def open_corpus(corpus: Sequence[str | Path] | None, settings: TrainConfig, *, text_column: str = "text") -> Corpus:
    """As much of the corpus (none named: the standard library) as a run of `settings` needs. Text past that only
    costs time to tokenise. The same settings give the same part, so that `eval` reads what `train` held out.

    Documents (JSON lines, Parquet, a dataset of the hub) and text that takes too much memory are read while they are
    trained on.
    """
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


def open_large_corpus(
    paths: Sequence[str | Path],
    *,
    held_out_fraction: float = 0.1,
    held_out_bytes: int = 2**20,
    sample_bytes: int = 16 * 2**20,
    text_column: str = "text",
) -> Corpus:
    """Opens files, folders, or the name of a dataset on the hub (its split "train").

    `held_out_texts` are at least `held_out_bytes` of what is held out, `train_texts` the first `sample_bytes` or so
    of the rest (less where the corpus has less). Documents have their text in `text_column`.

    Raises `FileNotFoundError` for a path or dataset that isn't there, `ValueError` where there is no such column, or
    too little text.
    """
    name = ", ".join(Path(path).resolve().name if Path(path).exists() else str(path) for path in paths)
    if is_hub_dataset(paths) or has_documents(paths):
        documents = _open(paths, text_column, name)
        train_texts, held_out_texts, threshold = _apart(
            documents, text_column, held_out_fraction, held_out_bytes, sample_bytes, name
        )
        documents = documents.filter(partial(_is_training, column=text_column, threshold=threshold))
        return Corpus(name, train_texts, held_out_texts, documents=documents, text_column=text_column)

    name_of = find_files([Path(path) for path in paths])
    files = in_order(name_of)
    left_out = [file for file in files if read_text(file, 2**16) is None]
    files = [file for file in files if file not in set(left_out) and file.stat().st_size]
    warn_of_left_out(left_out, len(name_of))
    if not files:
        raise ValueError(f"the corpus {name} has no text. Name files, or folders with files, of UTF-8 text")
    sizes = {file: file.stat().st_size for file in files}
    if len(files) == 1:
        cut = round(sizes[files[0]] * (1 - held_out_fraction))
        training, held_out = [(files[0], 0, cut)], [(files[0], cut, sizes[files[0]])]
    else:
        shares = {file: share_of(name_of[file]) for file in files}
        threshold = held_out_threshold(list(shares.values()), held_out_fraction)
        training, held_out = (
            [(file, 0, sizes[file]) for file in files if (shares[file] < threshold) == is_held_out]
            for is_held_out in (False, True)
        )
    documents = text_documents(training)
    return Corpus(
        name,
        _beginning(documents, sample_bytes),
        _beginning(text_documents(held_out), held_out_bytes),
        len(left_out),
        documents=documents,
    )


def _open(paths: Sequence[str | Path], text_column: str, name: str) -> Any:
    if is_hub_dataset(paths):
        dataset, _, configuration = str(paths[0]).partition(":")
        try:
            documents = open_documents(dataset, **({"name": configuration} if configuration else {}))
        except ImportError:
            raise
        except Exception as error:  # which of many depends on how the hub can't be reached
            raise FileNotFoundError(
                f"{name}: no such file or folder, and no dataset of that name came from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]}); check the name"
            ) from error
    else:
        documents = open_documents(sorted(find_files([Path(path) for path in paths])))
    first: dict[str, Any] = next(iter(documents), {})
    if not isinstance(first.get(text_column), str):
        raise ValueError(
            f"the corpus {name}: its documents have no text in a column {text_column!r}; they have "
            f"{', '.join(first) or 'none'}. Name it with --text-column"
        )
    return documents


def _apart(
    documents: Any, column: str, fraction: float, held_out_bytes: int, sample_bytes: int, name: str
) -> tuple[list[str], list[str], float]:
    """The beginnings of what is trained on and held out, and below which share a document is held out."""
    found: list[tuple[float, str]] = []
    sizes = {False: 0, True: 0}
    for document in documents:
        text = document[column]
        if text and text.strip():
            found.append((share_of(text), text))
            sizes[found[-1][0] < fraction] += len(text.encode())
        if sizes[True] >= held_out_bytes and sizes[False] >= sample_bytes:
            break
    if len(found) < 2:
        raise ValueError(f"the corpus {name} has {len(found)} documents; one is held out, so add text")
    threshold = held_out_threshold([share for share, _ in found], fraction)
    training = [text for share, text in found if share >= threshold]
    return training, [text for share, text in found if share < threshold], threshold


def _is_training(document: dict[str, Any], *, column: str, threshold: float) -> bool:
    text = document[column]
    return bool(text) and share_of(text) >= threshold


def _beginning(documents: Any, num_bytes: int) -> list[str]:
    found: list[str] = []
    size = 0
    for document in documents:
        found.append(document["text"])
        size += len(document["text"].encode())
        if size >= num_bytes:
            break
    return found
