"""Token files and row counts made by processes and by a Ray cluster: the same, and what counting by hand gives."""

import collections
import json
import os
import pickle

import numpy as np
import pyarrow
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from sense_v2.cli.main import main
from sense_v2.engram.upkeep.hot_rows import RowCounts
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data import preparing, workers
from sense_v2.hf.data.preparing import CountRows, Tokenize, is_held_out, profile_rows, tokenize_corpus
from sense_v2.hf.data.streaming import PackedStream, open_documents
from sense_v2.hf.data.workers import Processes, RayCluster
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.saving.save import save_pretrained

SEPARATOR = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with memory in two layers."""
    folder = tmp_path_factory.mktemp("prepared")
    model = tiny_model("llama")
    config = tiny_config(folder / "made", layer_indices=[1, 2])
    attach_engram(model, config, tiny_tokenizer())
    save_pretrained(model, folder / "model")
    model.engram.storage.close()
    return folder / "model"


@pytest.fixture(scope="module")
def texts():
    words = np.random.default_rng(0)
    return [" ".join(f"word{n}" for n in words.integers(0, 30, words.integers(1, 60))) for _ in range(300)]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    """The texts as JSON lines in three files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in texts[number * 100 : number * 100 + 100]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of a head that does no work and two workers of one core each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield RayCluster()
    ray.shutdown()
    cluster.shutdown()


def tokens_of(texts):
    return [[*tiny_tokenizer().encode(text).ids, SEPARATOR] for text in texts]


def counted_by_hand(folder, texts):
    """(lookups of each row, those of held-out documents), by the model's own layers, a document at a time."""
    model = from_pretrained(folder, mode="r")
    found = collections.Counter(), collections.Counter()
    for ids in tokens_of(texts):
        for layer in model.engram:
            found[is_held_out(np.array(ids))].update(layer.row_ids(torch.tensor([ids])).flatten().tolist())
    model.engram.storage.close()
    return found


def as_dictionary(counts: RowCounts):
    return dict(zip(*(values.tolist() for values in counts.hottest()), strict=True))


def profile(source, folder, workers):
    found = profile_rows(source, folder, tiny_tokenizer(), workers=workers, separator_id=SEPARATOR)
    return as_dictionary(found.trained), as_dictionary(found.held_out)


def test_processes_count_what_counting_by_hand_gives(corpus, folder, texts):
    by_hand = counted_by_hand(folder, texts)
    assert all(by_hand)
    one = profile(corpus, folder, Processes(1))
    assert one == by_hand
    assert profile(corpus, folder, Processes(2)) == one


@pytest.mark.slow
def test_a_ray_cluster_counts_and_writes_the_same(cluster, corpus, folder, texts, tmp_path):
    import ray

    assert sum(node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()) == 2
    assert profile(corpus, folder, cluster) == profile(corpus, folder, Processes(1))
    described = tokenize_corpus(
        corpus, tiny_tokenizer(), tmp_path / "tokens", workers=cluster, separator_id=SEPARATOR
    )
    assert described["documents"] == len(texts)
    assert [document["input_ids"] for document in open_documents(tmp_path / "tokens")] == tokens_of(texts)


@pytest.mark.parametrize("count", [1, 2])
def test_token_files_hold_the_documents_in_their_order(corpus, texts, tmp_path, count):
    output = tmp_path / "tokens"
    described = tokenize_corpus(corpus, tiny_tokenizer(), output, workers=Processes(count), separator_id=SEPARATOR)
    assert [document["input_ids"] for document in open_documents(output)] == tokens_of(texts)
    assert (described["documents"], described["tokens"]) == (len(texts), sum(map(len, tokens_of(texts))))
    assert json.loads((output / "tokens.json").read_text()) == described
    assert len(list(output.glob("*.parquet"))) == count
    stream = PackedStream(open_documents(output), token_column="input_ids", sequence_length=8, buffer_blocks=1)
    flat = [token for ids in tokens_of(texts) for token in ids]
    assert torch.stack([block["input_ids"] for block in stream.take(5)]).flatten().tolist() == flat[:40]


def test_token_files_are_profiled_without_the_texts(corpus, folder, tmp_path):
    tokenize_corpus(corpus, tiny_tokenizer(), tmp_path / "t", workers=Processes(1), separator_id=SEPARATOR)
    assert profile(tmp_path / "t", folder, Processes(2)) == profile(corpus, folder, Processes(1))


def test_tokens_of_another_tokenizer_are_refused(corpus, folder, tmp_path):
    tokenize_corpus(corpus, tiny_tokenizer(90), tmp_path / "t", workers=Processes(1))
    with pytest.raises(ValueError, match="tokens of another tokenizer"):
        profile(tmp_path / "t", folder, Processes(1))


def test_text_files_are_a_document_each(folder, texts, tmp_path):
    for number, text in enumerate(texts[:5]):
        (tmp_path / f"{number}.txt").write_text(text + "\n" if number % 2 else text)
    assert profile(tmp_path, folder, Processes(1)) == counted_by_hand(folder, texts[:5])


def test_a_long_document_is_hashed_in_pieces_that_know_each_other(corpus, folder, monkeypatch):
    whole = profile(corpus, folder, Processes(1))
    monkeypatch.setattr(preparing, "PIECE_TOKENS", 7)
    assert profile(corpus, folder, Processes(1)) == whole


def test_small_batches_and_large_ones_count_the_same(corpus, folder, monkeypatch):
    whole = profile(corpus, folder, Processes(1))
    monkeypatch.setattr(workers, "BATCH_DOCUMENTS", 3)
    assert profile(corpus, folder, Processes(1)) == whole


def test_an_interrupted_tokenization_leaves_nothing(corpus, tmp_path, monkeypatch):
    def fail(self, documents):
        raise RuntimeError("no more")

    monkeypatch.setattr(Tokenize, "__call__", fail)
    with pytest.raises(RuntimeError, match="no more"):
        tokenize_corpus(corpus, tiny_tokenizer(), tmp_path / "tokens", workers=Processes(1))
    assert os.listdir(tmp_path) == []


def test_what_is_there_already_is_kept(corpus, tmp_path):
    (tmp_path / "tokens").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        tokenize_corpus(corpus, tiny_tokenizer(), tmp_path / "tokens", workers=Processes(1))


def test_a_model_without_memory_is_refused_before_any_work(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model with memory"):
        profile(corpus, tmp_path, Processes(1))


def test_no_processes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Processes(0)


def test_the_held_out_share_is_near_a_tenth():
    documents = np.random.default_rng(0).integers(0, 1000, (2000, 20))
    assert 0.07 < np.mean([is_held_out(ids) for ids in documents]) < 0.13


def test_the_work_travels_without_what_it_opened(folder):
    work = CountRows(folder)
    documents = pyarrow.table({"input_ids": [[5, 6, 7, 3]]})
    first = work(documents)
    assert pickle.loads(pickle.dumps(work))(documents).equals(first)
    assert len(pickle.dumps(work)) < 1000


def test_empty_documents_count_nothing(folder):
    documents = pyarrow.table({"input_ids": pyarrow.array([[], []], pyarrow.list_(pyarrow.int32()))})
    assert CountRows(folder)(documents).num_rows == 0


# The command line


def test_the_commands_tokenize_and_profile_with_several_processes(corpus, folder, texts, tmp_path, capsys):
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    assert main(["tokenize", "--corpus", str(corpus), "--tokenizer", str(folder), "--output", str(tmp_path / "t"),
                 "--processes", "2", "--json"]) == 0  # fmt: skip
    described = json.loads(capsys.readouterr().out)
    assert (described["documents"], described["separator_id"]) == (len(texts), None)
    for source in (corpus, tmp_path / "t"):
        assert main(["profile", str(folder), "--corpus", str(source), "--output", str(tmp_path / "hot.npy"),
                     "--processes", "2", "--json"]) == 0  # fmt: skip
        result = json.loads(capsys.readouterr().out)
        found = profile_rows(corpus, folder, tiny_tokenizer(), workers=Processes(1))
        ids, counts = found.trained.hottest()
        assert np.load(tmp_path / "hot.npy").tolist() == np.stack([ids, counts], 1)[: result["rows"]].tolist()
        assert result["tokens"] + result["held_out_tokens"] == described["tokens"]
        assert result["hot_sets"][0]["serves"] > 0


@pytest.mark.slow
def test_both_kinds_of_workers_at_once_are_refused(corpus, folder, tmp_path, capsys):
    assert main(["profile", str(folder), "--corpus", str(corpus), "--processes", "2", "--ray", "auto"]) == 1
    assert "give one of them" in capsys.readouterr().err
