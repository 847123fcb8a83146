"""Paths -> the files of a corpus, each once, and what kind each of them is.

    text        UTF-8; a file is a text
    json lines  an object a line
    json array  a list of objects
    parquet

Its content decides, and its name where content alone can't. All but Parquet may be compressed (gzip, bzip2, xz,
zstandard). A corpus is text, or it is documents: rows of JSON and Parquet. What is neither is called what it is, left
out with a warning where a folder has it, and refused where nothing else is there.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from sense_v2.core.errors import MissingPackageError, are, number_of, with_way_out

TEXT, JSON_LINES, JSON_ARRAY, PARQUET, EMPTY = "text", "json lines", "json array", "parquet", "empty"
DOCUMENTS = (JSON_LINES, JSON_ARRAY, PARQUET)
OTHER_ENCODING = "text in another encoding than UTF-8 (iconv converts it)"

# A file of this share of control characters is no text, even where its bytes are valid UTF-8.
MAX_CONTROL_SHARE = 0.05
# A kind is judged by this much of a file; where it begins with an object that is longer, by that much.
SAMPLE_BYTES, LONG_SAMPLE_BYTES = 1 << 12, 1 << 20
# Beside files of tokens, and no corpus itself: what they are (sense_v2.hf.data.preparing).
TOKENS_FILE = "tokens.json"

# What other files begin with.
_BEGINNINGS = {
    b"ARROW1": "an Arrow file (save it as Parquet)",
    b"PK\x03\x04": "a zip archive (unpack it)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it)",
    b"Rar!": "a RAR archive (unpack it)",
    b"%PDF-": "a PDF document",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x7fELF": "a program",
    codecs.BOM_UTF32_LE: "UTF-32 text (iconv converts it to UTF-8)",
    codecs.BOM_UTF16_LE: "UTF-16 text (iconv converts it to UTF-8)",
    codecs.BOM_UTF16_BE: "UTF-16 text (iconv converts it to UTF-8)",
}
# What compressed data begins with, and what reads it.
_COMPRESSIONS: dict[bytes, Callable[[BinaryIO], Any]] = {
    rb"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file),
    rb"BZh[1-9]1AY&SY": bz2.BZ2File,
    rb"\xfd7zXZ\x00": lzma.LZMAFile,
    rb"\x28\xb5\x2f\xfd": lambda file: _zstandard(file),
}
_COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
_OBJECT = re.compile(r'\{\s*(?:\}|"(?:[^"\\\n]|\\.)*"\s*:)')
# What a dataset's repository has beside its documents.
_BESIDE = re.compile(r"(readme|license|licence|copying|notice|changelog|citation|authors)\b", re.IGNORECASE)


@dataclass
class CorpusFiles:
    """The files of a corpus: the name of each that decides about it, and its kind."""

    name: str
    name_of: dict[Path, str]
    kind_of: dict[Path, str]
    named: set[Path]
    """Those that the caller named, and not a folder above them."""

    def of(self, *kinds: str) -> list[Path]:
        return [file for file, kind in self.kind_of.items() if kind in kinds]

    @cached_property
    def documents(self) -> list[Path]:
        """The files whose rows are documents; empty for a corpus of text."""
        return self.of(*DOCUMENTS)

    @property
    def left_out(self) -> dict[Path, str]:
        """Files that are none of a corpus's, and what each is."""
        known = {*DOCUMENTS, TEXT, EMPTY}
        return {file: kind for file, kind in self.kind_of.items() if kind not in known}


def find_corpus(paths: Sequence[str | Path]) -> CorpusFiles:
    """Find and judge the files that were named, and those below folders that were.

    Names that begin with a dot and `__pycache__` are left out below a folder, linked folders are followed, and a file
    that is met twice counts once.

    Raises:
        FileNotFoundError: A path isn't there.
        ValueError: There is text beside documents, other than what describes them (README, LICENSE).
    """
    roots = [Path(path) for path in paths]
    name = ", ".join(root.resolve().name or str(root) for root in roots)
    name = os.fsencode(name).decode("utf-8", "replace")  # which reports and model cards can say
    found = CorpusFiles(name, find_files(roots), {}, set())
    found.named = {root for root in roots if not root.is_dir()}
    found.kind_of = {file: kind_of(file) for file in found.name_of}
    if found.documents:
        beside = [file for file in found.of(TEXT) if _BESIDE.match(file.name) and file not in found.named]
        for file in beside:
            del found.kind_of[file], found.name_of[file]
        if texts := found.of(TEXT):
            families = sorted({kind.split()[0] for kind in found.kind_of.values() if kind in (*DOCUMENTS, TEXT)})
            raise with_way_out(
                ValueError(
                    f"a corpus is files of one kind; {found.name} has {', '.join(families)} ({found.documents[0]}, "
                    f"{texts[0]})"
                ),
                "Name those of one kind, or keep the others in another folder",
            )
        if beside:
            warnings.warn(f"{beside[0]} describes the documents beside it and is left out", UserWarning, stacklevel=4)
    return found


def warn_of_left_out(left_out: dict[Path, str], num_read: int, named: set[Path]) -> None:
    """Warn where files were left out, in the caller's caller. Raises `ValueError` for one that was named itself."""
    if not left_out:
        return
    first = next((file for file in left_out if file in named), next(iter(left_out)))
    if first in named:
        raise with_way_out(
            ValueError(f"{first} is no corpus but {left_out[first]}"),
            "Name files of UTF-8 text, JSON lines or Parquet",
        )
    warnings.warn(
        f"{len(left_out)} of {number_of(num_read, 'file')} {are(len(left_out))} not UTF-8 text and "
        f"{are(len(left_out))} left out, {first} first: {left_out[first]}",
        UserWarning,
        stacklevel=3,
    )


def kind_of(path: Path) -> str:
    """Return a file's kind; of one that is no part of a corpus, what it is."""
    if not path.is_file():
        return "a pipe or a device (write what comes from it to a file)"
    try:
        with opened(path) as file:
            raw = file.read(SAMPLE_BYTES)
            if raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") and b"\n" not in raw.rstrip():
                raw += file.read(LONG_SAMPLE_BYTES)
            is_whole = not file.read(1)
    except ValueError:
        return "damaged compressed data (copy it again)"
    if not raw:
        return EMPTY
    if raw.startswith(b"PAR1"):
        return "compressed Parquet (decompress it)" if is_compressed(path) else PARQUET
    for beginning, what in _BEGINNINGS.items():
        if raw.startswith(beginning):
            return what
    if raw[257:262] == b"ustar":
        return "a tar archive (unpack it)"
    text = decoded(raw, is_whole)
    if text is None:
        return OTHER_ENCODING if b"\0" not in raw and control_share(raw.decode("latin-1")) == 0 else "binary data"
    name = path.name.lower()
    stem, suffix = os.path.splitext(name)
    return _json_kind(text, os.path.splitext(stem)[1] if suffix in _COMPRESSED_SUFFIXES else suffix) or TEXT


def _json_kind(text: str, suffix: str) -> str | None:
    """Tell JSON from text."""
    text = text.lstrip()
    if suffix in (".jsonl", ".ndjson"):
        return JSON_LINES
    if text.startswith("[") and (_OBJECT.match(inner := text[1:].lstrip()) or (not inner and suffix == ".json")):
        return JSON_ARRAY
    if _OBJECT.match(text):
        first, _, rest = text.partition("\n")
        if _OBJECT.match(rest.lstrip()) and _is_object(first):
            return JSON_LINES
    if suffix == ".json":
        return "JSON, but no rows (write one object a line, or a list of objects)"
    return None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def decoded(raw: bytes, is_whole: bool) -> str | None:
    """Return the text that these bytes are, or None where they are no text. A byte order mark is no text, and a
    character that is cut at the end of bytes that aren't all is left away."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw.removeprefix(codecs.BOM_UTF8), final=is_whole)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text or control_share(text) > MAX_CONTROL_SHARE else text


def control_share(text: str) -> float:
    """Return which share of a text's beginning is control characters."""
    sample = text[: 1 << 16]
    return sum(sample.count(chr(code)) for code in range(32) if chr(code) not in "\t\n\r\f") / max(len(sample), 1)


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to read what is in it, decompressed. Raises `ValueError` where compressed data is damaged."""
    with open(path, "rb") as raw:
        read = _decompressor(raw)
        try:
            yield raw if read is None else read(raw)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if read is None or getattr(error, "errno", None) is not None:
                raise
            raise with_way_out(
                ValueError(f"{path}: the compressed data is damaged ({error})"), "Copy the file again"
            ) from error


def is_compressed(path: Path) -> bool:
    with open(path, "rb") as raw:
        return _decompressor(raw) is not None


def _decompressor(raw: BinaryIO) -> Callable[[BinaryIO], BinaryIO] | None:
    beginning = raw.read(10)
    raw.seek(0)
    return next((read for pattern, read in _COMPRESSIONS.items() if re.match(pattern, beginning)), None)


def _zstandard(raw: BinaryIO) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingPackageError(
            "files compressed by zstandard need the package pyarrow", 'pip install "sense-v2[stream]" installs it'
        ) from error
    return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))


def find_files(roots: Sequence[Path]) -> dict[Path, str]:
    """Find the files, each once, and the name that decides about it."""
    names: dict[Path, tuple[str, Path]] = {}
    for root in roots:
        if not root.exists():
            raise with_way_out(
                FileNotFoundError(f"{root}: no such file or folder"), "a corpus is files or folders of text"
            )
        for name, file in sorted(_walk(root)) if root.is_dir() else [(root.name, root)]:
            real = file.resolve()
            # Through a link, or below two of the folders, a file has several names. Which one counts mustn't depend
            # on the order in which they are met.
            names[real] = min(names.get(real, (name, file)), (name, file))
    return {file: name for name, file in names.values()}


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Files below `root` and their names relative to it. Linked folders come last, and no folder twice: links can
    lead in circles, and a folder's own name is better than a link's."""

    def refuse(error: OSError) -> None:
        raise error

    entered: set[str] = set()
    starts = [str(root)]
    for start in starts:  # grows while it is read
        for folder, inner, files in os.walk(start, onerror=refuse):
            real = os.path.realpath(folder)
            if real in entered:
                inner.clear()
                continue
            entered.add(real)
            inner[:] = sorted(name for name in inner if not _is_left_out(name))
            starts += [path for name in inner if os.path.islink(path := os.path.join(folder, name))]
            for name in sorted(files):
                file = Path(folder, name)
                if not _is_left_out(name) and file.is_file():
                    yield file.relative_to(root).as_posix(), file


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name in ("__pycache__", TOKENS_FILE)
