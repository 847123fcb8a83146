"""Corpora read while they are trained on: packed as an independent packer packs, resumed without a trace."""

import gc
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_trainer import StopAt, arguments, history, table_on_disk, with_memory
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from sense_v2.hf.data import streaming
from sense_v2.hf.data.streaming import PackedStream, load_stream, open_documents, save_stream
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.trainer import EngramTrainer

SEPARATOR = 2


def texts(count=60):
    generator = np.random.default_rng(0)
    return [
        " ".join(f"word{token}" for token in generator.integers(1, 30, generator.integers(1, 12)))
        for _ in range(count)
    ]


def write(folder, kind, files=3):
    """60 documents in some files."""
    folder.mkdir(exist_ok=True)
    for number in range(files):
        part = texts()[number::files]
        if kind == "jsonl":
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), folder / f"{number}.parquet")
        else:
            for inner, text in enumerate(part):
                (folder / f"{number}-{inner}.txt").write_text(text)
    return folder


def stream(folder, **changes):
    settings = {"sequence_length": 10, "separator_id": SEPARATOR, "seed": 3, "buffer_blocks": 8}
    return PackedStream(open_documents(folder), tiny_tokenizer(), **{**settings, **changes})


def first(blocks, count):
    found = iter(blocks)
    return [{name: value.tolist() for name, value in next(found).items()} for _ in range(count)]


def token_lists():
    tokenizer = tiny_tokenizer()
    return [[*tokenizer.encode(text).ids, SEPARATOR] for text in texts()]


def num_blocks_of_an_epoch():
    return sum(map(len, token_lists())) // 10


# --- what is read ---


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "text"])
def test_every_document_is_read_once_an_epoch(tmp_path, kind):
    folder = write(tmp_path / kind, kind)
    found = [example["text"] for example in open_documents(folder)]
    assert sorted(found) == sorted(texts())
    assert [example["text"] for example in open_documents(sorted(folder.iterdir()))] == found


def test_what_is_no_corpus_is_named(tmp_path):
    write(tmp_path / "mixed", "jsonl")
    write(tmp_path / "mixed", "text", files=1)
    with pytest.raises(ValueError, match=r"files of one kind; .* has json, text"):
        open_documents(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has none"):
        open_documents(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        open_documents([tmp_path / "nowhere"])


def test_a_name_that_is_no_path_is_a_dataset_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or "documents")
    assert open_documents("someone/corpus", split="validation", name="en") == "documents"
    assert asked == [(("someone/corpus",), {"split": "validation", "streaming": True, "name": "en"})]


# --- packing ---


def test_blocks_in_order_are_the_documents_one_behind_the_other(tmp_path):
    """Against a packer that has everything in memory."""
    folder = write(tmp_path / "corpus", "jsonl", files=1)
    line = [(token, place) for document in token_lists() for place, token in enumerate(document)]
    for number, block in enumerate(first(stream(folder, buffer_blocks=1), num_blocks_of_an_epoch())):
        part = line[10 * number : 10 * number + 10]
        assert block["input_ids"] == [token for token, _ in part]
        starts = [at for at, (_, place) in enumerate(part) if place == 0]
        expected, start = [], 0
        for at in range(10):
            start = at if at in starts else start
            expected.append(at - start)
        assert block["position_ids"] == expected
        assert block["labels"] == [
            -100 if place == 0 else token for token, place in zip(block["input_ids"], expected, strict=True)
        ]


def test_blocks_are_shuffled_by_the_seed(tmp_path):
    folder = write(tmp_path / "corpus", "jsonl", files=1)
    count = num_blocks_of_an_epoch()
    ordered = [tuple(block["input_ids"]) for block in first(stream(folder, buffer_blocks=1), count)]
    shuffled, again, other = (
        [tuple(block["input_ids"]) for block in first(stream(folder, seed=seed), count - 8)] for seed in (3, 3, 4)
    )
    assert shuffled == again
    assert shuffled != other
    assert shuffled != ordered[:-8]
    assert set(shuffled) <= set(ordered)
    assert len(set(shuffled)) == len(shuffled)


def test_the_next_epoch_follows_without_a_seam(tmp_path):
    folder = write(tmp_path / "corpus", "jsonl", files=1)
    count = num_blocks_of_an_epoch()
    tokens = [token for block in first(stream(folder, buffer_blocks=1), 2 * count) for token in block["input_ids"]]
    line = [token for document in token_lists() for token in document]
    assert tokens == (line + line)[: len(tokens)]


def test_tokens_that_are_there_already(tmp_path):
    documents = open_documents(write(tmp_path / "corpus", "jsonl", files=1))
    tokenizer = tiny_tokenizer()
    ready = documents.map(lambda example: {"ids": tokenizer.encode(example["text"]).ids})
    settings = {"sequence_length": 10, "separator_id": SEPARATOR, "seed": 3}
    found = first(PackedStream(ready, token_column="ids", **settings), 5)
    assert found == first(PackedStream(documents, tokenizer, **settings), 5)
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert found == first(PackedStream(documents, hf, **settings), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "give a tokenizer, or the token_column"),
        ({"token_column": "ids"}, "give a tokenizer, or the token_column"),
        ({"sequence_length": 1}, "sequence_length = 1 must be at least 2"),
        ({"buffer_blocks": 0}, "0 at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    settings = {"documents": None, "tokenizer": tiny_tokenizer(), "sequence_length": 8, **changes}
    with pytest.raises(ValueError, match=message):
        PackedStream(**settings)


def test_a_corpus_shorter_than_a_block_is_an_error_not_a_loop(tmp_path):
    with pytest.raises(ValueError, match="less than one block of 5000"):
        first(stream(write(tmp_path / "corpus", "jsonl"), sequence_length=5000), 1)


# --- in the middle ---


@pytest.mark.parametrize(
    ("kind", "position"), [("parquet", 0), ("jsonl", 1), ("text", 31), ("jsonl", 77), ("parquet", 120)]
)
def test_a_stream_goes_on_where_it_stood(tmp_path, kind, position, monkeypatch):
    """Several epochs long; what was read ahead of the position doesn't count."""
    monkeypatch.setattr(streaming, "BLOCKS_BETWEEN_STATES", 15)
    folder = write(tmp_path / kind, kind)
    whole = stream(folder)
    expected = first(whole, position + 40)[position:]
    reading = stream(folder)
    blocks = iter(reading)
    for _ in range(position + 7):
        next(blocks)
    state = reading.state_dict(position)
    assert position < 40 or state["skip"] < 40, "it read everything again"
    save_stream(state, tmp_path)
    resumed = stream(folder)
    resumed.load_state_dict(load_stream(tmp_path))
    assert first(resumed, 40) == expected
    assert first(resumed, 40) == expected, "and again from there"
    again = iter(resumed)
    for _ in range(22):
        next(again)
    twice = stream(folder)
    twice.load_state_dict(resumed.state_dict(position + 20))
    assert first(twice, 20) == expected[20:]


def test_blocks_that_are_skipped_unseen(tmp_path):
    folder = write(tmp_path / "corpus", "jsonl")
    reading = stream(folder)
    expected = first(reading, 20)
    resumed = stream(folder)
    resumed.load_state_dict(reading.state_dict(12), skipped_again=True)
    found = first(resumed, 20)
    assert all(not any(block["input_ids"]) for block in found[:12])
    assert found[12:] == expected[12:]


def test_another_streams_state_is_refused(tmp_path):
    folder = write(tmp_path / "corpus", "jsonl")
    with pytest.raises(ValueError, match="has seed = 4, the one that was saved 3"):
        stream(folder, seed=4).load_state_dict(stream(folder).state_dict(0))


def test_workers_are_refused(tmp_path):
    loader = torch.utils.data.DataLoader(stream(write(tmp_path / "corpus", "jsonl")), num_workers=1)
    with pytest.raises(ValueError, match="use dataloader_num_workers=0"):
        next(iter(loader))


# --- with the Trainer ---


def run(folder, corpus, *, resume=None, stop_at=None, dropout=0.1, **changes):
    gc.collect()
    model = with_memory(folder, dropout=dropout)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    trainer = EngramTrainer(
        model,
        arguments(folder, **{**settings, **changes}),
        train_dataset=stream(corpus),
        callbacks=[EngramCallback(), *([StopAt(stop_at)] if stop_at else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.filterwarnings("ignore:.*a writer ended between two commits")
@pytest.mark.parametrize("ignore_data_skip", [False, True])
def test_a_run_on_a_stream_resumes_bit_for_bit(tmp_path, monkeypatch, ignore_data_skip):
    monkeypatch.setattr(streaming, "BLOCKS_BETWEEN_STATES", 3)
    corpus = write(tmp_path / "corpus", "jsonl")
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    # Told to skip no data, the Trainer draws other dropout masks.
    dropout = 0.0 if ignore_data_skip else 0.1
    whole = run(tmp_path / "whole", corpus, dropout=dropout)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", corpus, dropout=dropout, stop_at=5)
    reads = []
    tokens = PackedStream._tokens
    monkeypatch.setattr(PackedStream, "_tokens", lambda self, one: reads.append(one) or tokens(self, one))
    resumed = run(tmp_path / "cut", corpus, dropout=dropout, resume=True, ignore_data_skip=ignore_data_skip)
    assert history(resumed) == history(whole)
    assert history(resumed, "grad_norm") == history(whole, "grad_norm")
    assert (table_on_disk(resumed.model) == table_on_disk(whole.model)).all()
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
    assert len(reads) < 60, "what was trained on was read again"
