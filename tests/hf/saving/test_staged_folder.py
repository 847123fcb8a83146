"""A new model takes the place of an old one: whatever fails, neither is lost and they never mix."""

import contextlib
import fcntl
import os
import shutil
import threading
import warnings

import pytest

from sense_v2.core.errors import CommandError
from sense_v2.hf.saving.folder import check_folder
from sense_v2.hf.saving.publishing import NOTICE, finish_interrupted
from sense_v2.hf.saving.staged_folder import resumed_folder, staged_folder

OLD = {"config.json": "old", "engram/table": "old", "model-1.safetensors": "old", "notes.txt": "mine"}
NEW = {"config.json": "new", "engram/table": "new", "model.safetensors": "new"}
IN_PLACE = {**NEW, "notes.txt": "mine"}


@contextlib.contextmanager
def locked(folder):
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    os.close(fd)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    """The files outside of the runs' own folders."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".training" not in str(path)]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def train(output, files=NEW):
    with staged_folder(output, force=True) as staging:
        write(staging, files)


@pytest.fixture
def output(tmp_path):
    write(tmp_path / "run", OLD)
    return tmp_path / "run"


class Failing:
    """`os.replace` that fails at one call, or at it and all after it, as if the process had been killed there."""

    def __init__(self, monkeypatch, at, error, *, dies):
        self.calls, self.real = 0, os.replace
        monkeypatch.setattr(os, "replace", lambda *paths: self.replace(*paths, at, error, dies))

    def replace(self, source, target, at, error, dies):
        if not str(source).endswith(".json.tmp"):
            self.calls += 1
            if self.calls == at or (dies and self.calls > at):
                raise error
        self.real(source, target)


def test_the_new_model_takes_the_place_of_the_old(output):
    train(output)
    assert content(output) == IN_PLACE
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "engram",
        "model.safetensors",
        "notes.txt",
    ]


@pytest.mark.parametrize(
    "error", [OSError(16, "Device or resource busy"), KeyboardInterrupt()], ids=["busy", "ctrl-c"]
)
@pytest.mark.parametrize("at", range(1, 7))
def test_a_fault_at_any_rename_is_taken_back(output, monkeypatch, at, error):
    with monkeypatch.context() as patch:
        failing = Failing(patch, at, error, dies=False)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match=r"isn't in its place.*--resume"):
                train(output)
        else:
            with pytest.raises(
                CommandError, match=r"can't take its place: .*busy; what was there is as it was\. The new"
            ):
                train(output)
        assert failing.calls >= at
    assert content(output) == OLD
    (staging,) = output.glob(".training-*")
    assert {name: (staging / name).read_text() for name in NEW} == NEW
    with pytest.raises(CommandError, match="in its place now"), resumed_folder(output):
        pass
    assert content(output) == IN_PLACE
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("at", range(1, 7))
def test_a_kill_at_any_rename_leaves_no_mixture_and_is_finished(output, monkeypatch, at, resumes):
    with monkeypatch.context() as patch:
        Failing(patch, at, OSError(5, "killed"), dies=True)
        with pytest.raises(CommandError, match=r"can't take its place"):
            train(output)
    found = content(output)
    if at == 1:
        assert found == OLD
    else:
        assert found["config.json"] == NOTICE
    if resumes:
        with pytest.raises(CommandError, match="in its place now"), resumed_folder(output):
            pass
        assert content(output) == IN_PLACE
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(output, {**NEW, "config.json": "newest"})
        assert content(output) == {**IN_PLACE, "config.json": "newest"}
    assert not list(output.glob(".*"))


def test_two_that_end_at_once_give_one_of_them(output):
    for _ in range(10):
        both = threading.Barrier(2)

        def one(name, both=both):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with staged_folder(output, force=True) as staging:
                    write(staging, {**dict.fromkeys(NEW, name), f"engram/{name}": name})
                    both.wait()

        threads = [threading.Thread(target=one, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        name = (output / "config.json").read_text()
        assert content(output) == {**dict.fromkeys(NEW, name), f"engram/{name}": name, "notes.txt": "mine"}
    assert not list(output.glob(".*"))


def test_a_model_that_came_meanwhile_is_not_replaced_without_force(tmp_path):
    output = tmp_path / "run"
    both = staged_folder(output, force=False)
    staging = both.__enter__()
    write(staging, NEW)
    write(output, OLD)
    with pytest.raises(CommandError, match=r"holds a trained memory already .*; the new one is in .*\.training-"):
        both.__exit__(None, None, None)
    assert content(output) == OLD
    assert (staging / "config.json").read_text() == "new"
    with pytest.raises(CommandError, match="holds a trained memory already"), resumed_folder(output):
        pass
    shutil.rmtree(output / "engram")
    (output / "config.json").unlink()
    with pytest.raises(CommandError, match="in its place now"), resumed_folder(output):
        pass
    assert content(output) == IN_PLACE


def test_a_run_that_another_process_goes_on_with_is_refused(tmp_path):
    with staged_folder(tmp_path / "run", force=False) as staging:
        write(staging, {**NEW, "training/run.json": "{}"})
        with (
            pytest.raises(CommandError, match="another process is at work there"),
            resumed_folder(tmp_path / "run"),
        ):
            pass
    with pytest.raises(OSError, match="no"), resumed_folder(tmp_path / "run"):
        raise OSError("no")
    assert content(tmp_path / "run") == {**NEW, "training/run.json": "{}"}


def test_taking_a_stopped_run_out_is_taken_back(tmp_path, monkeypatch):
    output, stopped = tmp_path / "run", {**OLD, "training/run.json": "{}"}
    write(output, stopped)
    for at in (1, 2, 3):
        with monkeypatch.context() as patch:
            Failing(patch, at, OSError(16, "busy"), dies=False)
            with pytest.raises(OSError, match="busy"), resumed_folder(output):
                pass
        assert content(output) == stopped


def test_what_a_killed_run_left_is_removed_if_nothing_could_go_on_from_it(output):
    for name, files in {
        ".training-dead": {"engram/table": "half", "training/run.json": "{}"},
        ".training-resumable": {"training/checkpoint-2/stream.safetensors": "", "training/run.json": "{}"},
        ".training-whole": NEW,
        ".training-alive": {"engram/table": "half", "training/run.json": "{}"},
    }.items():
        write(output / name, files)
    with locked(output / ".training-alive" / "training"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(output)
    assert sorted(path.name for path in output.glob(".*")) == [
        ".training-alive",
        ".training-resumable",
        ".training-whole",
    ]
    assert len(warned) == 3


def test_a_run_that_was_killed_before_it_could_begin_to_replace_is_finished(tmp_path):
    write(tmp_path / "run", OLD)
    left = {"training/checkpoint-2/stream.safetensors": "", ".publishing.json.tmp": ""}
    write(tmp_path / "run" / ".training-whole", {**NEW, "config.yaml": "last", **left})
    with pytest.raises(CommandError, match="in its place now"), resumed_folder(tmp_path / "run"):
        pass
    assert content(tmp_path / "run") == {**IN_PLACE, "config.yaml": "last"}


def test_a_kill_while_a_stopped_run_is_taken_out_brings_the_model_back(tmp_path, monkeypatch):
    output, stopped = tmp_path / "run", {**OLD, "engram/engram_table.json": "{}", "training/run.json": "{}"}
    write(output, stopped)
    for at in (1, 2, 3):
        with monkeypatch.context() as patch:
            Failing(patch, at, OSError(5, "killed"), dies=True)
            with pytest.raises(OSError, match="killed"), resumed_folder(output):
                pass
        assert (output / "config.json").read_text() == ("old" if at == 1 else NOTICE)
        finish_interrupted(output)
        assert content(output) == stopped
        assert not list(output.glob(".*"))


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_a_killed_run_went_on_with_comes_back_until_a_commit(tmp_path, monkeypatch, goes_on):
    output, stopped = tmp_path / "run", {**OLD, "engram/engram_table.json": "1", "training/run.json": "{}"}
    write(output, stopped)
    with monkeypatch.context() as patch:
        Failing(patch, 4, OSError(5, "killed"), dies=True)
        run = resumed_folder(output)
        staging = run.__enter__()
        finish_interrupted(output)  # by whoever opens the model: the run is alive
        assert content(output) == {"config.json": NOTICE, "model-1.safetensors": "old", "notes.txt": "mine"}
        if goes_on:
            (staging / "engram" / "engram_table.json").write_text("2")
        error = OSError(5, "killed")
        with contextlib.suppress(OSError):
            run.__exit__(OSError, error, None)
    finish_interrupted(output)
    if not goes_on:
        assert content(output) == stopped
        return
    with pytest.raises(ValueError, match=r"a training goes on with the model.*train --resume --output"):
        check_folder(output)
    with (
        pytest.raises(CommandError, match=r"holds a model already .*; --resume goes on"),
        staged_folder(output, force=False),
    ):
        pass
    with resumed_folder(output) as staging:
        assert (staging / "engram" / "engram_table.json").read_text() == "2"
    del stopped["model-1.safetensors"]  # the new one has none of that name
    assert content(output) == {**stopped, "engram/engram_table.json": "2"}


def test_two_runs_that_could_go_on_are_named(tmp_path):
    write(tmp_path, {**OLD, "training/run.json": "{}", ".training-resumed/training/run.json": "{}"})
    with (
        pytest.raises(CommandError, match=r"holds 2 runs that ended early: \.training-resumed, "),
        resumed_folder(tmp_path),
    ):
        pass
    assert (tmp_path / "config.json").read_text() == "old"
