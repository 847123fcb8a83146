"""The corpus: which files, which part, the same ones everywhere; the stream of tokens; the batches."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sense_v2.hf.data.corpus import Batches, Corpus, encode, encode_with_ends, read_corpus, standard_library


def write(folder, files: dict[str, str | bytes]):
    """Writes files in an order of its own, so that nothing depends on the disk's."""
    names = list(files)
    random.Random(len(files)).shuffle(names)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files[name]
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def many(count=60, folder="") -> dict[str, str]:
    return {f"{folder}file{number:03}.txt": f"the text of file {number}\n" * 3 for number in range(count)}


def parts(corpus: Corpus) -> tuple[set[str], set[str]]:
    return set(corpus.train_texts), set(corpus.held_out_texts)


# --- which file is in which part ---


def test_the_split_is_pinned_by_names(tmp_path):
    """Golden: a change of the rule would put held-out text of old runs into new training."""
    corpus = read_corpus([write(tmp_path, many(20))])
    number = {text: int(name[4:7]) for name, text in many(20).items()}
    assert sorted(number[text] for text in corpus.held_out_texts) == [0, 11]
    assert [number[text] for text in corpus.train_texts[:6]] == [17, 12, 14, 19, 6, 10]


def test_no_file_in_both_parts_and_none_lost(tmp_path):
    files = many()
    corpus = read_corpus([write(tmp_path, files)], held_out_fraction=0.3)
    train, held_out = parts(corpus)
    assert train.isdisjoint(held_out)
    assert train | held_out == set(files.values())
    assert len(corpus.train_texts) + len(corpus.held_out_texts) == len(files)
    assert 6 <= len(held_out) <= 30


def test_the_split_is_the_same_wherever_the_folder_lies(tmp_path):
    here = read_corpus([write(tmp_path / "a", many())])
    there = read_corpus([write(tmp_path / "elsewhere" / "b", many())])
    assert (here.train_texts, here.held_out_texts) == (there.train_texts, there.held_out_texts)


def test_a_new_file_moves_no_other(tmp_path):
    before = read_corpus([write(tmp_path, many())])
    write(tmp_path, {"another.txt": "another", "deep/er.txt": "deeper"})
    train, held_out = parts(read_corpus([tmp_path]))
    assert set(before.train_texts) <= train
    assert set(before.held_out_texts) <= held_out


def test_the_content_does_not_decide(tmp_path):
    files = many()
    before = read_corpus([write(tmp_path, files)])
    after = read_corpus([write(tmp_path, {name: text.upper() for name, text in files.items()})])
    assert [text.upper() for text in before.held_out_texts] == after.held_out_texts


def test_the_order_of_the_paths_does_not_matter(tmp_path):
    write(tmp_path, {**many(20, "a/"), **many(20, "b/x"), "one.txt": "one"})
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "one.txt"]
    forth, back = read_corpus(paths), read_corpus(paths[::-1])
    assert (forth.train_texts, forth.held_out_texts) == (back.train_texts, back.held_out_texts)
    assert (forth.name, back.name) == ("a, b, one.txt", "one.txt, b, a")


def test_a_file_that_is_named_twice_counts_once(tmp_path):
    """Below `deep` it has another name, which could put the one file into both parts."""
    files = many(40, "deep/")
    write(tmp_path, files)
    for paths in ([tmp_path, tmp_path / "deep"], [tmp_path / "deep", tmp_path, tmp_path / "deep" / "file001.txt"]):
        corpus = read_corpus(paths, held_out_fraction=0.5)
        assert sorted(corpus.train_texts + corpus.held_out_texts) == sorted(files.values())
        assert parts(corpus) == parts(read_corpus(paths[::-1], held_out_fraction=0.5))


def test_strings_and_folders_below_folders(tmp_path):
    files = {"a.txt": "aaa", "x/b.md": "bbb", "x/y/c": "ccc"}
    corpus = read_corpus([str(write(tmp_path, files))])
    assert set.union(*parts(corpus)) == {"aaa", "bbb", "ccc"}
    assert corpus.name == tmp_path.name


def test_bytes_are_counted_in_utf_8(tmp_path):
    corpus = read_corpus([write(tmp_path, {"a": "é" * 10, "b": "漢" * 10})])
    assert corpus.train_bytes + corpus.held_out_bytes == 50
    assert {corpus.train_bytes, corpus.held_out_bytes} == {20, 30}


def test_the_standard_library_is_a_corpus():
    files = standard_library()
    assert len(files) > 300
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"test", "site-packages"} & set(file.parts[-3:]) for file in files)
    corpus = read_corpus(None, max_bytes=200_000)
    assert corpus.name == "Python standard library"
    assert corpus.train_texts
    assert corpus.held_out_texts


# --- extremes of the fraction ---


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_leaves_a_part_empty_is_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=r"held_out_fraction = .*: must be above 0 and below 1"):
        read_corpus([write(tmp_path, many(3))], held_out_fraction=fraction)


@pytest.mark.parametrize("count", [2, 3, 60])
def test_both_parts_have_a_file_at_the_least_and_the_largest_fraction(tmp_path, count):
    write(tmp_path, many(count))
    least = read_corpus([tmp_path], held_out_fraction=1e-12)
    largest = read_corpus([tmp_path], held_out_fraction=1 - 1e-12)
    assert len(least.held_out_texts) == len(largest.train_texts) == 1
    assert len(least.train_texts) == len(largest.held_out_texts) == count - 1


def test_a_larger_fraction_holds_out_more_of_the_same(tmp_path):
    write(tmp_path, many())
    before: set[str] = set()
    for fraction in (1e-9, 0.1, 0.3, 0.6, 0.9):
        held_out = parts(read_corpus([tmp_path], held_out_fraction=fraction))[1]
        assert before <= held_out
        before = held_out
    assert len(before) > 40


def test_files_of_one_name_still_make_two_parts(tmp_path):
    write(tmp_path, {f"{folder}/README": f"text of {folder}" for folder in "abcd"})
    corpus = read_corpus([tmp_path / folder for folder in "abcd"])
    assert len(corpus.held_out_texts) == 1
    assert len(corpus.train_texts) == 3


# --- one file ---


def test_the_end_of_a_single_file_is_held_out_at_a_lines_border(tmp_path):
    text = "".join(f"line {number}\n" for number in range(200))
    corpus = read_corpus([write(tmp_path, {"only.txt": text}) / "only.txt"], held_out_fraction=0.2)
    (train,), (held_out,) = corpus.train_texts, corpus.held_out_texts
    assert train + held_out == text
    assert train.endswith("\n")
    assert held_out.startswith("line")
    assert 0.18 < len(held_out) / len(text) < 0.22
    assert corpus.line() == "only.txt, one file, the end of it held out"
    in_a_folder = read_corpus([tmp_path], held_out_fraction=0.2)
    assert in_a_folder.held_out_texts == [held_out]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("a b c d e f g h i ", "jj"),  # no border: at the character
        ("x" * 94 + "\n", "y" * 5),  # the nearest border comes after the wanted place
        ("x" * 85 + "\n", "y" * 14),  # it comes before
        ("x" * 88 + "\n", "yyy\n" + "z" * 7),  # one on each side: the nearer one
        ("x" * 90, "x" * 9 + "\n"),  # the last border would leave nothing to hold out
        ("a\n" + "x" * 88, "x" * 10),  # the only border is far away
        ("x", "y"),
    ],
)
def test_where_a_single_file_is_cut(tmp_path, train, held_out):
    (tmp_path / "only.txt").write_text(train + held_out)
    corpus = read_corpus([tmp_path])
    assert (corpus.train_texts, corpus.held_out_texts) == ([train], [held_out])


@pytest.mark.parametrize("text", ["a", "word" + "\n" * 50])
def test_a_file_with_nothing_to_hold_out(tmp_path, text):
    write(tmp_path, {"only.txt": text})
    with pytest.raises(ValueError, match=rf"one file of {len(text)} characters.*Add text"):
        read_corpus([tmp_path])


# --- what is left out ---


def test_hidden_files_and_caches_are_left_out_without_a_warning(tmp_path):
    write(
        tmp_path / ".hidden root",
        {
            "a.txt": "aaa",
            "b.txt": "bbb",
            ".secret": "no",
            ".git/config": "no",
            "x/.cache/y": "no",
            "x/__pycache__/m.pyc": b"\0\1",
            "x/c.txt": "ccc",
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = read_corpus([tmp_path / ".hidden root"])  # a folder that is named is read, whatever its name
    assert set.union(*parts(corpus)) == {"aaa", "bbb", "ccc"}
    assert corpus.files_left_out == 0


def test_what_is_no_text_is_left_out_with_one_warning(tmp_path):
    binary = {
        "latin.txt": "café".encode("latin-1"),
        "utf16.txt": "text".encode("utf-16"),
        "control.bin": bytes([1, 2, 3, 65]),
        "late.txt": b"x" * 100_000 + b"\xff",
        "nul.txt": b"x" * 1_000 + b"\0",
    }
    write(tmp_path, {**many(5), **binary})
    with pytest.warns(UserWarning, match="left out") as warned:
        corpus = read_corpus([tmp_path])
    (message,) = [str(one.message) for one in warned]
    assert message.startswith("5 of 10 files are not UTF-8 text and are left out, ")
    assert any(f"{tmp_path / name} first" in message for name in binary)
    assert warned[0].filename == __file__
    assert corpus.files_left_out == 5
    assert set.union(*parts(corpus)) == set(many(5).values())


def test_text_with_tabs_form_feeds_and_escapes_is_text(tmp_path):
    files = {"a": "\ta\fb\r\n" * 9, "b": "\x1b[1mbold\x1b[0m and a good deal of text around it that isn't\n"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set.union(*parts(read_corpus([write(tmp_path, files)]))) == set(files.values())


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path, {"a": b"\xef\xbb\xbffirst", "b": "second"})
    assert set.union(*parts(read_corpus([tmp_path]))) == {"first", "second"}


def test_a_name_that_is_not_utf_8(tmp_path):
    write(tmp_path, many(3))
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt"), "wb") as file:
        file.write(b"strange name")
    assert "strange name" in set.union(*parts(read_corpus([tmp_path])))


def test_a_pipe_is_not_waited_for(tmp_path):
    write(tmp_path, many(3))
    os.mkfifo(tmp_path / "pipe")
    assert len(set.union(*parts(read_corpus([tmp_path])))) == 3


# --- links ---


def test_links_in_a_circle_do_not_hang(tmp_path):
    files = {"a/one.txt": "one", "b/two.txt": "two", "three.txt": "three"}
    write(tmp_path, files)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "across").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "across").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    corpus = read_corpus([tmp_path], held_out_fraction=0.5)
    assert sorted(corpus.train_texts + corpus.held_out_texts) == sorted(files.values())


def test_a_link_moves_no_file_to_the_other_part(tmp_path):
    files = many(40, "real/")
    before = read_corpus([write(tmp_path, files)], held_out_fraction=0.5)
    (tmp_path / "zlinked").symlink_to("real")
    for number in range(40):
        (tmp_path / f"zlink{number}").symlink_to(f"real/file{number:03}.txt")
    after = read_corpus([tmp_path], held_out_fraction=0.5)
    assert (before.train_texts, before.held_out_texts) == (after.train_texts, after.held_out_texts)


def test_linked_folders_are_read(tmp_path):
    write(tmp_path / "far", many(5))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "far")
    assert len(set.union(*parts(read_corpus([tmp_path / "corpus"])))) == 5
    assert len(set.union(*parts(read_corpus([tmp_path / "corpus" / "link"])))) == 5


# --- max_bytes ---


def test_max_bytes_takes_a_prefix_of_one_order(tmp_path):
    write(tmp_path, many())
    everything = read_corpus([tmp_path])
    total = everything.train_bytes + everything.held_out_bytes
    for limit in (1_000, 2_000, total, 10 * total):
        corpus = read_corpus([tmp_path], max_bytes=limit)
        again = read_corpus([tmp_path], max_bytes=limit)
        assert (corpus.train_texts, corpus.held_out_texts) == (again.train_texts, again.held_out_texts)
        assert corpus.train_bytes + corpus.held_out_bytes == min(limit, total)
        # All but the one file that was cut.
        assert len(set(corpus.train_texts) - set(everything.train_texts)) <= 1
        assert len(set(corpus.held_out_texts) - set(everything.held_out_texts)) <= 1
    assert (corpus.train_texts, corpus.held_out_texts) == (everything.train_texts, everything.held_out_texts)


def test_one_large_file_is_read_no_further(tmp_path):
    text = "".join(f"line {number}\n" for number in range(50_000))
    write(tmp_path, {"large.txt": text})
    corpus = read_corpus([tmp_path], max_bytes=5_000)
    assert corpus.train_texts[0] + corpus.held_out_texts[0] == text[:5_000]


def test_a_cut_through_a_character_leaves_it_away(tmp_path):
    write(tmp_path, {"large.txt": "漢字\n" * 100})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = read_corpus([tmp_path], max_bytes=71)  # ten lines of 7 bytes, and a third of a character
    assert corpus.train_texts[0] + corpus.held_out_texts[0] == "漢字\n" * 10


def test_what_is_no_text_uses_up_no_bytes(tmp_path):
    write(tmp_path, {**many(3), **{f"binary{number}": b"\0" * 10_000 for number in range(30)}})
    with pytest.warns(UserWarning, match="30 of 33 files"):
        corpus = read_corpus([tmp_path], max_bytes=5_000)
    assert len(set.union(*parts(corpus))) == 3


def test_files_that_were_not_read_are_not_counted(tmp_path):
    write(tmp_path, {**many(30), **{f"binary{number}": b"\0" for number in range(30)}})
    with pytest.warns(UserWarning, match="left out") as warned:
        corpus = read_corpus([tmp_path], max_bytes=600)
    num_binary, num_read = (int(word) for word in str(warned[0].message).split()[:3:2])
    assert num_read < 60
    assert num_binary == num_read - len(corpus.train_texts) - len(corpus.held_out_texts) == corpus.files_left_out


def test_max_bytes_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_bytes = 0: must be at least 1"):
        read_corpus([write(tmp_path, many(3))], max_bytes=0)


# --- errors ---


def test_a_path_that_is_not_there(tmp_path):
    write(tmp_path, many(3))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/gone: no such file or folder"):
        read_corpus([tmp_path, tmp_path / "gone"])


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "0 files, 0 not UTF-8 text, 0 empty"),
        ({"a": "", "b": " \n\t"}, "2 files, 0 not UTF-8 text, 2 empty"),
        ({"a": b"\xff", "b": ""}, "2 files, 1 not UTF-8 text, 1 empty"),
        ({".hidden": "text"}, "0 files, 0 not UTF-8 text, 0 empty"),
    ],
)
def test_a_corpus_without_text_says_what_there_was(tmp_path, files, found):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(ValueError, match=rf"the corpus corpus has no text: {found}\. Name files"):
        read_corpus([write(tmp_path / "corpus", files)])


def test_no_paths_at_all():
    with pytest.raises(ValueError, match="has no text: 0 files"):
        read_corpus([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    write(tmp_path, many(3, "closed/"))
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(PermissionError, match="closed"):
            read_corpus([tmp_path])
    finally:
        (tmp_path / "closed").chmod(0o700)


# --- tokens ---

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> Tokenizer:
    """A token a byte from 1 on; 0 ends a text. Adds [CLS] and [SEP] where it may."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0, **{char: number for number, char in enumerate(alphabet, 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 257), ("[SEP]", 258)]
    )
    return tokenizer


KINDS = {
    "tokenizers": lambda tokenizer: tokenizer,
    "transformers": lambda tokenizer: PreTrainedTokenizerFast(tokenizer_object=tokenizer),
}


@pytest.fixture(params=list(KINDS))
def tokenizer(request):
    return KINDS[request.param](byte_tokenizer())


def text_of(token_ids) -> str:
    return byte_tokenizer().decode(list(token_ids), skip_special_tokens=False)


@pytest.mark.parametrize("batch", [1, 2, 256])
def test_a_separator_ends_every_text(tokenizer, batch):
    stream = encode(["one", "", "twö", "漢"], tokenizer, separator_id=0, batch=batch)
    assert stream.dtype == np.int32
    assert text_of(stream) == f"one{END_OF_TEXT}{END_OF_TEXT}twö{END_OF_TEXT}漢{END_OF_TEXT}"
    assert (stream == 0).sum() == 4


def test_no_separator_and_no_other_token_added(tokenizer):
    stream = encode(["one", "two"], tokenizer, separator_id=None)
    assert len(stream) == 6
    assert text_of(stream) == "onetwo"


def test_a_special_tokens_spelling_in_a_text_is_that_token(tokenizer):
    stream = encode([f"a{END_OF_TEXT}b", END_OF_TEXT], tokenizer, separator_id=0)
    assert (stream == 0).tolist() == [False, True, False, True, True, True]


@pytest.mark.parametrize("batch", [1, 256])
def test_ends_count_characters_and_a_separator_is_one(tokenizer, batch):
    texts = ["one", "", "twö", "漢"]
    stream, ends = encode_with_ends(texts, tokenizer, separator_id=0, batch=batch)
    assert stream.tolist() == encode(texts, tokenizer, separator_id=0).tolist()
    # The parts of a character end where it does.
    assert ends.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 10, 10, 11]
    assert encode_with_ends(texts, tokenizer, separator_id=None)[1].tolist() == [1, 2, 3, 6, 7, 8, 8, 10, 10, 10]
    assert [len(part) for part in encode_with_ends([], tokenizer, separator_id=0)] == [0, 0]


def test_a_tokenizer_without_offsets_has_no_ends():
    with pytest.raises(ValueError, match="object doesn't say which characters a token spans"):
        encode_with_ends(["one"], object(), separator_id=None)


def test_no_texts(tokenizer):
    stream = encode([], tokenizer, separator_id=0)
    assert stream.dtype == np.int32
    assert len(stream) == 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_tokenizer_that_truncates_and_pads_gives_whole_texts(kind):
    raw = byte_tokenizer()
    raw.enable_truncation(4, stride=1)
    raw.enable_padding(length=8, pad_id=257, pad_token="[CLS]")
    settings = raw.truncation, raw.padding
    stream = encode(["a long text", "b"], KINDS[kind](raw), separator_id=0)
    assert text_of(stream) == f"a long text{END_OF_TEXT}b{END_OF_TEXT}"
    if kind == "tokenizers":
        assert (raw.truncation, raw.padding) == settings


# --- batches ---


def stream(blocks=10, length=4, rest=3) -> np.ndarray:
    """Token k of block b is b × 100 + k."""
    ids = (np.arange(blocks)[:, None] * 100 + np.arange(length)).reshape(-1)
    return np.concatenate([ids, np.full(rest, 9_999)]).astype(np.int32)


def taken(batches: Batches, count: int) -> list[list[int]]:
    """The blocks' numbers of the first `count` batches."""
    found = []
    for token_ids_BT, _ in zip(batches, range(count), strict=False):
        assert token_ids_BT.dtype == torch.int64
        assert token_ids_BT.shape == (batches.batch_size, 4)
        assert (token_ids_BT - token_ids_BT[:, :1] == torch.arange(4)).all()
        found.append((token_ids_BT[:, 0] // 100).tolist())
    return found


def make_batches(batch_size=2, seed=0, **shape) -> Batches:
    return Batches(stream(**shape), batch_size=batch_size, sequence_length=4, seed=seed)


def test_the_same_seed_gives_the_same_order():
    assert taken(make_batches(), 30) == taken(make_batches(), 30)
    assert taken(make_batches(), 5) != taken(make_batches(seed=1), 5)
    batches = make_batches()
    assert taken(batches, 7) == taken(batches, 7)  # each iteration begins anew


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 10])
def test_every_block_comes_once_an_epoch(batch_size):
    order = [number for batch in taken(make_batches(batch_size), 90) for number in batch]
    epochs = [order[start : start + 10] for start in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != list(range(10))


def test_a_batch_larger_than_the_stream():
    (first, second) = taken(make_batches(batch_size=25), 2)
    assert sorted((first + second)[:50]) == sorted(list(range(10)) * 5)


def test_a_stream_of_one_block():
    assert taken(make_batches(blocks=1), 3) == [[0, 0]] * 3


@pytest.mark.parametrize("length", [0, 3])
def test_a_stream_without_a_block_is_an_error(length):
    with pytest.raises(ValueError, match=rf"the text has {length} tokens, less than one sequence of 4.*shorter"):
        Batches(np.zeros(length, dtype=np.int32), batch_size=2, sequence_length=4, seed=0)


def test_a_sample_is_stable_and_spread():
    batches = make_batches(blocks=1000)
    sample = batches.sample(5)
    assert sample.dtype == torch.int64
    assert (sample[:, 0] // 100).tolist() == [0, 249, 499, 749, 999]
    taken(batches, 3)
    assert torch.equal(batches.sample(5), sample)
    assert torch.equal(make_batches(batch_size=9, seed=3, blocks=1000).sample(5), sample)


@pytest.mark.parametrize("count", [10, 11, 10_000])
def test_a_sample_of_more_than_there_is_gives_each_block_once(count):
    assert (make_batches().sample(count)[:, 0] // 100).tolist() == list(range(10))


def test_batches_do_not_alias_the_stream():
    source = stream()
    batches = Batches(source, batch_size=2, sequence_length=4, seed=0)
    next(iter(batches)).fill_(-1)
    batches.sample(3).fill_(-1)
    assert np.array_equal(source, stream())
