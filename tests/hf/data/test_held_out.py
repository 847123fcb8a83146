"""A trained model -> the text that it is measured on: by default that of its own training."""

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from sense_v2.core.errors import CommandError
from sense_v2.hf.data.held_out import read_blocks, save_corpus


def files(folder):
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"word{number} word{number + 1} " * 200)
    return folder


def read(folder, corpus=None):
    return read_blocks(
        folder, tiny_model("llama"), tiny_tokenizer(), corpus=corpus, sequences=2, sequence_length=8, all_files=False
    )


def test_it_is_the_corpus_of_the_training_whatever_the_folder_of_the_call(tmp_path, monkeypatch):
    corpus = files(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    save_corpus(tmp_path, ["corpus"], "text")
    monkeypatch.chdir("/")
    blocks = read(tmp_path)
    assert blocks.corpus.name == "corpus"
    assert blocks.description()["trained_on"] is True
    assert "trained" not in blocks.line()
    assert read(tmp_path, [corpus]).description()["trained_on"] is True


def test_another_corpus_is_said_to_be_another(tmp_path):
    save_corpus(tmp_path, [files(tmp_path / "corpus")], "text")
    blocks = read(tmp_path, [files(tmp_path / "other")])
    assert blocks.description()["trained_on"] is False
    assert blocks.line().endswith("; not the corpus that the model was trained on")


def test_a_folder_that_does_not_say_is_measured_on_the_standard_library_and_says_so(tmp_path):
    blocks = read(tmp_path)
    assert blocks.corpus.name.endswith("standard library")
    assert blocks.description()["trained_on"] is None
    assert blocks.line().endswith("; what the model was trained on isn't known")


def test_a_corpus_that_is_gone_is_named_with_the_way_out(tmp_path):
    save_corpus(tmp_path, [tmp_path / "gone"], "text")
    with pytest.raises(CommandError, match=r"gone.*trained on.*--corpus"):
        read(tmp_path)


def test_the_column_of_the_training_is_read(tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"body": f"word{n} " * 40}) + "\n" for n in range(200)))
    save_corpus(tmp_path, [tmp_path / "lines.jsonl"], "body")
    assert len(read(tmp_path).token_ids_BT) == 2
