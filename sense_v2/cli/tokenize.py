"""`sense-engram tokenize`: a corpus's token ids in Parquet files, made once, by as many workers as there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sense_v2.cli.workers import chosen_workers
from sense_v2.core.folders import new_folders
from sense_v2.engram.pretrained_tokenizer import load_tokenizer
from sense_v2.hf.backbones import saved_tokenizer, separator_id
from sense_v2.hf.data.preparing import tokenize_corpus
from sense_v2.report import wording


def run_tokenize(
    corpus: Sequence[str | Path],
    tokenizer: str,
    output: str | Path,
    *,
    processes: int | None = None,
    ray: str | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Writes the files to the new folder `output`; returns one dictionary that JSON can hold.

    Raises `CommandError`, and what the corpus and the tokenizer raise.
    """
    started = time.perf_counter()
    output = Path(output)
    local = Path(tokenizer).is_dir() and (Path(tokenizer) / "tokenizer.json").is_file()
    loaded = saved_tokenizer(Path(tokenizer)) if local else load_tokenizer(tokenizer)[0]
    workers = chosen_workers(processes, ray)
    with new_folders(output.parent):
        result = tokenize_corpus(
            source_of(corpus), loaded, output, workers=workers, separator_id=separator_id(loaded)
        )
    result = {"path": str(output), **result, "seconds": time.perf_counter() - started}
    echo(
        f"tokens   {output}: {wording.count(result['tokens'])} of {wording.count(result['documents'])} documents, "
        f"{wording.count(result['tokens'] / result['seconds'])} a second"
    )
    return result


def source_of(corpus: Sequence[str | Path]) -> str | list[str | Path]:
    """What was named with --corpus, as `open_documents` takes it: a lone name that is no path is the hub's."""
    if len(corpus) == 1 and not Path(corpus[0]).exists():
        return str(corpus[0])
    return list(corpus)
