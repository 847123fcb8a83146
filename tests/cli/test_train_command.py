"""What `sense-engram train` says before and after the steps: warm-up, table, Ctrl-C; and the defaults in its help."""

import json
import re
import signal

import pytest
from cli_calls import COMMANDS
from test_cli import SMALL

from sense_v2.cli import train
from sense_v2.core.config import Config, TrainConfig
from sense_v2.hf.training.run import COUNTED_ROW_RATE, default_config


def notes(output):
    return [line for line in output.splitlines() if line.startswith("note ")]


def test_fewer_steps_than_the_warm_up_are_named(run, corpus, tmp_path):
    status, out, error = run("train", "--corpus", corpus, *SMALL, "--steps", 10, "--output", tmp_path / "run")
    assert status == 0, error
    (line,) = notes(out)
    # 10 of 41 parts of the way up.
    assert line == (
        "note     10 steps end within the warm-up of 40: the rates reach 24 % of their peaks; --warmup-steps 1"
    )


def test_the_warm_up_is_an_option(run, corpus, tmp_path):
    output = tmp_path / "run"
    status, out, _ = run("train", "--corpus", corpus, *SMALL, "--steps", 3, "--warmup-steps", 1, "--output", output)
    assert status == 0
    assert notes(out) == []
    assert Config.load(output / "config.yaml").train.warmup_steps == 1


def test_a_table_far_too_large_for_the_text_is_named(run, corpus, tmp_path):
    size = ("--batch-size", 2, "--sequence-length", 32, "--table-size", 100_000, "--warmup-steps", 1)
    status, out, error = run("train", "--corpus", corpus, *size, "--steps", 3, "--output", tmp_path / "run")
    assert status == 0, error
    (line,) = notes(out)
    # 3 steps of 2 × 32 tokens, 4 heads in one layer.
    assert re.fullmatch(
        r"note     training reads 192 tokens, which reach at most 0\.8 % of the table's [\d,]+ rows; "
        r"--table-size 770 has a row for each",
        line,
    )


def test_a_frozen_models_rows_begin_with_counts_unless_told_otherwise(run, run_json, corpus, tmp_path):
    plain, output = tmp_path / "plain", tmp_path / "with"
    run_json("train", "--corpus", corpus, *SMALL, "--steps", 1, "--no-memory", "--output", plain)
    shape = ("--batch-size", 2, "--sequence-length", 32, "--table-size", 20_000, "--model", plain)
    frozen = ("train", "--corpus", corpus, *shape, "--freeze-backbone", "--output", output, "--force")
    status, out, error = run(*frozen, "--steps", 0)
    assert status == 0, error
    assert re.search(
        r"counted  [\d,]+ tokens into [\d,]+ rows in \d+ s: loss [\d.]+ before, [\d.]+ after, on text kept back; "
        r"strength [\d.]+",
        out,
    )
    assert notes(out) == []
    assert Config.load(output / "config.yaml").train.row_learning_rate == COUNTED_ROW_RATE
    for way, init_std in (("zeros", 0), ("noise", 0.02)):
        result = run_json(*frozen, "--steps", 1, "--begin-with", way)
        saved = Config.load(output / "config.yaml")
        assert (result["counted"], saved.engram.init_std, saved.train.row_learning_rate) == (None, init_std, 0.3)
    documents = tmp_path / "texts.jsonl"
    documents.write_text("".join(json.dumps({"text": f"one {which} two three " * 50}) + "\n" for which in range(200)))
    streamed = ("train", "--corpus", documents, *shape, "--freeze-backbone", "--output", output, "--force")
    status, _, error = run(*streamed, "--steps", 1, "--begin-with", "counts")
    assert status == 1
    assert "rows can't be counted: the corpus texts.jsonl is read while it is trained on" in " ".join(error.split())
    assert "--begin-with zeros" in error
    assert run_json(*streamed, "--steps", 1)["counted"] is None


def test_a_run_that_was_stopped_says_where_and_how_to_go_on(run, corpus, tmp_path, monkeypatch):
    show = train.TrainingProgress.__call__

    def interrupt(progress, history):
        show(progress, history)
        if history.steps[-1] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.TrainingProgress, "__call__", interrupt)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    output = tmp_path / "run"
    try:
        status, out, _ = run("train", "--corpus", corpus, *SMALL, "--steps", 5, "--output", output)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert status == 130
    last = out.splitlines()[-1]
    assert last == f"stopped  at step 2 of 5, and saved; sense-engram train --resume --output {output} goes on"


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--steps", "steps"),
        ("--batch-size", "batch_size"),
        ("--sequence-length", "sequence_length"),
        ("--warmup-steps", "warmup_steps"),
        ("--learning-rate", "learning_rate"),
        ("--row-learning-rate", "row_learning_rate"),
    ],
)
def test_the_help_says_the_defaults(option, field):
    (text,) = [parameter.help for parameter in COMMANDS["train"].params if option in parameter.opts]
    fresh, named = (getattr(config.train, field) for config in (default_config(None), default_config("m")))
    assert fresh == getattr(TrainConfig(), field)
    shown = f"{fresh:g}" if fresh == named else f"{fresh:g}, with --model {named:g}"
    assert text.endswith(f" (default {shown}).")


def test_the_help_says_how_large_the_table_is():
    (text,) = [parameter.help for parameter in COMMANDS["train"].params if "--table-size" in parameter.opts]
    assert f"{default_config(None).engram.table_size:,}" in text
