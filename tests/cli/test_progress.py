"""How far a command is: a bar with the time left in a terminal, plain lines elsewhere, and neither in two seconds."""

import contextlib
import io
import subprocess
import sys
import time

import pytest
import torch
from test_save import with_memory
from tiny import tiny_tokenizer

from sense_v2.cli import output, progress
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.insight.evaluation import evaluate


class Clock:
    """Time, ours and the bar's, that only move when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@contextlib.contextmanager
def terminal():
    """A stderr that says it is one; what was written to it."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    with contextlib.redirect_stderr(screen):
        yield screen


def advance(clock, *, seconds, steps=10):
    lines = []
    with progress.ByteProgress("copying", 10 * 2**20, echo=lines.append) as told:
        for _ in range(steps):
            clock.now += seconds / steps
            told(2**20)
    return lines


def test_elsewhere_a_few_plain_lines_say_the_time_left(clock, capfd):
    lines = advance(clock, seconds=100)
    assert 2 <= len(lines) <= 5
    assert lines[0] == "  copying: 10%, 105 KB/s, 90 s left"
    assert all(" left" in line and "\r" not in line for line in lines)
    assert capfd.readouterr() == ("", "")


def test_a_rate_of_one_is_one_step(clock):
    lines = []
    with progress.ByteProgress("training", 20, unit="steps", echo=lines.append) as told:
        for seconds in (4, 8):
            clock.now += seconds
            told(4)
    assert lines == ["  training: 20%, 1 step/s, 16 s left", "  training: 40%, 0.667 steps/s, 18 s left"]


def test_what_is_done_within_two_seconds_says_nothing(clock, capfd):
    assert advance(clock, seconds=1.9) == []
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_with_the_time_left_and_takes_it_away(clock):
    with terminal() as screen:
        assert advance(clock, seconds=100) == []
    shown = screen.getvalue()
    assert "copying" in shown
    assert "[00:10<01:30, 105kB/s]" in shown
    assert shown.rsplit("\r", 2)[-2].strip() == ""  # overwritten with spaces at the end


def test_a_terminal_shows_nothing_within_two_seconds(clock):
    with terminal() as screen:
        advance(clock, seconds=1.9)
    assert screen.getvalue().strip() == ""


def test_generated_tokens_are_counted_without_the_prompt(clock):
    with terminal() as screen, progress.TokenProgress("generating", 4) as streamer:
        streamer.put(torch.zeros(1, 7))
        for _ in range(3):
            clock.now += 3
            streamer.put(torch.zeros(1))
        assert "3.00/4.00" in screen.getvalue()


def test_texts_and_blocks_are_told_as_they_are_done(tmp_path):
    told = []
    texts = ["word1 word2", "word3", "word4 word5 word6"]
    encode(texts, tiny_tokenizer(), separator_id=None, batch=2, advance=told.append)
    assert told == [16, 17]
    told.clear()
    evaluate(with_memory(tmp_path), torch.ones(5, 6, dtype=torch.long), batch_size=2, advance=told.append)
    assert told == [12, 12, 6]


# What takes long before the first line, and other libraries' bars


def test_a_terminal_is_told_that_the_program_is_loading_until_the_first_line(capsys):
    with terminal() as screen:
        output.LOADING.begin(0.0)
        deadline = time.monotonic() + 10
        while "loading" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert screen.getvalue() == "\r\x1b[Kloading the libraries …"
        output.LOADING.say("loading runs/\x1b[2Jtrain")
        output.tell("corpus   mine")
        output.tell("model    mine")
        shown = screen.getvalue().split("\r\x1b[K")
        assert shown == ["", "loading the libraries …", "loading runs/\\x1b[2Jtrain …", ""]
    assert capsys.readouterr().out == "corpus   mine\nmodel    mine\n"


def test_nothing_says_loading_where_the_first_line_comes_at_once_or_there_is_no_terminal(capsys):
    with terminal() as screen:
        output.LOADING.begin(0.2)
        output.LOADING.say("loading runs/train")
        output.tell("done")
        time.sleep(0.4)
        assert screen.getvalue() == ""
    output.LOADING.begin(0.0)
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_bars_of_other_libraries_stay_out_and_ours_are_shown():
    """In a process of its own: tqdm reads its switch when it is imported."""
    code = """
import io, sys
from sense_v2.cli import main
main.main(["--version"])
sys.stderr = io.StringIO()
sys.stderr.isatty = lambda: True
from tqdm import tqdm
for _ in tqdm(range(3), desc="theirs"):
    pass
from sense_v2.cli.progress import TrainingProgress
from sense_v2.core.config import TrainConfig
with TrainingProgress("ours", TrainConfig()):
    pass
print(repr(sys.stderr.getvalue()))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "theirs" not in found
    assert "ours" in found
