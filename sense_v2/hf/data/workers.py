"""Who works through a corpus: processes of this machine, or a Ray cluster.

Both run the same functions:

    documents ──function──▶ … ──function──▶ Arrow tables, one after another, or Parquet files

A function takes an Arrow table with some documents and returns one with what it made of them; what it refers to must
pickle, since it is sent to where it runs. Every function sees every document once; what comes out has the documents'
order, cut into tables as it suits the workers.

`Processes` is `datasets`' map, `RayCluster` Ray Data's map_batches. On a cluster of several machines the files, and
what the functions open, must be under the same path on each: a shared folder, or a copy.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sense_v2.core.errors import MissingPackageError
from sense_v2.hf.data.corpus_files import PARQUET
from sense_v2.hf.data.documents import Part, read_parts
from sense_v2.hf.data.streaming import Source, hub_dataset, open_documents, parts_of

BATCH_DOCUMENTS = 128
Work = Sequence[Callable[[Any], Any]]


def source_of(corpus: Sequence[str | Path]) -> str | list[str | Path]:
    """Return the files that were named as a corpus; a lone name that is no path is a dataset of the hub."""
    if len(corpus) == 1 and not Path(corpus[0]).exists():
        return str(corpus[0])
    return list(corpus)


def columns_of(source: Source, text_column: str, *, split: str = "train") -> list[str]:
    """Return a corpus's columns, from its first document. Raises `ValueError` if there is none."""
    first = next(iter(open_documents(source, text_column=text_column, split=split)), None)
    if first is None:
        raise ValueError(f"{source} has no document")
    return list(first)


@dataclass
class Processes:
    """`count` processes of this machine. If it is one, the calling process works itself."""

    count: int = 1
    progress: bool = False
    """Whether the bars that `datasets` draws are shown."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.count} processes: at least 1")

    @contextmanager
    def tables(
        self, source: Source, work: Work, *, text_column: str = "text", split: str = "train"
    ) -> Iterator[Iterator[Any]]:
        """Give the tables that come out of the last function."""
        with self._mapped(source, work, text_column, split) as done:
            yield done.with_format("arrow").iter(batch_size=1 << 16)

    def write(
        self, source: Source, work: Work, folder: Path, *, text_column: str = "text", split: str = "train"
    ) -> None:
        """Write the tables that come out of the last function as Parquet files."""
        with self._mapped(source, work, text_column, split) as done:
            parts = max(1, min(self.count, len(done)))
            for number in range(parts):
                part = done.shard(parts, number, contiguous=True)
                part.to_parquet(folder / f"part-{number:05}.parquet")

    @contextmanager
    def _mapped(self, source: Source, work: Work, text_column: str, split: str) -> Iterator[Any]:
        import datasets

        bars = datasets.are_progress_bars_disabled()
        (datasets.enable_progress_bars if self.progress else datasets.disable_progress_bars)()
        try:
            # `datasets` names what it keeps by a function's own attributes, not by what lies in the files that these
            # name. So what it keeps is nobody else's, and gone afterwards.
            with tempfile.TemporaryDirectory(prefix="sense-engram-") as kept:
                documents = self._documents(datasets, source, text_column, split, kept)
                for number, function in enumerate(work):
                    workers = max(1, min(self.count, len(documents)))
                    documents = documents.with_format("arrow").map(
                        function,
                        batched=True,
                        batch_size=BATCH_DOCUMENTS,
                        num_proc=workers if workers > 1 else None,
                        remove_columns=documents.column_names,
                        load_from_cache_file=False,
                        cache_file_name=str(Path(kept, f"step{number}.arrow")),
                    )
                yield documents
        finally:
            (datasets.disable_progress_bars if bars else datasets.enable_progress_bars)()

    def _documents(self, datasets: Any, source: Source, text_column: str, split: str, kept: str) -> Any:
        hub = hub_dataset(source)
        if hub is not None:  # downloads are kept where all are
            return datasets.load_dataset(hub[0], split=split, **hub[1])
        parts = parts_of(source, text_column)
        files = list(dict.fromkeys(part.path for part in parts))
        workers = min(self.count, len(files))
        shared = {"cache_dir": kept, "num_proc": workers if workers > 1 else None}
        if all(part.kind == PARQUET for part in parts):  # from Arrow to Arrow
            return datasets.load_dataset(
                "parquet", data_files={split: files}, columns=[parts[0].column], split=split, **shared
            )
        return datasets.Dataset.from_generator(read_parts, gen_kwargs={"parts": parts}, **shared)


@dataclass
class RayCluster:
    """The workers of a Ray cluster: the one at `address`, or the one that this process is connected to, or else a
    cluster of this machine's cores that lasts as long as the work."""

    address: str | None = None
    """As `ray.init` takes it: "auto", "local", or where the head listens."""
    progress: bool = False
    """Whether the bars that Ray Data draws are shown."""

    @contextmanager
    def tables(
        self, source: Source, work: Work, *, text_column: str = "text", split: str = "train"
    ) -> Iterator[Iterator[Any]]:
        """Give the tables that come out of the last function."""
        with self._mapped(source, work, text_column, split) as done:
            yield done.iter_batches(batch_size=None, batch_format="pyarrow")

    def write(
        self, source: Source, work: Work, folder: Path, *, text_column: str = "text", split: str = "train"
    ) -> None:
        """Write the tables that come out of the last function as Parquet files, where they were made."""
        with self._mapped(source, work, text_column, split) as done:
            done.write_parquet(str(folder.resolve()))

    @contextmanager
    def _mapped(self, source: Source, work: Work, text_column: str, split: str) -> Iterator[Any]:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MissingPackageError(
                "a Ray cluster needs the package ray", 'pip install "sense-v2[ray]" installs it'
            ) from error
        mine = not ray.is_initialized()
        if mine:
            # A cluster of its own needs no dashboard, and without one nothing is reported to anybody.
            alone: dict[str, Any] = {} if self.address not in (None, "local") else {"include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **alone)
        context = ray.data.DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, self.progress
        order, context.execution_options.preserve_order = context.execution_options.preserve_order, True
        try:
            documents = self._documents(ray.data, source, text_column, split)
            for function in work:
                documents = documents.map_batches(function, batch_size=BATCH_DOCUMENTS, batch_format="pyarrow")
            yield documents
        finally:
            context.enable_progress_bars = bars
            context.execution_options.preserve_order = order
            if mine:
                ray.shutdown()

    def _documents(self, data: Any, source: Source, text_column: str, split: str) -> Any:
        hub = hub_dataset(source)
        if hub is not None:
            import datasets

            return data.from_huggingface(datasets.load_dataset(hub[0], split=split, **hub[1]))
        parts = [part._replace(path=str(Path(part.path).resolve())) for part in parts_of(source, text_column)]
        if all(part.kind == PARQUET for part in parts):
            paths = list(dict.fromkeys(part.path for part in parts))
            return data.read_parquet(paths, columns=[parts[0].column])
        numbers = data.range(len(parts), override_num_blocks=len(parts))
        return numbers.map_batches(partial(_read, parts=parts), batch_size=1, batch_format="pyarrow")


def _read(numbers: Any, *, parts: Sequence[Part]) -> Iterator[Any]:
    """{number of a part} -> {text}, in tables of some documents."""
    import pyarrow

    documents = read_parts([parts[number] for number in numbers.column("id").to_pylist()])
    while some := list(itertools.islice(documents, BATCH_DOCUMENTS)):
        yield pyarrow.Table.from_pylist(some)
