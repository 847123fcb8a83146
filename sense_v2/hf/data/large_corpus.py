"""A corpus of any size -> a `Corpus` whose text to train on is read while it trains.

    text files             whole files are held out, as `read_corpus` does it; of a single one the end
    JSON lines, Parquet,   documents are held out, by a digest of their text: copies are on one side, and the same
    a dataset of the hub   ones wherever they are looked for

Only as much is read here as evaluation needs of the text that is held out, and a tokenizer of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sense_v2.core.config import TrainConfig
from sense_v2.core.errors import with_way_out
from sense_v2.hf.data.corpus import (
    Corpus,
    held_out_threshold,
    in_order,
    read_corpus,
    read_text,
    share_of,
    split_documents,
)
from sense_v2.hf.data.corpus_files import (
    OTHER_ENCODING,
    TEXT,
    CorpusFiles,
    find_corpus,
    is_compressed,
    warn_of_left_out,
)
from sense_v2.hf.data.documents import Part, document_parts, read_parts, streamed, text_of, text_parts
from sense_v2.hf.data.streaming import is_hub_dataset, open_documents

MIN_CORPUS_BYTES = 16 * 2**20
BYTES_PER_TOKEN = 8  # a token is rarely longer
# Text takes several times its size while it is tokenised; more than this of it is streamed.
MAX_RESIDENT_BYTES = 256 * 2**20
MIN_HELD_OUT_BYTES = 2**20
# Compressed text is rarely smaller than one part in so many.
COMPRESSION = 8


def _text_bytes(files: CorpusFiles) -> int:
    """Return how much text the files of a corpus have together, or more."""
    texts = files.of(TEXT)
    return sum(file.stat().st_size * (COMPRESSION if is_compressed(file) else 1) for file in texts)


def fits_memory(corpus: Sequence[str | Path] | None) -> bool:
    """Return whether a run of any length reads this corpus whole before it trains (None: the standard library)."""
    if not corpus:
        return True
    if is_hub_dataset(corpus):
        return False
    files = find_corpus(corpus)
    return not files.documents and _text_bytes(files) <= MAX_RESIDENT_BYTES


def open_corpus(corpus: Sequence[str | Path] | None, settings: TrainConfig, *, text_column: str = "text") -> Corpus:
    """As much of the corpus (none named: the standard library) as a run of `settings` needs. Text past that only
    costs time to tokenise. The same settings give the same part, so that `eval` reads what `train` held out.

    Documents (JSON, Parquet, a dataset of the hub) and text that takes too much memory are read while they are
    trained on.
    """
    num_tokens = settings.steps * settings.batch_size * settings.sequence_length
    max_bytes = max(MIN_CORPUS_BYTES, BYTES_PER_TOKEN * num_tokens)
    if corpus:
        files = None if is_hub_dataset(corpus) else find_corpus(corpus)
        if (
            files is None
            or files.documents
            or (max_bytes > MAX_RESIDENT_BYTES and _text_bytes(files) > MAX_RESIDENT_BYTES)
        ):
            held_out_bytes = BYTES_PER_TOKEN * settings.eval_sequences * settings.sequence_length
            return open_large_corpus(
                corpus,
                held_out_bytes=max(MIN_HELD_OUT_BYTES, held_out_bytes),
                sample_bytes=MIN_CORPUS_BYTES,
                text_column=text_column,
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
    if is_hub_dataset(paths):
        name = str(paths[0])
        return _by_documents(
            name, _open_hub(name, text_column), text_column, held_out_fraction, held_out_bytes, sample_bytes
        )
    found = find_corpus(paths)
    if found.documents:
        warn_of_left_out(found.left_out, len(found.name_of), found.named)
        documents = streamed(document_parts(found, text_column))
        corpus = _by_documents(found.name, documents, text_column, held_out_fraction, held_out_bytes, sample_bytes)
        return replace(corpus, files_left_out=len(found.left_out))

    left_out = found.left_out
    texts = in_order({file: found.name_of[file] for file in found.of(TEXT)})
    left_out |= {file: OTHER_ENCODING for file in texts if read_text(file, 2**16) is None}
    texts = [file for file in texts if file not in left_out]
    warn_of_left_out(left_out, len(found.name_of), found.named)
    if not texts:
        raise with_way_out(
            ValueError(f"the corpus {found.name} has no text"), "Name files, or folders with files, of UTF-8 text"
        )
    if len(texts) == 1 and is_compressed(texts[0]):  # how long it is isn't known, so pieces of it are held out
        documents = streamed(list(text_parts(texts[0])))
        return _by_documents(found.name, documents, "text", held_out_fraction, held_out_bytes, sample_bytes)
    if len(texts) == 1:
        size = texts[0].stat().st_size
        cut = round(size * (1 - held_out_fraction))
        training, held_out = list(text_parts(texts[0], 0, cut)), list(text_parts(texts[0], cut, size))
    else:
        shares = {file: share_of(found.name_of[file]) for file in texts}
        threshold = held_out_threshold(list(shares.values()), held_out_fraction)
        training, held_out = (
            [part for file in texts if (shares[file] < threshold) == is_held_out for part in text_parts(file)]
            for is_held_out in (False, True)
        )
    return Corpus(
        found.name,
        _beginning(training, sample_bytes),
        _beginning(held_out, held_out_bytes),
        len(left_out),
        documents=streamed(training),
    )


def _open_hub(name: str, text_column: str) -> Any:
    try:
        documents = open_documents(name)
    except ImportError:
        raise
    except Exception as error:  # which of many depends on how the hub can't be reached
        raise with_way_out(
            FileNotFoundError(
                f"{name}: no such file or folder, and no dataset of that name came from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0]})"
            ),
            "check the name",
        ) from error
    text_of(next(iter(documents), {}), text_column)
    return documents


def _by_documents(
    name: str, documents: Any, column: str, fraction: float, held_out_bytes: int, sample_bytes: int
) -> Corpus:
    """Hold documents out by a digest of their text."""
    texts = (text_of(document, column) for document in documents)
    corpus, threshold = split_documents(
        texts, fraction, lambda training, held_out: held_out >= held_out_bytes and training >= sample_bytes, name
    )
    documents = documents.filter(partial(_is_training, column=column, threshold=threshold))
    return replace(corpus, documents=documents, text_column=column)


def _is_training(document: dict[str, Any], *, column: str, threshold: float) -> bool:
    text = text_of(document, column)
    return bool(text) and share_of(text) >= threshold


def _beginning(parts: Sequence[Part], num_bytes: int) -> list[str]:
    found: list[str] = []
    size = 0
    for document in read_parts(parts):
        found.append(document["text"])
        size += len(document["text"].encode())
        if size >= num_bytes:
            break
    return found
