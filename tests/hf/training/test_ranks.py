"""Two processes on one table against one with twice the batch; started by torchrun, and by accelerate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "ranks_trainer.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",  # of several processes on CPUs it knows only those of MPI; the script says that they are CPUs
    "--num_processes=2",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--main_process_port=0",
)

pytestmark = pytest.mark.slow


def train(folder, *launcher, batch_size, resume=False):
    """What each rank found."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, folder, str(batch_size), "resume" if resume else ""],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of a run in two processes, and what they found."""
    folder = tmp_path_factory.mktemp("together")
    return folder, train(folder, *TORCHRUN, batch_size=2)


def test_two_processes_give_what_one_with_twice_the_batch_gives(tmp_path, together):
    (alone,) = train(tmp_path, batch_size=4)
    folder, (writer, reader) = together
    assert alone["mode"] == writer["mode"] == reader["mode"] == "r+", "each stores to its own rows"
    assert writer["rows"] == reader["rows"], "both map one file"
    assert writer["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert writer["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert reader["norms"] == writer["norms"]
    np.testing.assert_allclose(writer["rows"], alone["rows"], atol=1e-5)
    rows = np.fromfile(folder / "engram_table.dat", dtype="<f4").reshape(-1, 8)
    assert rows.tolist() == writer["rows"]


def test_two_processes_resume_bit_for_bit(tmp_path, together):
    """From the copy in the checkpoint of step 2: the table has gone on to step 4. Started by accelerate, too."""
    folder, expected = together
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoint-4")
    for path in (tmp_path / "again").glob("rank*.json"):
        path.unlink()
    assert train(tmp_path / "again", *ACCELERATE, batch_size=2, resume=True) == expected


# --- the example, which torchrun starts again ---


def test_after_a_crash_torchrun_goes_on_and_ends_with_the_bits_of_one_process(tmp_path):
    """Rank 1 is killed in step 5, after the commit of step 4."""
    script = Path(__file__).parents[3] / "examples" / "train_torchrun.py"
    settings = ["--steps=6", "--commit-every=2"]

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    alone = run(script, *settings, "--output=alone")
    assert alone.returncode == 0, alone.stderr
    dies = Path(__file__).parents[2] / "torchrun_dies.py"
    done = run(*TORCHRUN, "--max-restarts=1", dies, 5, script, *settings, "--output=two")
    assert done.returncode == 0, done.stderr
    last = [out.stdout.splitlines()[-1].split(";")[0] for out in (alone, done)]
    assert last[0] == last[1]
    assert last[0].startswith("step 6: loss ")
    for name in ("engram_table.dat", "engram_table.adagrad.dat"):
        assert (tmp_path / "two/engram" / name).read_bytes() == (tmp_path / "alone/engram" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").glob("weights-*")) == ["weights-6"]
    # What torchrun says of the one that was killed.
    assert "rank      : 1" in done.stderr or "local_rank: 1" in done.stderr
