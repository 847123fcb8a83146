"""Corpora that are read while they are trained on: nothing lost, nothing on both sides, whatever the size."""

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from sense_v2.hf.data import documents, large_corpus
from sense_v2.hf.data.corpus import read_corpus
from sense_v2.hf.data.corpus_files import find_corpus
from sense_v2.hf.data.large_corpus import open_large_corpus
from sense_v2.hf.data.streaming import is_hub_dataset, open_documents


def texts(count=200):
    generator = random.Random(1)
    return [f"document {number} " + "word " * generator.randrange(1, 20) for number in range(count)]


def write(folder, kind, column="text"):
    folder.mkdir()
    for number in range(2):
        part = texts()[number::2]
        if kind == "jsonl":
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({column: text}) + "\n" for text in part))
        else:
            pyarrow.parquet.write_table(pyarrow.table({column: part}), folder / f"{number}.parquet")
    return folder


def streamed(corpus):
    return [document[corpus.text_column] for document in corpus.documents]


# --- large text files ---


@pytest.mark.parametrize(
    "text",
    ["".join(f"line {number} ää漢字\n" for number in range(300)), "ä漢" * 3000, "x\n" * 7 + "y" * 5000 + "\nz"],
    ids=["lines", "one line", "a long line"],
)
@pytest.mark.parametrize("part_bytes", [100, 1000, 10**6])
def test_a_text_file_is_read_in_pieces_that_lose_nothing(tmp_path, monkeypatch, text, part_bytes):
    monkeypatch.setattr(documents, "PART_BYTES", part_bytes)
    monkeypatch.setattr(documents, "PIECE_BYTES", 128)
    (tmp_path / "large.txt").write_text(text, encoding="utf-8")
    pieces = [document["text"] for document in open_documents(tmp_path)]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all(len(piece.encode()) < 128 + 128 for piece in pieces)
    if text.startswith("line"):
        assert all(piece.endswith("\n") for piece in pieces)
        in_order = [piece for found in [open_documents(tmp_path).shuffle(seed=0, buffer_size=1)] for piece in found]
        assert sorted(one["text"] for one in in_order) == sorted(pieces)


def test_bytes_that_are_no_text_are_replaced_and_a_mark_is_left_out(tmp_path):
    """Far behind what a file is judged by: one that begins so isn't UTF-8 text."""
    good = "good " * 2000
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + good.encode() + b"\xff bad\n")
    assert [document["text"] for document in open_documents(tmp_path / "a.txt")] == [good + "� bad\n"]


def test_of_text_files_the_same_are_held_out_as_in_memory(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"the text of file {number}\n" * 3)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.warns(UserWarning, match="1 of 31 files is not UTF-8 text"):
        resident = read_corpus([tmp_path])
    with pytest.warns(UserWarning, match="1 of 31 files is not UTF-8 text"):
        large = open_large_corpus([tmp_path])
    assert sorted(large.held_out_texts) == sorted(resident.held_out_texts)
    assert streamed(large) == large.train_texts
    assert sorted(large.train_texts) == sorted(resident.train_texts)
    assert large.files_left_out == 1


def test_of_a_single_text_file_the_end_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 128)
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "large.txt").write_text(text)
    corpus = open_large_corpus([tmp_path / "large.txt"], held_out_bytes=300, sample_bytes=500)
    training = "".join(streamed(corpus))
    assert text.startswith(training)
    assert text[len(training) :].startswith("".join(corpus.held_out_texts))
    assert 0.85 * len(text) < len(training) < 0.95 * len(text)
    assert 300 <= sum(map(len, corpus.held_out_texts)) < 500
    assert training.startswith("".join(corpus.train_texts))
    assert 500 <= sum(map(len, corpus.train_texts)) < 800


# --- documents ---


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_are_held_out_by_their_text(tmp_path, kind):
    folder = write(tmp_path / kind, kind)
    corpus = open_large_corpus([folder])
    assert 5 < len(corpus.held_out_texts) < 40
    assert sorted(streamed(corpus) + corpus.held_out_texts) == sorted(texts())
    little = open_large_corpus([folder], held_out_bytes=100, sample_bytes=200)
    assert 100 <= sum(map(len, little.held_out_texts)) < 1000
    assert set(little.held_out_texts) < set(corpus.held_out_texts)
    assert streamed(little) == streamed(corpus)


def test_few_documents_are_held_out_all_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "three")))
    corpus = open_large_corpus([tmp_path])
    assert (len(streamed(corpus)), len(corpus.held_out_texts)) == (2, 1)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match="has 1 documents; one is held out"):
        open_large_corpus([tmp_path])


def test_text_in_another_column(tmp_path):
    folder = write(tmp_path / "corpus", "jsonl", column="content")
    with pytest.raises(
        ValueError, match=r"no text in a column 'text'; they have content\. Name it with --text-column"
    ):
        open_large_corpus([folder])
    assert len(streamed(open_large_corpus([folder], text_column="content"))) > 100


def test_what_kind_of_corpus_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "documents", "jsonl")
    assert find_corpus([tmp_path / "documents"]).documents
    (tmp_path / "documents" / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"files of one kind; documents has json, text \(.*/0\.jsonl, .*notes"):
        find_corpus([tmp_path / "documents"])
    assert is_hub_dataset(["someone/corpus"])
    assert is_hub_dataset(["someone/corpus:en"])
    assert not is_hub_dataset(["documents/1.jsonl"])
    assert not is_hub_dataset(["documents/typo.jsonl"])
    assert not is_hub_dataset(["typo"])
    assert not is_hub_dataset(["someone/corpus", "documents"])


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": texts()}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpus = open_large_corpus(["someone/corpus:en"])
    assert asked == [(("someone/corpus",), {"split": "train", "streaming": True, "name": "en"})]
    assert sorted(streamed(corpus) + corpus.held_out_texts) == sorted(texts())
    assert corpus.name == "someone/corpus:en"

    def unreachable(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"someone/corpus: no such file or folder, and no dataset .* \(Connec"
    ):
        large_corpus.open_large_corpus(["someone/corpus"])
