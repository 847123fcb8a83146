"""What a file of a corpus is: by its content and its name, the same for every command and in Python."""

import bz2
import gzip
import json
import lzma
import os
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from sense_v2.core.config import TrainConfig
from sense_v2.hf.data.corpus import read_corpus
from sense_v2.hf.data.corpus_files import kind_of
from sense_v2.hf.data.large_corpus import open_corpus, open_large_corpus
from sense_v2.hf.data.preparing import tokenize_corpus
from sense_v2.hf.data.streaming import open_documents
from sense_v2.hf.data.workers import Processes

TEXTS = [f"word{number} word{number + 1} " * 3 for number in range(12)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
PROSE = "Once upon a time.\nThere was a table.\n"


def zstandard(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


def everywhere(path, tmp_path):
    """The texts that each way of reading a corpus finds, which must be the same."""
    found = []
    for corpus in (read_corpus([path]), open_corpus([path], TrainConfig()), open_large_corpus([path])):
        streamed = corpus.train_texts if corpus.documents is None else [one["text"] for one in corpus.documents]
        found.append(sorted([*streamed, *corpus.held_out_texts]))
    found.append(sorted(one["text"] for one in open_documents(path)))
    tokenizer = tiny_tokenizer()
    described = tokenize_corpus(path, tokenizer, tmp_path / "tokens", workers=Processes(1))
    assert described["tokens"] == sum(len(tokenizer.encode(text).ids) for text in found[0])
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.JSONL", "a.json", "a.txt", "a", "a.jsonl.gz", "a.gz", "b.jsonl.zst", "c.xz", "d.bz2"],
)
def test_json_lines_are_documents_whatever_they_are_called(tmp_path, name):
    compress = {".gz": gzip.compress, ".zst": zstandard, ".xz": lzma.compress, ".bz2": bz2.compress}
    path = tmp_path / "corpus" / name
    path.parent.mkdir()
    path.write_bytes(compress.get(path.suffix, bytes)(LINES.encode()))
    assert everywhere(path, tmp_path) == sorted(TEXTS)


def test_lists_of_objects_and_parquet_are_documents(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS[:4]], indent=2))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[8:], "n": [1] * 4}), folder / "no suffix")
    (folder / "b.jsonl").write_text("".join(LINES.splitlines(keepends=True)[4:8]))
    assert everywhere(folder, tmp_path) == sorted(TEXTS)


def test_compressed_text_is_text(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, compress in enumerate((gzip.compress, lzma.compress, bz2.compress, zstandard, bytes)):
        (folder / f"{number}.txt").write_bytes(compress(f"{number} {PROSE}".encode()))
    assert everywhere(folder, tmp_path) == sorted(f"{number} {PROSE}" for number in range(5))


def test_what_describes_documents_is_left_out_and_other_text_is_refused(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "train.parquet")
    (folder / "README.md").write_text(PROSE)
    with pytest.warns(UserWarning, match=r"README\.md describes the documents beside it and is left out"):
        assert everywhere(folder, tmp_path) == sorted(TEXTS)
    (folder / "notes.txt").write_text(PROSE)
    for read in (lambda: read_corpus([folder]), lambda: open_large_corpus([folder]), lambda: open_documents(folder)):
        with pytest.raises(ValueError, match=r"corpus has parquet, text \(.*train\.parquet, .*notes\.txt\)\. Name"):
            read()


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4
OTHERS = {
    "picture.png": (PNG, "a PNG picture"),
    "all.zip": (b"PK\x03\x04" + b"\0" * 99, "a zip archive"),
    "utf16.txt": (PROSE.encode("utf-16"), "UTF-16 text"),
    "utf16be.txt": (b"\xfe\xff" + PROSE.encode("utf-16-be"), "UTF-16 text"),
    "latin.txt": ("café " * 99).encode("latin-1"),
    "all.tar": (b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"\0" * 99, "a tar archive"),
    "all.tar.gz": (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0" + b"\0" * 99), "a tar archive"),
    "cut.gz": (gzip.compress(np.random.default_rng(0).bytes(900))[:500], "damaged compressed data"),
    "one.json": (json.dumps({"data": [{"text": "a"}]}, indent=1).encode(), "JSON, but no rows"),
    "strings.json": (b'["a", "b"]', "JSON, but no rows"),
    "d.arrow": (b"ARROW1\0\0" + b"\0" * 99, "an Arrow file"),
    "b.bin": (bytes(range(256)), "binary data"),
}
OTHERS["latin.txt"] = (OTHERS["latin.txt"], "text in another encoding than UTF-8")


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_corpus_is_refused_by_name(tmp_path, name):
    raw, what = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(raw)
    (tmp_path / "a.txt").write_text(PROSE)
    for read in (read_corpus, lambda paths: open_corpus(paths, TrainConfig()), open_large_corpus, open_documents):
        with pytest.raises(ValueError, match=rf"{name} is .*{what}"):
            read([path])
        with pytest.raises(ValueError, match=rf"{name} is no corpus but .*{what}"):
            read([path, tmp_path / "a.txt"])
        with pytest.warns(UserWarning, match=rf"1 of 2 files is not .* left out, .*{name} first: {what}"):
            read([tmp_path])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device"):
        read_corpus([tmp_path / "pipe"])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{'a': 1}\n{'b': 2}\n", "text"),
        ('{"a": 1}\n', "text"),  # a line alone, in a file that isn't called JSON
        ('{"a": 1}\n{"b": 2}', "json lines"),
        ('\n{"a": {"b": "\\"}"}}\n\n{"b": 2}', "json lines"),
        ('{\n  "a": 1\n}\n', "text"),
        ("[1, 2]", "text"),
        ("{{ template }}\n{{ more }}\n", "text"),
        ('{"a": "' + "x" * 100_000 + '"}\n{"b": 1}\n', "json lines"),
        ("", "empty"),
        ("# [{}]\n", "text"),
        ("Ünicode\n" * 1000, "text"),
    ],
)
def test_the_kind_of_a_file_without_a_suffix(tmp_path, text, kind):
    (tmp_path / "file").write_text(text)
    assert kind_of(tmp_path / "file") == kind


def test_empty_files_are_skipped(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(LINES)
    (tmp_path / "corpus" / "b.jsonl").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert everywhere(tmp_path / "corpus", tmp_path) == sorted(TEXTS)
