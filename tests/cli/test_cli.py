"""`sense-engram`, command by command, with small settings: what is printed, what lies on disk, what it returns."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_corpus
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from sense_v2.cli import demo, errors, main, train
from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.hf.experiments import from_scratch as experiment
from sense_v2.hf.experiments import pretrained
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.training.fresh_model import train_bpe

ROOT = Path(__file__).parents[2]
SMALL = ("--batch-size", "2", "--sequence-length", "32", "--table-size", "2000")
COMMANDS = [name for commands in main.COMMANDS.values() for name in commands]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# The program itself


def test_help_shows_an_example_of_each_command_and_loads_no_model_library():
    code = (
        "import sys; from sense_v2.cli.main import main\n"
        f"for command in {COMMANDS!r}: assert main([*command.split(), '--help']) == 0\n"
        "assert main(['--help']) == main(['--version']) == main([]) == 0\n"
        "print('LOADED', sorted({'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"Example: sense-engram {command} " in done.stdout
    assert "sense-engram 0." in done.stdout
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("eval",), "Missing argument"),
        (("train", "--step", "3"), "No such option"),
        (("train", "--steps", "many"), "--steps"),
        (("train", "--steps", "-3"), "--steps"),
        (("train", "--sequence-length", "1"), "--sequence-length"),
        (("train", "--learning-rate", "-1"), "--learning-rate"),
        (("train", "--table-size", "0"), "--table-size"),
        (("train", "--layers", "one"), "'one': numbers with commas between them, as in 1,15"),
        (("train", "--steps", "3", "--tokens", "3"), "--steps and --tokens say the same thing"),
        (("trian",), "No such command"),
    ],
)
def test_a_wrong_call_has_status_2_and_two_lines(run, arguments, what):
    status, out, error = run(*arguments)
    assert (status, out) == (2, "")
    first, second = error.splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert "--help` lists what there is" in second


def test_debug_shows_the_traceback_before_the_two_lines(run, tmp_path):
    plain = run("eval", tmp_path)
    debug = run("--debug", "eval", tmp_path)
    assert plain[0] == debug[0] == 1
    assert plain[2].splitlines() == debug[2].splitlines()[-2:]
    assert debug[2].startswith("Traceback")
    assert "FileNotFoundError" in debug[2]


@pytest.mark.parametrize(
    ("error", "what", "way_out"),
    [
        (with_way_out(ValueError("a = 3; b. C is 4"), "Use 4 instead"), "a = 3; b. C is 4", "Use 4 instead"),
        (with_way_out(OSError(28, "no room for t.dat"), "make room"), "no room for t.dat", "make room"),
        (
            ValueError("v1.2 of a.txt differs. Copy it again"),
            "v1.2 of a.txt differs. Copy it again",
            "`x run --help`",
        ),
        (ValueError("a = 3: must be 4"), "a = 3: must be 4", "`x run --help` says what is allowed"),
        (OSError(28, "No space left on device", "t.dat"), "t.dat: No space left on device", "make room"),
        (PermissionError(13, "Permission denied", "t.dat"), "t.dat: Permission denied", "choose another path"),
        (ModuleNotFoundError("no module m"), "no module m", "pip install"),
        (MemoryError(), "there is not enough memory", "--batch-size"),
        (RuntimeError("I/O error: File too large (os error 27)"), "I/O error: File too large", "make room"),
        (KeyError("name"), "KeyError: 'name'", "`x --debug run …` shows where"),
        (CommandError("two\n lines", "way\nout"), "two lines", "way out"),
    ],
)
def test_every_error_has_a_way_out(error, what, way_out):
    found = errors.explain(error, "x run")
    assert found[0].startswith(what)
    assert way_out in found[1]
    assert not any("\n" in line for line in found)


# setup and create


@pytest.fixture
def shadow_map(tmp_path, run):
    """The map of 7 tokens, 4 compressed ids."""
    from tokenizers import Tokenizer, models

    tokens = ["The", " the", "THE", "cat", "Cat", "!", "dog"]
    file = tmp_path / "words.json"
    Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="!")).save(str(file))
    path = tmp_path / "map.npy"
    assert run("setup", "--tokenizer", file, "--output", path)[0] == 0
    return path


def test_setup(run, run_json, shadow_map, tmp_path):
    path = tmp_path / "again.npy"
    written = run_json("setup", "--tokenizer", tmp_path / "words.json", "--output", path)
    assert (written["status"], written["vocab_size"], written["compressed_vocab_size"]) == ("written", 7, 4)
    assert written["path"] == str(path)
    status, out, error = run("setup", "--tokenizer", tmp_path / "words.json", "--output", path)
    assert (status, error) == (0, "")
    assert "4 ids" in out
    assert "up to date" in out


def test_create_makes_a_table_once(run, run_json, shadow_map, tmp_path):
    table = tmp_path / "new" / "table.dat"
    arguments = ["create", "--shadow-map", shadow_map, "--storage-path", table, "--table-size", 2000]
    arguments += ["--layers", "1,4", "--engram-dim", 32, "--num-heads", 2, "--dtype", "float16", "--seed", 3]
    made = run_json(*arguments)
    assert (made["status"], made["rows"], made["width"], made["dtype"]) == ("written", 2000, 8, "float16")
    assert made["heads"] == 2 * 2 * 2
    assert 2000 / 8 / 2 < made["rows_per_head"][0] < made["rows_per_head"][1] < 2000 / 8
    assert made["bytes"] == table.stat().st_size == 2000 * 8 * 2
    assert made["seconds"] > 0
    assert made["megabytes_per_second"] == pytest.approx(made["bytes"] / 1e6 / made["seconds"])

    before, times = content(table.parent), [path.stat().st_mtime_ns for path in table.parent.iterdir()]
    status, out, error = run(*arguments)
    assert (status, error) == (0, "")
    assert "there already" in out
    assert "2,000 of 8 float16, 32 KB" in out
    assert run_json(*arguments)["status"] == "there already"
    status, out, error = run(*arguments, "--table-size", 4000)
    assert (status, out) == (1, "")
    assert "rows is 2000, asked for 4000" in error
    assert content(table.parent) == before
    assert [path.stat().st_mtime_ns for path in table.parent.iterdir()] == times


def test_options_win_over_the_configuration_file(run_json, shadow_map, tmp_path):
    config = Config(EngramConfig(table_size=3000, engram_dim=32, num_heads=2, layer_indices=[1], dtype="float16"))
    config.engram.storage_path, config.engram.shadow_map_path = str(tmp_path / "table.dat"), str(shadow_map)
    for name in ("config.yaml", "config.json"):
        config.save(tmp_path / name)
        made = run_json(
            "create", "--config", tmp_path / name, "--table-size", 2000, "--storage-path", tmp_path / f"{name}.dat"
        )
        assert (made["rows"], made["dtype"], made["width"]) == (2000, "float16", 8)
        assert made["path"] == str(tmp_path / f"{name}.dat")


# train, eval, generate


def test_train_saves_a_folder_that_says_how_it_was_made(trained):
    folder, result = trained
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "config.yaml", "engram/engram_table.dat"} <= names
    assert not [name for name in names if name.startswith(".")]
    config = Config.load(folder / "config.yaml")
    assert (config.train.steps, config.engram.table_size) == (12, 2000)
    assert config.engram.storage_path == str(folder / "engram" / "engram_table.dat")
    assert result["perplexity"]["after"] < result["perplexity"]["before"]
    assert (result["steps"], result["tokens"], result["stopped"]) == (12, 12 * 2 * 32, False)
    assert result["memory"]["rows"] == 2000
    assert result["memory"]["bytes"] == (folder / "engram" / "engram_table.dat").stat().st_size
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["train_seconds"])
    assert attached_memory(from_pretrained(folder, mode="r")) is not None
    assert attached_memory(AutoModelForCausalLM.from_pretrained(folder)) is not None
    # By its own class it is the backbone.
    assert attached_memory(LlamaForCausalLM.from_pretrained(folder)) is None
    card = (folder / "README.md").read_text().splitlines()
    assert f"# {folder.name}" in card
    assert "| steps | 12 |" in card
    assert f"| perplexity after | {result['perplexity']['after']:.4g} |" in card


def test_eval_finds_what_training_found_and_changes_nothing(run, run_json, trained, corpus):
    folder, result = trained
    before = content(folder)
    found = run_json("eval", folder, "--corpus", corpus, "--without-memory")
    assert found["perplexity"]["with_memory"] == pytest.approx(result["perplexity"]["after"], rel=1e-6)
    assert found["bits_per_byte"]["with_memory"] == pytest.approx(result["bits_per_byte"]["after"], rel=1e-6)
    assert found["perplexity"]["without_memory"] != found["perplexity"]["with_memory"]
    assert (found["sequences"], found["sequence_length"], found["tokens"]) == (8, 32, 8 * 32)
    assert found["corpus"]["held_out"]
    assert found["corpus"]["files"] == result["corpus"]["held_out_files"]

    (reading,) = found["reading"]
    config = EngramConfig.load(folder / "engram" / "config.json")
    heads = config.num_heads * len(config.ngram_orders) * len(config.layer_indices)
    assert reading["rows"] == found["tokens"] * heads
    assert reading["bytes"] == reading["rows"] * config.row_dim * 4
    assert reading["calls"] >= len(config.layer_indices)
    status, out, error = run("eval", folder, "--corpus", corpus, "--all-files", "--sequences", 3)
    assert re.search(r"^reading +[\d,]+ lookups? of [\d,]+ rows, ", out, re.MULTILINE)
    assert (status, error) == (0, "")
    assert "with memory" in out
    assert "without memory" not in out
    assert "12 files; 3 sequences of 32 tokens" in out
    assert content(folder) == before


def test_generate_repeats_itself_from_a_seed(run, run_json, trained):
    folder, _ = trained
    before = content(folder)
    found = run_json("generate", folder, "def function", "--max-new-tokens", 12, "--seed", 1)
    assert (found["prompt"], found["tokens"], found["with_memory"]) == ("def function", 12, True)
    status, out, error = run("generate", folder, "def function", "--max-new-tokens", 12, "--seed", 1)
    assert (status, out, error) == (0, found["continuation"] + "\n", "")
    assert run_json("generate", folder, "def function", "--max-new-tokens", 12, "--seed", 2) != found
    greedy = [
        run_json("generate", folder, "def function", "--max-new-tokens", 6, "--temperature", 0, "--seed", seed)
        for seed in (1, 2)
    ]
    assert greedy[0]["continuation"] == greedy[1]["continuation"]
    assert not run_json("generate", folder, "def", "--max-new-tokens", 1, "--without-memory")["with_memory"]
    assert content(folder) == before


def test_train_from_a_configuration_file_and_from_a_folder(run, run_json, corpus, tmp_path):
    """Without memory first; then a memory beside that backbone, which stays as it is."""
    config = Config(EngramConfig(engram_dim=64, num_heads=2, layer_indices=[1]), TrainConfig(eval_sequences=2))
    config.train.steps, config.train.batch_size, config.train.sequence_length, config.train.warmup_steps = 5, 3, 16, 1
    config.save(tmp_path / "run.yaml")
    plain = tmp_path / "plain"
    settings = ("--corpus", corpus, "--config", tmp_path / "run.yaml")
    result = run_json("train", *settings, "--output", plain, "--no-memory", "--tokens", 49, "--seed", 4)
    assert (result["steps"], result["tokens"], result["memory"]) == (2, 2 * 3 * 16, None)
    assert not (plain / "engram").exists()
    saved = Config.load(plain / "config.yaml")
    assert (saved.train.steps, saved.train.batch_size, saved.train.seed, saved.engram.enabled) == (2, 3, 4, False)
    assert list(run_json("eval", plain, "--corpus", corpus)["perplexity"]) == ["without_memory"]

    output = tmp_path / "with"
    status, out, error = run(
        *("train", *settings, "--model", plain, "--output", output, "--freeze-backbone", "--steps", 3),
        *("--table-size", 1500, "--row-learning-rate", 0.5, "--learning-rate", 0.01, "--layers", "0,1"),
    )
    assert (status, error) == (0, "")
    assert re.search(r"memory +1,500 rows × 16 float32 .* before layer 0 and 1, 4 heads", out)
    assert re.search(r"train: step 3/3, loss \d.*tokens/s, 0 s left", out)
    assert re.search(r"perplexity [\d,.]+ before, [\d,.]+ after 3 steps", out)
    saved = Config.load(output / "config.yaml")
    assert (saved.train.row_learning_rate, saved.train.learning_rate, saved.train.train_backbone) == (
        0.5,
        0.01,
        False,
    )
    assert (saved.engram.table_size, saved.engram.layer_indices, saved.engram.engram_dim) == (1500, [0, 1], 64)
    assert not (output / "model.safetensors").exists()
    assert json.loads((output / "engram/backbone.json").read_text())["reference"]["model"] == str(plain)
    assert re.search(r"trains +weights: [\d.]+ K of the fusion layers and [\d.]+ K of rows on disk", out), out
    assert re.search(r"damage +on 1,024 tokens .* KL [\d.e-]+ nats a token", out), out
    assert list(run_json("eval", output, "--corpus", corpus)["perplexity"]) == ["with_memory"]

    more = run_json("train", *settings, "--model", output, "--output", tmp_path / "more", "--steps", 3)
    assert (more["memory"]["rows"], more["memory"]["layers"]) == (1500, [0, 1])
    status, _, error = run("train", "--model", output, "--output", tmp_path / "even more", "--table-size", 9)
    assert status == 2
    assert "has a memory, which is trained further as it is: leave --table-size" in " ".join(error.split())


def test_a_model_is_replaced_only_when_forced_and_other_files_never(run, run_json, corpus, tmp_path):
    output = tmp_path / "run"
    arguments = ("train", "--corpus", corpus, "--output", output, *SMALL, "--steps", 1)
    run_json(*arguments)
    (output / "notes.txt").write_text("mine")
    before = content(output)
    status, out, error = run(*arguments)
    assert (status, out) == (1, "")
    assert "holds a trained memory already" in error
    assert "--force" in error
    assert content(output) == before

    run_json(*arguments, "--force", "--no-memory")
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "engram").exists()
    assert attached_memory(from_pretrained(output)) is None
    assert not list(output.glob(".*"))


def test_files_that_are_no_text_are_a_note_of_one_line(run, corpus, tmp_path):
    mixed = write_corpus(tmp_path / "mixed")
    (mixed / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    status, _, error = run("train", "--corpus", mixed, "--output", tmp_path / "run", *SMALL, "--steps", 1)
    assert status == 0
    (line,) = error.splitlines()
    assert line.startswith("note: 1 of 13 files is not UTF-8 text")


def test_any_setting_of_the_trainer_can_be_given(run, run_json, corpus, tmp_path):
    """On the command line and in the configuration file, where the command line wins; kept for --resume."""
    (tmp_path / "run.yaml").write_text("trainer: {gradient_accumulation_steps: 2, bf16: false}")
    output = tmp_path / "run"
    arguments = ("train", "--corpus", corpus, "--config", tmp_path / "run.yaml", *SMALL, "--layers", 1)
    run_json(
        *(*arguments, "--steps", 2, "--output", output),
        *("--set", "bf16=true", "--set", "report_to=tensorboard", "--set", "lr_scheduler_type=linear"),
    )
    assert Config.load(output / "config.yaml").trainer == {
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "report_to": "tensorboard",
        "lr_scheduler_type": "linear",
    }
    assert list(output.rglob("events.out.tfevents.*"))
    assert not list(output.rglob("checkpoint-*"))
    for setting, message in (
        ("bf61=true", "did you mean 'bf16'?"),
        ("max_steps=3", "use --steps or --tokens"),
        ("bf16=maybe", "must be of type bool"),
    ):
        status, out, error = run(*arguments, "--output", tmp_path / "other", "--set", setting)
        assert (status, out) == (1, "")
        assert message in error
        assert not (tmp_path / "other").exists()
    (tmp_path / "run.yaml").write_text("trainer: {gradient_accumulation: 2}")
    status, _, error = run(*arguments, "--output", tmp_path / "other")
    assert status == 1
    assert "did you mean 'gradient_accumulation_steps'?" in error
    assert not (tmp_path / "other").exists()


def test_the_best_model_can_be_had_at_the_end(run_json, corpus, tmp_path):
    (tmp_path / "run.yaml").write_text("train: {eval_every: 2, commit_every: 2, eval_sequences: 4}")
    found = run_json(
        *("train", "--corpus", corpus, "--config", tmp_path / "run.yaml", "--output", tmp_path / "run", *SMALL),
        *("--steps", 6, "--layers", 1, "--set", "load_best_model_at_end=true", "--set", "greater_is_better=true"),
    )
    again = run_json("eval", tmp_path / "run", "--corpus", corpus)
    assert again["perplexity"]["with_memory"] == pytest.approx(found["perplexity"]["after"], rel=1e-6)


# Ctrl-C


def test_ctrl_c_finishes_the_step_and_saves(run_json, corpus, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "sense_v2.cli.main", "train", "--json", "--corpus", corpus, "--output", output]
    started = subprocess.Popen(
        [*map(str, command), *SMALL, "--steps", "100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background has SIGINT ignored, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # The optimizer's state is the last file to be made before the first step.
        wait_until(
            lambda: list(output.glob(".training-*/engram/engram_table.adagrad.dat")) or started.poll() is not None
        )
        time.sleep(0.3)
        assert not (output / "config.json").exists()
        started.send_signal(signal.SIGINT)
        out, error = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130, error
    result = json.loads(out)
    assert result["stopped"]
    assert 0 <= result["steps"] < 100_000
    assert "stopping after this step, then saving" in error
    assert "Traceback" not in error
    # Nothing but what the command itself has to say.
    starts = ("corpus ", "model ", "memory ", "stopping ", "held-out ", "stopped ")
    assert all(not line or line.startswith(starts) for line in error.splitlines()), error

    found = run_json("eval", output, "--corpus", corpus)
    assert found["perplexity"]["with_memory"] == pytest.approx(result["perplexity"]["after"], rel=1e-6)
    assert not list(output.glob(".*"))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def interruptible():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_a_second_ctrl_c_quits_and_leaves_nothing(run, corpus, tmp_path, monkeypatch, interruptible):
    def twice(progress, history):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.TrainingProgress, "__call__", twice)
    status, _, error = run("train", "--corpus", corpus, "--output", tmp_path / "a" / "b", *SMALL, "--steps", 50)
    assert status == 130
    assert "Ctrl-C again quits at once" in error
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_the_background_keeps_ignoring_ctrl_c():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.StopOnInterrupt() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


# demo


def test_demo(run, run_json, corpus, tmp_path, monkeypatch):
    settings = TrainConfig(steps=3, batch_size=2, sequence_length=32, eval_sequences=4, eval_every=2, warmup_steps=1)

    def small_config(output):
        config = whole_config(output)
        config.engram.table_size = 2000
        return Config(config.engram, settings)

    whole_config = demo.demo_config
    monkeypatch.setattr(demo, "demo_config", small_config)
    monkeypatch.setattr(experiment, "BLOCK_STEPS", 1)
    monkeypatch.setattr(experiment, "STEP_TIME_ROUNDS", 6)
    output = tmp_path / "demo"
    status, out, table = run("demo", "--corpus", corpus, "--output", output, "--json")
    assert status == 0, table
    numbers = json.loads(out)
    assert numbers == json.loads((output / "metrics.json").read_text())
    assert set(numbers["perplexity"]) == {"plain", "engram", "random_rows", "shuffled"}
    assert set(numbers["bits_per_byte"]) == {"plain", "engram"}
    assert numbers["tokens"] == 3 * 2 * 32
    assert numbers["compression"]["tokens"] > numbers["compression"]["ids"] > 90_000
    times = numbers["step_times"]
    assert 0 < times["low"] <= times["ratio"] <= times["high"]
    assert times["rounds"] == experiment.STEP_TIME_ROUNDS
    assert times["seconds"].keys() == {"plain", "engram"}
    assert "equal_time" in numbers
    assert numbers["seconds"] > 0

    for name in ("without memory", "with memory", "random rows", "shuffled rows"):
        assert name in table
    assert "\x1b" not in table
    assert str(output / "report.html") in table
    report = (output / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|@import|url\((?!["']?(?:data:|#))""", report)
    assert "<script src" not in report
    changed = re.search(r'<section id="changed">(.*?)</section>', report, re.DOTALL)[1]
    assert changed.count('tabindex="0"') == 32
    assert changed.count("<span>gain</span>") == 31  # nothing expects the first token

    card = (output / "model" / "README.md").read_text().splitlines()
    assert "| tokens | 192 |" in card
    assert f"| perplexity, with memory | {numbers['perplexity']['engram']:.4g} |" in card
    assert f"| perplexity, without memory, another model | {numbers['perplexity']['plain']:.4g} |" in card

    found = run_json("eval", output / "model", "--corpus", corpus, "--sequence-length", 32, "--sequences", 4)
    assert found["perplexity"]["with_memory"] == pytest.approx(numbers["perplexity"]["engram"], rel=1e-6)
    assert run_json("generate", output / "model", "def", "--max-new-tokens", 2)["tokens"] == 2


def test_demo_on_a_pretrained_model(run, corpus, tmp_path, monkeypatch):
    plain = tmp_path / "plain"
    tokenizer = train_bpe([path.read_text() for path in corpus.iterdir()])
    tiny_model("llama", vocabulary=tokenizer.get_vocab_size()).save_pretrained(plain)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(plain)
    for name, value in {"STEPS": 4, "BATCH": 2, "LENGTH": 16, "HELD_OUT_SEQUENCES": 4, "SAMPLE_TOKENS": 8}.items():
        monkeypatch.setattr(pretrained, name, value)
    output = tmp_path / "demo"
    status, out, told = run("demo", "--model", plain, "--corpus", corpus, "--output", output, "--json")
    assert status == 0, told
    numbers = json.loads(out)
    assert numbers == json.loads((output / "metrics.json").read_text())
    assert set(numbers["runs"]) == set(pretrained.WAYS)
    for way in pretrained.WAYS.values():
        assert way.label in told
        assert way.label in (output / "report.html").read_text()
    assert (output / "learned-and-lost.png").read_bytes().startswith(b"\x89PNG")
    assert run("generate", output / "model", "def ", "--max-new-tokens", "3")[0] == 0


def test_nothing_random_is_left_to_chance(run_json, corpus, tmp_path):
    """The same seed gives the same model, whatever the generator was at before."""
    results = []
    for name in ("one", "two"):
        torch.manual_seed(len(results))
        arguments = ("train", "--corpus", corpus, "--output", tmp_path / name, *SMALL, "--steps", 2, "--seed", 7)
        results.append(run_json(*arguments)["perplexity"])
    assert results[0] == results[1]
    for part in ("model.safetensors", "engram/engram_table.dat", "engram/fusion.safetensors"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
