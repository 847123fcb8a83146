"""A memory for another tokenizer: each row against the n-gram of the text that it belongs to."""

import json
import warnings

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from sense_v2.core.config import EngramConfig
from sense_v2.engram.model import open_table
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.data.preparing import memory_hashers
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import memory_of
from sense_v2.hf.saving.change_tokenizer import change_tokenizer
from sense_v2.hf.saving.convert_model import convert_trained
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.fresh_model import train_bpe

TEXTS = [
    "The cat sat on the mat, and the catalogue sat on the cat.\n" * 3,
    "naïve cafés — the théâtre 日本 sat; THE mat is a matter of Fact 😀 and the café\n" * 3,
    "def category(mat):\n    return the(cat)\n" * 3,
]


@pytest.fixture
def old_tokenizer():
    return train_bpe(TEXTS, vocabulary=330)


@pytest.fixture
def new_tokenizer():
    return train_bpe(TEXTS[:2], vocabulary=400)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXTS * 4):
        (tmp_path / "corpus" / f"file{number}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


def save_model(folder, tokenizer, **changes):
    """A model with memory in two layers, and its fusion awake."""
    config = tiny_config(folder.parent, layer_indices=[0, 2], table_size=4_000, **changes)
    model = attach_engram(tiny_model("llama", vocabulary=tokenizer.get_vocab_size()), config, tokenizer)
    storage = memory_of(model).storage
    with torch.no_grad():
        for layer in memory_of(model):
            layer.W_v.weight.normal_()
    storage.write(torch.arange(storage.num_embeddings), storage.weight * 50)
    storage.flush()
    save_pretrained(model, folder, tokenizer=tokenizer)
    memory_of(model).storage.close()
    return folder


@pytest.fixture
def folder(tmp_path, old_tokenizer):
    return save_model(tmp_path / "old", old_tokenizer)


def opened(folder):
    memory = folder / "engram"
    config = EngramConfig.load(memory / "config.json")
    config.storage_path, config.shadow_map_path = str(memory / "engram_table.dat"), str(memory / "shadow_map.npy")
    shadow_map = EngramTokenizer(config.shadow_map_path)
    return open_table(config, shadow_map, mode="r"), shadow_map, memory_hashers(config, shadow_map)


def spans_of(tokenizer, text):
    """(token ids, for each the bytes of the text that it spans): from the tokens themselves, which are bytes."""
    of = {character: byte for byte, character in byte_characters().items()}
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans, at = [], 0
    for token in encoding.tokens:
        spans.append((at, at + len([of[character] for character in token])))
        at = spans[-1][1]
    assert at == len(text.encode())
    return encoding.ids, spans


def byte_characters():
    """GPT-2's printable character of each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + place) for place, byte in enumerate(rest)}}


def is_text(text, span):
    try:
        text.encode()[span[0] : span[1]].decode()
    except UnicodeDecodeError:
        return False
    return True


def test_rows_follow_the_text(tmp_path, folder, corpus, old_tokenizer, new_tokenizer):
    before = (folder / "engram" / "engram_table.dat").read_bytes()
    done = change_tokenizer(folder, tmp_path / "new", new_tokenizer, corpus=[corpus])
    assert (folder / "engram" / "engram_table.dat").read_bytes() == before

    old_table, old_map, old_hashers = opened(folder)
    new_table, new_map, new_hashers = opened(tmp_path / "new")
    old_rows_of = {}  # new row -> the old rows of the n-grams that have it
    for text in TEXTS:
        (new_ids, new_spans), (old_ids, old_spans) = (spans_of(of, text) for of in (new_tokenizer, old_tokenizer))
        place_of = {span: place for place, span in enumerate(old_spans)}
        new_BT, old_BT = new_map(torch.tensor([new_ids])), old_map(torch.tensor([old_ids]))
        for new_hasher, old_hasher in zip(new_hashers, old_hashers, strict=True):
            new_rows, old_rows = new_hasher(new_BT)[0].tolist(), old_hasher(old_BT)[0].tolist()
            for place in range(3, len(new_ids)):
                for order, heads in ((2, (0, 1)), (3, (2, 3))):
                    mine = new_spans[place - order + 1 : place + 1]
                    other = place_of.get(mine[-1], -1)
                    if other < order or old_spans[other - order + 1 : other + 1] != mine:
                        continue
                    if all(is_text(text, span) for span in mine):
                        for head in heads:
                            old_rows_of.setdefault(new_rows[place][head], set()).add(old_rows[other][head])
    assert len(old_rows_of) > 100
    assert sum(len(rows) > 1 for rows in old_rows_of.values()) < len(old_rows_of) / 2
    for row, candidates in old_rows_of.items():
        assert (old_table(torch.tensor(sorted(candidates))) == new_table(torch.tensor([row]))).all(dim=1).any()
    assert [one.order for one in done.ngrams] == [2, 3]
    assert all(0 < len(one.counts_U) < one.num_ngrams for one in done.ngrams)
    assert 0.3 < done.ngrams[0].share_of_positions < 1
    assert done.ngrams[0].share_of_positions >= done.ngrams[1].share_of_positions


def test_rows_that_nothing_claims_start_as_a_new_tables(tmp_path, folder, corpus, new_tokenizer):
    done = change_tokenizer(folder, tmp_path / "new", new_tokenizer, corpus=[corpus])
    carried, _, _ = opened(tmp_path / "new")
    fresh = tiny_config(tmp_path / "fresh", layer_indices=[0, 2], table_size=4_000)
    (tmp_path / "fresh").mkdir()
    table = open_table(fresh, EngramTokenizer(tmp_path / "new" / "engram" / "shadow_map.npy"))
    differs_N = (carried.weight != table.weight).any(dim=1)
    assert int(differs_N.sum()) == done.carried_rows < done.rows == len(differs_N)
    assert carried.manifest.provenance == table.manifest.provenance


def test_the_memory_attaches_to_a_model_with_that_tokenizer(tmp_path, folder, corpus, new_tokenizer):
    change_tokenizer(folder, tmp_path / "new", new_tokenizer, corpus=[corpus])
    with pytest.raises(FileNotFoundError, match="pass that model as backbone="):
        from_pretrained(tmp_path / "new")
    backbone = tiny_model("llama", vocabulary=new_tokenizer.get_vocab_size())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = from_pretrained(tmp_path / "new", backbone=backbone, tokenizer=new_tokenizer, mode="r+")
    assert ["trained on another backbone: weights was" in str(one.message) for one in caught] == [True]
    old = from_pretrained(folder)
    new_state, old_state = memory_of(model).layers.state_dict(), memory_of(old).layers.state_dict()
    assert all(torch.equal(value, old_state[name]) for name, value in new_state.items())
    ids = torch.tensor([new_tokenizer.encode("the cat sat on the mat").ids])
    model.train()(ids, labels=ids).loss.backward()
    assert len(memory_of(model).storage.gradients()[0]) > 0
    save_pretrained(model.eval(), tmp_path / "new", tokenizer=new_tokenizer)
    assert torch.equal(from_pretrained(tmp_path / "new")(ids).logits, model(ids).logits)
    memory_of(model).storage.close()
    change_tokenizer(folder, tmp_path / "other", new_tokenizer, corpus=[corpus])
    wider = tiny_model("llama", vocabulary=new_tokenizer.get_vocab_size(), hidden=64)
    with pytest.raises(ValueError, match="hidden_size was 32, is 64"):
        from_pretrained(tmp_path / "other", backbone=wider)


def test_there_and_back(tmp_path, folder, corpus, old_tokenizer, new_tokenizer):
    """What comes back to the first tokenizer is in the rows that it was in, unless it shared one on the way."""
    change_tokenizer(folder, tmp_path / "new", new_tokenizer, corpus=[corpus])
    done = change_tokenizer(tmp_path / "new", tmp_path / "back", old_tokenizer, corpus=[corpus])
    first, back = opened(folder)[0].weight, opened(tmp_path / "back")[0].weight
    assert 0.5 < int((first == back).all(dim=1).sum()) / done.carried_rows <= 1


def test_rows_of_int8_become_another_type(tmp_path, folder, corpus, new_tokenizer):
    convert_trained(folder, tmp_path / "int8", "int8")
    with pytest.raises(ValueError, match="rows of int8 can't be written to one by one"):
        change_tokenizer(tmp_path / "int8", tmp_path / "new", new_tokenizer, corpus=[corpus])
    done = change_tokenizer(tmp_path / "int8", tmp_path / "new", new_tokenizer, corpus=[corpus], dtype="float32")
    whole = change_tokenizer(folder, tmp_path / "whole", new_tokenizer, corpus=[corpus])
    assert (done.dtype, done.carried_rows) == ("float32", whole.carried_rows)
    assert torch.allclose(opened(tmp_path / "new")[0].weight, opened(tmp_path / "whole")[0].weight, atol=0.05)


def test_what_cannot_be_carried_over(tmp_path, folder, corpus, old_tokenizer, new_tokenizer):
    new = tmp_path / "new"
    with pytest.raises(ValueError, match=r"has the shadow map that .* has already"):
        change_tokenizer(folder, new, old_tokenizer, corpus=[corpus])
    with pytest.raises(ValueError, match="without a corpus no n-grams are known"):
        change_tokenizer(folder, new, new_tokenizer, corpus=[])
    with pytest.raises(FileNotFoundError, match="a table alone doesn't know how its tokenizer cuts text"):
        change_tokenizer(folder / "engram" / "engram_table.dat", new, new_tokenizer, corpus=[corpus])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text.txt").write_text("ééé" * 50)
    with pytest.raises(ValueError, match=r"cut nothing of the corpus .* alike"):
        change_tokenizer(folder, new, tiny_tokenizer(), corpus=[tmp_path / "elsewhere"])
    (folder / "engram" / "overlay.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="was saved with an overlay, whose rows would be left behind"):
        change_tokenizer(folder, new, new_tokenizer, corpus=[corpus])
    (folder / "engram" / "overlay.safetensors").unlink()
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]
    new.mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        change_tokenizer(folder, new, new_tokenizer, corpus=[corpus])
    assert not [*tmp_path.glob(".new*")]


def test_a_variant_without_a_map(tmp_path, folder, corpus, new_tokenizer):
    path = folder / "engram" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "variant": "qwen_ple"}))
    with pytest.raises(ValueError, match="takes token ids as they are, without a shadow map"):
        change_tokenizer(folder, tmp_path / "new", new_tokenizer, corpus=[corpus])
