"""The files of a corpus -> its documents, read as needed: texts, or token ids

A file is read in parts, so that many may be larger than memory and a stream goes on without reading all again: a text
and JSON lines in parts of 64 MiB, Parquet in its row groups. A text is one document, or of several MiB: pieces of one
MiB, cut where a line ends. A row without text (null, or blank) is an empty document, which everyone skips; one whose
text is no text is an error that names file, line and column.
"""

from __future__ import annotations

import codecs
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sense_v2.core.errors import MissingPackageError, are, number_of, one_line, with_way_out
from sense_v2.hf.data.corpus_files import (
    JSON_ARRAY,
    JSON_LINES,
    PARQUET,
    TEXT,
    CorpusFiles,
    is_compressed,
    opened,
)

PART_BYTES = 64 * 2**20
PIECE_BYTES = 2**20
TOKEN_COLUMN = "input_ids"
_WAY_OUT = "Name it with --text-column (in Python: text_column)"


class Part(NamedTuple):
    """A part of a file: bytes of a text or of JSON lines, or a row group of Parquet."""

    path: str
    kind: str
    start: int = 0
    end: int | None = None
    """None: to the end. A line belongs to the part in which it begins."""
    column: str = "text"


def document_parts(files: CorpusFiles, text_column: str = "text", *, tokens: bool = False) -> list[Part]:
    """Return the parts of a corpus in the order of its files.

    `tokens` allows Parquet files of token ids, too. Raises `ValueError` where a file has no such column, and for a
    corpus without text.
    """
    parts = [part for file, kind in files.kind_of.items() for part in _parts(file, kind, text_column, tokens)]
    columns = {part.column for part in parts}
    if len(columns) > 1:
        raise with_way_out(
            ValueError(f"a corpus is files of one kind; {files.name} has texts and token ids"),
            "Name those of one kind",
        )
    return parts


def _parts(file: Path, kind: str, column: str, tokens: bool) -> Iterator[Part]:
    if kind == TEXT:
        yield from text_parts(file)
    elif kind == PARQUET:
        with _parquet(file) as parquet:
            column = _parquet_column(file, parquet.schema_arrow, column, tokens)
            yield from (Part(str(file), kind, number, None, column) for number in range(parquet.num_row_groups))
    elif kind in (JSON_LINES, JSON_ARRAY):
        whole = Part(str(file), kind, column=column)
        first = next(_READERS[kind](whole), None)  # what is wrong with all of its rows is said before any work
        if first is not None:
            _value(whole, *first)
        yield from _cut(whole) if kind == JSON_LINES else [whole]


def text_parts(file: Path, start: int = 0, end: int | None = None) -> Iterator[Part]:
    """Cut bytes of a text file into parts."""
    return _cut(Part(str(file), TEXT, start, end))


def _cut(part: Part) -> Iterator[Part]:
    if is_compressed(Path(part.path)):
        yield part
        return
    end = os.path.getsize(part.path) if part.end is None else part.end
    for start in range(part.start, end, PART_BYTES):
        yield part._replace(start=start, end=min(start + PART_BYTES, end))


def streamed(parts: Sequence[Part]) -> Any:
    """Make a `datasets.IterableDataset` of parts."""
    import datasets

    return datasets.IterableDataset.from_generator(read_parts, gen_kwargs={"parts": list(parts)})


def read_parts(parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """Read documents, "" for those that are empty. Warns of each file that has any.

    Raises `ValueError` for what is no text, naming its place and the way out.
    """
    for part in parts:
        num_empty = first = 0
        for number, row in _READERS[part.kind](part):
            value = _value(part, number, row)
            if not len(value) and part.kind != TEXT:
                num_empty, first = num_empty + 1, first or number
            yield {part.column: value}
        if num_empty:
            warnings.warn(
                f"{number_of(num_empty, 'document')} without text in {part.path} {are(num_empty)} skipped, "
                f"{_place(part, first)} first",
                UserWarning,
                stacklevel=2,
            )


def text_of(document: dict[str, Any], column: str) -> str:
    """Return a document's text, "" if it has none. Raises `ValueError` if what it has is no text."""
    if column not in document:
        found = ", ".join(document) or "none"
        raise with_way_out(
            ValueError(f"the documents have no text in a column {column!r}; they have {found}"), _WAY_OUT
        )
    return _text(document[column], column, lambda: "a document")


def _value(part: Part, number: int, row: Any) -> Any:
    """The text, or the token ids, of a row that was read at `number` of a part."""
    if not isinstance(row, dict):
        raise with_way_out(
            ValueError(f"{_where(part, number)}: {_named(row)}"), f"A row is an object: {{{part.column!r}: …}}"
        )
    if part.column not in row:
        raise with_way_out(
            ValueError(
                f"{_where(part, number)}: no text in a column {part.column!r}; they have {', '.join(row) or 'none'}"
            ),
            _WAY_OUT,
        )
    value = row[part.column]
    if part.column == TOKEN_COLUMN and isinstance(value, list):
        return value
    return _text(value, part.column, lambda: _where(part, number))


def _text(value: Any, column: str, where: Callable[[], str]) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise with_way_out(
            ValueError(f"{where()}: the column {column!r} holds {_named(value)}, and should hold text"),
            "Write it as text, leave the row out, or name another column with --text-column (in Python: text_column)",
        )
    if not value.isascii():  # JSON can hold halves of characters, which no tokenizer takes
        value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return value if value.strip() else ""


def _named(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
    }
    return f"{names.get(type(value), type(value).__name__)} ({json.dumps(value, default=str)[:40]})"


def _where(part: Part, number: int) -> str:
    return f"{part.path}, {_place(part, number)}"


def _place(part: Part, number: int) -> str:
    """Say which line or row the one is that was read at `number` of a part."""
    if part.kind == JSON_LINES:
        with open(part.path, "rb") as file:
            start = _border(file, part.start, os.fstat(file.fileno()).st_size, -1)
            file.seek(0)
            number += sum(file.read(min(PIECE_BYTES, start - at)).count(b"\n") for at in range(0, start, PIECE_BYTES))
        return f"line {number}"
    if part.kind == PARQUET:
        with _parquet(Path(part.path)) as parquet:
            number += sum(parquet.metadata.row_group(group).num_rows for group in range(part.start))
    return f"row {number}"


# A reader for each kind: (its number, row) of a part, in order, from 1.


def _text_rows(part: Part) -> Iterator[tuple[int, Any]]:
    with opened(part.path) as file:
        left, buffer = _enter(file, part, PIECE_BYTES), b""
        for number in itertools.count(1):
            more = file.read(min(2 * PIECE_BYTES - len(buffer), left))
            buffer, left = buffer + more, left - len(more)
            if not buffer:
                return
            cut = buffer.find(b"\n", PIECE_BYTES - 1) + 1
            if not cut:  # no line ends for long
                cut = len(buffer) if len(buffer) < 2 * PIECE_BYTES else _character(buffer, PIECE_BYTES)
            text, buffer = buffer[:cut].decode("utf-8", errors="replace"), buffer[cut:]
            yield number, {part.column: text.removeprefix("\ufeff") if part.start == 0 and number == 1 else text}


def _line_rows(part: Part) -> Iterator[tuple[int, Any]]:
    with opened(part.path) as file:
        left = _enter(file, part)
        for number, line in enumerate(file, 1):
            if left <= 0:
                return
            left -= len(line)
            if line.strip():
                yield number, _parsed(part, number, line)


def _array_rows(part: Part) -> Iterator[tuple[int, Any]]:
    with opened(part.path) as file:
        yield from enumerate(_parsed(part, 1, file.read()), 1)


def _parsed(part: Part, number: int, raw: bytes) -> Any:
    try:
        return json.loads(raw.removeprefix(codecs.BOM_UTF8).strip())
    except (ValueError, RecursionError) as error:
        where, what = (
            (part.path, error) if part.kind == JSON_ARRAY else (_where(part, number), getattr(error, "msg", error))
        )
        raise with_way_out(
            ValueError(f"{where}: not valid JSON ({what})"),
            "Mend it or remove it, or copy the file again if it was cut",
        ) from error


def _parquet_rows(part: Part) -> Iterator[tuple[int, Any]]:
    with _parquet(Path(part.path)) as parquet:
        batches = parquet.iter_batches(row_groups=[part.start], columns=[part.column])
        values = (value for batch in batches for value in batch.column(0).to_pylist())
        yield from ((number, {part.column: value}) for number, value in enumerate(values, 1))


_READERS = {TEXT: _text_rows, JSON_LINES: _line_rows, JSON_ARRAY: _array_rows, PARQUET: _parquet_rows}


def _enter(file: BinaryIO, part: Part, longest: int = -1) -> int:
    """Go to the first line of a part; return how many bytes from there on are the part's."""
    if part.end is None:
        return sys.maxsize
    size = os.fstat(file.fileno()).st_size
    start, stop = (_border(file, place, size, longest) for place in (part.start, part.end))
    file.seek(start)
    return stop - start


def _border(file: BinaryIO, place: int, size: int, longest: int) -> int:
    """Return where the first line begins at `place` or behind it; if none does for `longest` bytes, a character."""
    if place == 0 or place >= size:
        return min(place, size)
    file.seek(place - 1)
    line = file.readline(longest)
    if line.endswith(b"\n") or place - 1 + len(line) == size:
        return place - 1 + len(line)
    file.seek(place)
    return place + _character(file.read(4), 0)


def _character(raw: bytes, place: int) -> int:
    """Return where the first character begins at `place` or behind it."""
    return place + next((at for at, byte in enumerate(raw[place : place + 4]) if byte & 0xC0 != 0x80), 0)


@contextmanager
def _parquet(file: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            "Parquet needs the package pyarrow", 'pip install "sense-v2[stream]" installs it'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise with_way_out(
            ValueError(f"{file}: not a whole Parquet file ({one_line(str(error))})"), "Copy it again"
        ) from error


def _parquet_column(file: Path, schema: Any, column: str, tokens: bool) -> str:
    """Return the column that documents have their text in, or their token ids."""
    import pyarrow.types as types

    if column in schema.names:
        found = schema.field(column).type
        found = found.value_type if types.is_dictionary(found) else found
        is_text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(is_one(found) for is_one in is_text):
            raise with_way_out(
                ValueError(f"{file}: the column {column!r} holds {found}, and should hold text"), _WAY_OUT
            )
        return column
    if tokens and TOKEN_COLUMN in schema.names:
        return TOKEN_COLUMN
    has = ", ".join(schema.names) or "none"
    raise with_way_out(ValueError(f"{file}: no text in a column {column!r}; they have {has}"), _WAY_OUT)
