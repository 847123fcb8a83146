"""Rows of a corpus: what is no text is an error that names its place, and what is empty is skipped and counted."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_tokenizer

from sense_v2.hf.data import documents
from sense_v2.hf.data.corpus import read_corpus
from sense_v2.hf.data.large_corpus import open_large_corpus
from sense_v2.hf.data.preparing import tokenize_corpus
from sense_v2.hf.data.streaming import PackedStream, open_documents
from sense_v2.hf.data.workers import Processes

GOOD = [f"word{number} word{number + 1}" for number in range(20)]


def lines(rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def tokenized(path, folder, **options):
    return tokenize_corpus(path, tiny_tokenizer(), folder, workers=Processes(1), separator_id=2, **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"text": 3},
            r"line 21: the column 'text' holds a number \(3\), and should hold text\. Write it as text, leave",
        ),
        ({"text": ["a"]}, r"line 21: the column 'text' holds a list \(\[\"a\"\]\), and"),
        ({"text": {"de": "a"}}, r"line 21: the column 'text' holds an object"),
        ({"body": "a"}, r"line 21: no text in a column 'text'; they have body\. Name it with --text-column"),
        ([1], r"line 21: a list \(\[1\]\)\. A row is an object"),
        (
            '{"text": "cut o',
            r"line 21: not valid JSON \(Unterminated .*\)\. Mend it or remove it, or copy the file again",
        ),
        ("[" * 100_000, r"line 21: not valid JSON"),
    ],
)
def test_a_row_that_is_no_text_is_named(tmp_path, name, row, says):
    raw = lines([*({"text": text} for text in GOOD), row]).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for read in (lambda: read_corpus([path]), lambda: open_large_corpus([path]), lambda: list(open_documents(path))):
        with pytest.raises(ValueError, match=rf"{name}, {says}"):
            read()


def test_lines_are_counted_from_the_beginning_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(lines([*({"text": text} for text in GOOD), {"text": 3}]))
    assert len(documents.document_parts(documents_of(path))) > 5
    with pytest.raises(ValueError, match=r"a\.jsonl, line 21: "):
        list(open_documents(path))


def documents_of(path):
    from sense_v2.hf.data.corpus_files import find_corpus

    return find_corpus([path])


def test_parts_of_json_lines_hold_each_line_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 16)
    path = tmp_path / "a.jsonl"
    texts = [f"{number} " + "ä" * (number * 37 % 90) for number in range(60)]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    for part_bytes in (1, 7, 64, 1000, 10**6):
        monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
        assert [one["text"] for one in open_documents(path)] == texts


EMPTY = [None, "", " \n\t"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_empty_documents_are_skipped_and_counted(tmp_path, kind):
    """In the first row as well."""
    texts = [*EMPTY, *GOOD, *EMPTY]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        rows = [{"text": text} for text in texts]
        path.write_text(json.dumps(rows) if kind == "json" else lines(rows))
    first = "line 1" if kind == "jsonl" else "row 1"
    with pytest.warns(UserWarning, match=rf"6 documents without text in .*a\.{kind} are skipped, {first} first"):  # noqa: PT031
        for corpus in (read_corpus([path]), open_large_corpus([path])):
            assert corpus.num_empty == 6
            found = corpus.train_texts if corpus.documents is None else [one["text"] for one in corpus.documents]
            assert sorted([*found, *corpus.held_out_texts]) == sorted(GOOD)
            assert "6 documents without text are skipped" in corpus.line()
        described = tokenized(path, tmp_path / "tokens")
        assert (described["documents"], described["empty_documents"], described["tokens"]) == (20, 6, 60)
        with_empty, without = (
            PackedStream(documents, tiny_tokenizer(), sequence_length=60, separator_id=2, buffer_blocks=1)
            for documents in (open_documents(path), of_texts(GOOD, tmp_path))
        )
        assert with_empty.take(1)[0]["input_ids"].tolist() == without.take(1)[0]["input_ids"].tolist()


def of_texts(texts, folder):
    (folder / "good.jsonl").write_text(lines({"text": text} for text in texts))
    return open_documents(folder / "good.jsonl")


def test_halves_of_characters_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n' + lines({"text": text} for text in GOOD))
    corpus = read_corpus([path])
    assert any(text.startswith("a \ufffd") for text in [*corpus.train_texts, *corpus.held_out_texts])


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"text": [1, 2]}, r"the column 'text' holds int64, and should hold text\. Name it with --text-column"),
        ({"text": [["a"], ["b"]]}, r"the column 'text' holds list<.*string>, and"),
        ({"body": ["a", "b"], "n": [1, 2]}, r"no text in a column 'text'; they have body, n\. Name it with"),
    ],
)
def test_a_column_of_parquet_that_is_no_text(tmp_path, columns, says):
    path = parquet(tmp_path / "b.parquet", **columns)
    parquet(tmp_path / "a.parquet", text=GOOD)
    with pytest.raises(ValueError, match=rf"b\.parquet: {says}"):
        open_documents(tmp_path)
    with pytest.raises(ValueError, match=says):
        tokenized(path, tmp_path / "tokens")


def test_parquet_of_several_groups_and_types_of_text(tmp_path):
    parquet(tmp_path / "a.parquet", text=pyarrow.array(GOOD).dictionary_encode(), other=[1] * 20)
    parquet(tmp_path / "b.parquet", text=pyarrow.array(["one", "two"], pyarrow.large_string()))
    assert [one["text"] for one in open_documents(tmp_path)] == [*GOOD, "one", "two"]


def test_a_damaged_parquet_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=GOOD)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.parquet: not a whole Parquet file \(.*\)\. Copy it again"):
        read_corpus([path])


def test_another_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines({"body": text} for text in GOOD))
    assert [one["body"] for one in open_documents(path, text_column="body")] == GOOD
    assert tokenized(path, tmp_path / "tokens", text_column="body")["documents"] == 20
    with pytest.raises(ValueError, match=r"line 1: no text in a column 'text'; they have body\. Name it"):
        tokenized(path, tmp_path / "more")
