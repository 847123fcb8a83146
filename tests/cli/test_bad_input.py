"""What a person sees when something is wrong: two lines that name it and the way out, and files as they were."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers.utils import logging

from sense_v2.cli import main, train
from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.training import run

ROOT = Path(__file__).parents[2]
SMALL = ("--batch-size", 2, "--sequence-length", 32, "--table-size", 2000, "--steps", 2)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What `main` asks of libraries that aren't loaded yet, for those that are."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def refused(capfd):
    """refused("eval", …) -> (what is wrong, the way out), after checking that there are these two lines alone."""

    def call(*arguments):
        capfd.readouterr()
        status = main.main([str(argument) for argument in arguments])
        out, error = capfd.readouterr()
        return two_lines(status, out, error)

    return call


def two_lines(status, out, error):
    assert status == 1, error
    # What a run says before it finds the error may stand on stdout; numbers may not.
    assert "saved" not in out
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2, error
    what, way_out = lines
    assert what.startswith("error: ")
    assert way_out.startswith(" help: ")
    assert len(way_out) > len(" help: ") + 10
    return what.removeprefix("error: "), way_out.removeprefix(" help: ")


def tree(folder):
    """Every file's bytes, and the folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@contextlib.contextmanager
def unchanged(folder):
    before = tree(folder)
    yield
    assert tree(folder) == before


@contextlib.contextmanager
def full_disk(num_bytes):
    """No file can grow past `num_bytes`: what the system then says is that of a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tokenizer_file(path, *tokens):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(path))
    return path


def shadow_map(path, *tokens):
    EngramTokenizerBuilder(str(tokenizer_file(path.with_suffix(".tokens"), *tokens))).build_mapping(path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "corpus"
    folder.mkdir()
    for number in range(8):
        lines = [f"def function_{number}_{line}(value):\n    return value + {line}\n" for line in range(60)]
        (folder / f"module_{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def original(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "original"
    config = Config(run.default_config(None).engram, TrainConfig(steps=2, eval_sequences=2))
    config.engram.table_size, config.train.batch_size, config.train.sequence_length = 2000, 2, 32
    train.run_train(config, corpus=[corpus], output=folder, echo=lambda line: None)
    return folder


@pytest.fixture
def trained(original, tmp_path):
    """A trained model that a test may damage."""
    folder = tmp_path / "trained"
    shutil.copytree(original, folder)
    return folder


# A trained folder that isn't whole


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, num_bytes=1000):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def widen(folder):
    edit_json(folder / "engram/config.json", engram_dim=512)


DAMAGES = {
    "no table": (
        lambda folder: (folder / "engram/engram_table.dat").unlink(),
        ["engram_table.dat", "missing"],
        "copy it back",
    ),
    "truncated table": (
        lambda folder: cut(folder / "engram/engram_table.dat"),
        ["engram_table.dat", "expected 512000 bytes (2000 rows × 64 float32), found 511000"],
        "--help",
    ),
    "table of another width": (widen, ["engram_table.json", "width is 64, asked for 128"], "Open it with"),
    "another number of rows": (
        lambda folder: edit_json(folder / "engram/config.json", table_size=3000),
        ["rows is 2000, asked for 3000"],
        "Open it with",
    ),
    "a setting that isn't one": (
        lambda folder: edit_json(folder / "engram/config.json", table_sise=3000),
        ["engram/config.json", "no field 'table_sise'"],
        "did you mean 'table_size'?",
    ),
    "no shadow map": (
        lambda folder: (folder / "engram/shadow_map.npy").unlink(),
        ["shadow_map.npy"],
        "sense-engram setup",
    ),
    "truncated shadow map": (
        lambda folder: cut(folder / "engram/shadow_map.npy", 8),
        ["shadow_map.npy is not a whole .npy file"],
        "build the map again",
    ),
    "no fusion weights": (
        lambda folder: (folder / "engram/fusion.safetensors").unlink(),
        ["fusion.safetensors", "missing"],
        "copy them back",
    ),
    "truncated fusion weights": (
        lambda folder: cut(folder / "engram/fusion.safetensors"),
        ["trained", "can't be loaded", "SafetensorError"],
        "copy its files again",
    ),
    "truncated weights": (
        lambda folder: cut(folder / "model.safetensors"),
        ["trained", "can't be loaded"],
        "copy its files again",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"], "--help"),
    "no model": (lambda folder: (folder / "config.json").unlink(), ["no model there"], "`sense-engram train`"),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ["tokenizer.json", "missing"],
        "copy it back",
    ),
    "a tokenizer that isn't one": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ["trained", "can't be loaded"],
        "copy its files again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_trained_folder_that_is_not_whole(refused, trained, corpus, damage):
    inflict, evidence, remedy = DAMAGES[damage]
    inflict(trained)
    with unchanged(trained):
        for command in (("eval", trained, "--corpus", corpus), ("generate", trained, "def")):
            what, way_out = refused(*command)
            for part in evidence:
                assert part in what
            assert remedy in way_out


def test_no_folder_at_all(refused, tmp_path):
    what, way_out = refused("eval", tmp_path / "nowhere")
    assert "nowhere: no model there" in what
    assert "`sense-engram train`" in way_out
    assert list(tmp_path.iterdir()) == []


# A shadow map of another tokenizer


def test_a_saved_memory_with_the_map_of_another_tokenizer(refused, trained, corpus):
    """Of the same number of tokens and compressed ids, so that nothing but the content differs."""
    path = trained / "engram/shadow_map.npy"
    map_V = np.load(path)
    other = np.where(map_V == 5, 6, np.where(map_V == 6, 5, map_V))
    np.save(path, other)
    with unchanged(trained):
        what, way_out = refused("eval", trained, "--corpus", corpus)
    assert "sha256" in what
    assert "build the map again" in way_out
    path.with_suffix(".json").unlink()  # nothing beside the map says what it ought to be: then the table does
    with unchanged(trained):
        what, way_out = refused("eval", trained, "--corpus", corpus)
    assert "engram_table.json describes another table: shadow_map_sha256 is" in what
    assert "Open it with the configuration it was made with" in way_out


def test_a_table_made_with_the_map_of_another_tokenizer(refused, tmp_path):
    maps = [shadow_map(tmp_path / name, *tokens) for name, tokens in (("a.npy", "aAb"), ("b.npy", "abB"))]
    arguments = ("--storage-path", tmp_path / "t.dat", "--table-size", 2000, "--engram-dim", 32, "--num-heads", 2)
    assert main.main(["create", "--shadow-map", *map(str, (maps[0], *arguments))]) == 0
    with unchanged(tmp_path):
        what, way_out = refused("create", "--shadow-map", maps[1], *arguments)
    assert "t.json describes another table: shadow_map_sha256 is" in what
    assert "choose another path" in way_out


def test_a_memory_of_another_model(trained, tmp_path):
    """In the library: the map covers other token ids than the model embeds."""
    model = detach_engram(from_pretrained(trained))
    large = shadow_map(tmp_path / "large.npy", *(f"word{number}" for number in range(9000)))
    config = EngramConfig(storage_path=str(tmp_path / "t.dat"), shadow_map_path=str(large), layer_indices=[1])
    message = r"large\.npy covers 9000 token ids, the model embeds \d+: .*sense-engram setup"
    with unchanged(tmp_path), pytest.raises(ValueError, match=message):
        attach_engram(model, config)


@pytest.mark.parametrize(("token_id", "reason"), [(-100, "labels .* are no token ids"), (10**6, "another tokenizer")])
def test_token_ids_that_the_model_does_not_have(trained, token_id, reason):
    model = from_pretrained(trained)
    with unchanged(trained), torch.no_grad():
        with pytest.raises(
            IndexError, match=rf"token id {token_id} at position \(0, 1\) .*shadow_map\.npy.*{reason}"
        ):
            model(input_ids=torch.tensor([[1, token_id, 2]]))
        assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()


# A corpus that can't be used


def corpora(folder):
    folder.mkdir()
    for name, raw in {
        "empty.txt": b"",
        "blank.txt": b" \n \n",
        "binary.txt": bytes(range(256)) * 40,
        "latin1.txt": "é".encode("latin-1") * 400,
        "short.txt": b"def main():\n    pass\n",
    }.items():
        (folder / name).write_bytes(raw)
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "evidence"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("nothing", "the corpus nothing has no text: 0 files"),
        ("empty.txt", "the corpus empty.txt has no text: 1 file, 0 not UTF-8 text, 1 empty"),
        ("blank.txt", "the corpus blank.txt has no text"),
        ("binary.txt", "the corpus binary.txt has no text: 1 file, 1 not UTF-8 text"),
        ("latin1.txt", "the corpus latin1.txt has no text: 1 file, 1 not UTF-8 text"),
        ("short.txt", "less than one sequence of 32"),
    ],
)
def test_a_corpus_that_is_no_text(refused, trained, tmp_path, name, evidence):
    path = corpora(tmp_path / "text") / name
    with unchanged(tmp_path):
        assert evidence in refused("train", "--corpus", path, "--output", tmp_path / "run", *SMALL)[0]
        assert evidence in refused("eval", trained, "--corpus", path)[0]
        if name != "short.txt":  # the demo has sequences of another length
            assert evidence in refused("demo", "--corpus", path, "--output", tmp_path / "demo" / "run")[0]


# Settings that don't fit


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("train: {stps: 3}", "TrainConfig has no field 'stps'"),
        ("engram: {table_size: many}", "EngramConfig.table_size = 'many': must be of type int"),
        ("engram: [1", "not valid YAML"),
        ("engram: {layer_indices: [7]}", "layer_indices holds 7, but this LlamaForCausalLM has 2 layers (0 to 1)"),
        ("{engram: {layer_indices: [1]}, train: {learning_rate: 1.0e+30}}", "at step 2"),
        ("train: {sequence_length: 1}", "TrainConfig.sequence_length = 1: must be at least 2"),
    ],
)
def test_settings_that_do_not_fit(refused, corpus, tmp_path, text, evidence):
    (tmp_path / "run.yaml").write_text(text)
    with unchanged(tmp_path):
        what, _ = refused(
            *("train", "--corpus", corpus, "--output", tmp_path / "run", "--config", tmp_path / "run.yaml"),
            *("--steps", 6, *(() if "sequence" in text else ("--sequence-length", 32)), "--table-size", 2000),
        )
    assert evidence in what


def test_a_prompt_longer_than_the_model(refused, trained):
    what, way_out = refused("generate", trained, "def " * 1000)
    assert "64 new ones" in what
    assert "takes 512 at most" in what
    assert "a shorter prompt" in way_out
    what, _ = refused("generate", trained, "")
    assert "the prompt '' has no tokens" in what


# Folders that can't be written to. Root may write anywhere, so these are below a file, and in /proc.


@pytest.mark.parametrize("where", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_to(refused, corpus, tmp_path, where):
    (tmp_path / "file").write_text("content")
    folder = tmp_path / "file" / "inner" if where == "a file" else Path("/proc/sense-engram")
    small = shadow_map(tmp_path / "map.npy", "a", "b")
    commands = {
        "setup": ("--tokenizer", tmp_path / "map.tokens", "--output", folder / "map.npy"),
        "create": ("--shadow-map", small, "--storage-path", folder / "t.dat"),
        "train": ("--corpus", corpus, "--output", folder, *SMALL),
        "demo": ("--corpus", corpus, "--output", folder),
    }
    with unchanged(tmp_path):
        for name, arguments in commands.items():
            what, _ = refused(name, *arguments)
            assert str(folder) in what, name


def test_a_name_that_is_not_utf_8_is_refused_before_any_work(refused, corpus, trained, tmp_path):
    """The files of the model and the reports name it, and are UTF-8."""
    name = os.fsdecode(b"caf\xe9")
    with unchanged(tmp_path):
        for arguments in (
            ("train", "--corpus", corpus, "--output", tmp_path / name, *SMALL),
            ("train", "--corpus", corpus, "--output", tmp_path / "run", "--model", tmp_path / name, *SMALL),
            ("train", "--resume", "--output", tmp_path / name),
            ("demo", "--corpus", corpus, "--output", tmp_path / name),
            ("ablate", trained, "--corpus", corpus, "--output", tmp_path / f"{name}.html"),
        ):
            what, way_out = refused(*arguments)
            assert r"caf\xe9" in what
            assert "the name isn't UTF-8" in what
            assert "rename it" in way_out


def test_a_corpus_whose_name_is_not_utf_8(corpus, tmp_path, capsys):
    """Its name is written down with a sign in place of what can't be read."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(corpus, folder)
    output = tmp_path / "run"
    arguments = ["train", "--corpus", str(folder), "--output", str(output), *map(str, SMALL)]
    assert main.main(arguments) == 0, capsys.readouterr().err
    assert "caf\ufffd" in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"config": {}, "steps": 3}', "[" * 50_000])
def test_a_run_whose_settings_are_damaged(refused, tmp_path, text):
    state = tmp_path / "run" / ".training-x" / "training"
    state.mkdir(parents=True)
    (state / "run.json").write_text(text)
    with unchanged(tmp_path):
        what, way_out = refused("train", "--resume", "--output", tmp_path / "run")
    assert "training/run.json isn't what a run wrote there: " in what
    assert "train again without --resume" in way_out


def test_an_output_that_is_a_file(refused, corpus, tmp_path):
    (tmp_path / "file").write_text("content")
    with unchanged(tmp_path):
        what, way_out = refused("train", "--corpus", corpus, "--output", tmp_path / "file", *SMALL)
    assert "file is a file, and --output is a folder" in what
    assert "choose another --output" in way_out


def test_a_model_that_can_only_be_read_is_evaluated(trained, corpus, monkeypatch, capfd):
    """Root ignores the permissions, so opening to write is made to fail."""
    whole = os.open

    def read_only(path, flags, *more, **named):
        if str(path).startswith(str(trained)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    trained.chmod(0o500)
    with unchanged(trained):
        assert main.main(["eval", str(trained), "--corpus", str(corpus), "--without-memory"]) == 0
    assert "without memory" in capfd.readouterr().out


# A full disk


def test_a_full_disk_while_a_table_is_made(tmp_path):
    """In a process of its own, as a person runs it."""
    small = shadow_map(tmp_path / "map.npy", "a", "b")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6));"
        "from sense_v2.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    with unchanged(tmp_path):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                code,
                "create",
                "--shadow-map",
                small,
                "--storage-path",
                tmp_path / "new" / "t.dat",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        what, way_out = two_lines(done.returncode, done.stdout, done.stderr)
    assert f"{tmp_path / 'new' / 't.dat'} needs 2560000000 bytes" in what
    assert "Make room" in way_out


def test_a_disk_too_small_for_the_weights_is_found_before_training(refused, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fit", None)
    with unchanged(tmp_path), full_disk(10**6):
        what, way_out = refused("train", "--corpus", corpus, "--output", tmp_path / "run", *SMALL)
    assert "the model's weights need" in what
    assert str(tmp_path / "run") in what
    assert "make room" in way_out


@pytest.mark.parametrize("there", ["nothing", "an older model"])
def test_a_disk_that_fills_up_during_training(refused, trained, corpus, tmp_path, monkeypatch, there):
    """The weights' room was taken by others in the meantime: what was in the folder stays, byte for byte."""
    output = trained if there == "an older model" else tmp_path / "run"
    monkeypatch.setattr(run, "reserve", lambda staging, *more: Path(shutil.copy(__file__, staging / "reserved")))
    with unchanged(tmp_path), full_disk(10**6):
        what, way_out = refused("train", "--corpus", corpus, "--output", output, *SMALL, "--force")
    assert f"{output}: the trained model can't be written" in what
    assert "File too large" in what
    assert "make room" in way_out
