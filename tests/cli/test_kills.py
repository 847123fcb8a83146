"""Commands that write, killed at their calls that change files, and two at once: called again they give what they
give undisturbed, and what was there before is whole.

Each command runs in a forked child. An audit hook of Python kills it just before one of its calls that open a file to
write, rename or remove it: at each of these calls in turn in `make crash`, else at two that are drawn.
"""

import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from tiny import save_base_and_taught, tiny_tokenizer

from sense_v2.cli.main import main
from sense_v2.hf.saving.publishing import is_notice
from sense_v2.hf.training.run import default_config

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
TABLE = ("--table-size", 2000, "--engram-dim", 32, "--num-heads", 2)
COMMANDS = {
    "setup": ("setup", "--tokenizer", "tokenizer.json", "--output", "out/map.npy"),
    "create": ("create", "--shadow-map", "base/engram/shadow_map.npy", "--storage-path", "out/t.dat", *TABLE),
    "convert": ("convert", "base", "--dtype", "int8", "--output", "out"),
    "tokenizer": ("convert", "base", "--tokenizer", "other.json", "--corpus", "corpus", "--output", "out"),
    "tokenize": ("tokenize", "--corpus", "corpus", "--tokenizer", "tokenizer.json", "--output", "out"),
    "profile": ("profile", "base", "--corpus", "corpus", "--output", "out/hot.npy"),
    "export": ("delta", "export", "taught", "--base", "base", "--output", "out/delta.safetensors"),
    "apply": ("delta", "apply", "delta.safetensors", "base"),
    "revert": ("delta", "revert", "applied"),
}
# What these say once they are done; they can't be done twice.
DONE = {"export": "is there already", "tokenize": "is there already", "tokenizer": "is there already"}
TRAIN = ("train", "--corpus", "corpus", "--output", "taught", "--force", "--config", "run.yaml")
COMMANDS |= {"train": TRAIN, "resume": ("train", "--resume", "--output", "taught")}
EVER_NEW = ("engram_table.json", "t.json", "engram_table.journal")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """What the commands read: a tokenizer, texts, a model, the same taught, a delta between the two, and applied."""
    folder = tmp_path_factory.mktemp("killed")
    save_base_and_taught(folder)
    shutil.rmtree(folder / "table")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tiny_tokenizer(60).save(str(folder / "other.json"))
    (folder / "corpus").mkdir()
    for number in range(6):
        words = [f"word{(number * 7 + place) % 30}" for place in range(300)]
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(words))
    delta, applied = str(folder / "delta.safetensors"), str(folder / "applied")
    assert main(["delta", "export", str(folder / "taught"), "--base", str(folder / "base"), "--output", delta]) == 0
    shutil.copytree(folder / "base", applied)
    assert main(["delta", "apply", delta, applied]) == 0
    for name in ("tokenize", "profile", "setup", "tokenizer"):  # what the children need is imported by then
        words = [str(folder / word) if (folder / word).exists() else word for word in COMMANDS[name][:-1]]
        assert main([*words, str(folder / "unused" / f"{name}.npy")]) == 0
    shutil.rmtree(folder / "unused")
    return folder


def start(name, folder, kill_at=None):
    """Run a command in a child, in `folder`; a line in `log` says how it ended and after how many changes."""
    child = os.fork()
    if child:
        return child
    changes = 0

    def hook(event, arguments):
        nonlocal changes
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in CHANGES or writes) and isinstance(arguments[0], (str, bytes, Path)):
            if not os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)):
                return
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(60)
    os.chdir(folder)
    log = os.open(folder.with_name(f"log{os.getpid()}"), os.O_WRONLY | os.O_CREAT)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    sys.addaudithook(hook)
    try:
        status = main(list(map(str, COMMANDS[name])))
    except BaseException as error:
        status = repr(error)
    print(f"\nENDED {status} {changes}")
    os._exit(0)


def wait(child, folder):
    """(exit status or None if it was killed, changes, what it said)"""
    os.waitpid(child, 0)
    said = folder.with_name(f"log{child}").read_text()
    end = re.search(r"^ENDED (.+) (\d+)$", said, flags=re.MULTILINE)
    return (int(end[1]), int(end[2]), said) if end else (None, 0, said)


def fresh(original, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    return folder


def content(folder):
    """All that decides what a folder is: without locks, and without what is drawn anew for each table."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".lock", ".tmp") and path.name not in EVER_NEW
    }


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "resume")])
def test_a_killed_command_can_be_called_again(original, tmp_path, name):
    folder = fresh(original, tmp_path / "work")
    status, changes, said = wait(start(name, folder), folder)
    assert status == 0, said
    expected, before = content(folder), content(original)
    moments = range(1, changes + 1)
    if "SENSE_CRASH_KILLS" not in os.environ and name not in ("apply", "revert"):  # which are fast
        moments = sorted(random.Random(name).sample(moments, min(2, changes)))
    for moment in moments:
        fresh(original, folder)
        assert wait(start(name, folder, kill_at=moment), folder)[0] is None
        if name not in ("apply", "revert"):  # which change a table, under its journal
            assert content(folder).items() >= before.items(), f"killed at {moment}"
        status, _, said = wait(start(name, folder), folder)
        assert status == 0 or re.search(DONE.get(name, "not this one"), said), f"killed at {moment}: {said}"
        assert content(folder) == expected, f"killed at {moment}"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "resume")])
def test_two_at_once_give_what_one_gives(original, tmp_path, name):
    folder = fresh(original, tmp_path / "work")
    assert wait(start(name, folder), folder)[0] == 0
    expected = content(folder)
    fresh(original, folder)
    ends = [wait(child, folder) for child in [start(name, folder), start(name, folder)]]
    assert content(folder) == expected
    assert 0 in [status for status, _, _ in ends]
    for status, _, said in ends:
        assert status == 0 or (status == 1 and "Traceback" not in said and " help: " in said)
        assert status == 0 or re.search(f"{DONE.get(name)}|to revert|being written|is at work", said), said


@pytest.mark.skipif("SENSE_CRASH_KILLS" not in os.environ, reason="five minutes: make crash")
def test_a_killed_run_goes_on_or_begins_anew_and_the_old_model_stays_until_then(original, tmp_path):
    config = default_config(None)
    config.train.commit_every, config.train.eval_sequences, config.train.eval_every, config.train.steps = 2, 4, 0, 5
    config.engram.table_size, config.train.batch_size, config.train.sequence_length = 2000, 2, 16

    def killed(*names_and_moments):
        fresh(original, folder)
        config.save(folder / "run.yaml")
        for name, moment in names_and_moments:
            assert wait(start(name, folder, kill_at=moment), folder)[0] is None

    def model():
        paths = ("config.json", "model.safetensors", "engram/engram_table.dat", "engram/fusion.safetensors")
        return [(folder / "taught" / path).read_bytes() for path in paths if (folder / "taught" / path).exists()]

    folder = tmp_path / "work"
    killed()
    old = model()
    status, changes, said = wait(start("train", folder), folder)
    assert status == 0, said
    new, generator = model(), random.Random(0)
    assert new != old
    for moment in generator.sample(range(1, changes + 1), 40):
        killed(("train", moment))
        assert model() in (old, new) or is_notice(folder / "taught" / "config.json")
        status, changes, said = wait(start("resume", folder), folder)
        if status == 0:  # once more, with a kill of what goes on
            killed(("train", moment), ("resume", generator.randint(1, changes)))
            assert model() in (old, new) or is_notice(folder / "taught" / "config.json")
            status, _, said = wait(start("resume", folder), folder)
        if status and model() != new:
            assert re.search("there is nothing to go on from|holds no run that could go on", said), (moment, said)
            assert wait(start("train", folder), folder)[0] == 0
        assert model() == new
