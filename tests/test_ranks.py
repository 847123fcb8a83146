"""Two processes on one table against one with twice the batch; started by torchrun, and by accelerate."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("ranks_trainer.py")
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
