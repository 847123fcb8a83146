"""A command or a call, with the library of faults_below_python.c preloaded: each of its file calls fails in turn.

    LD_PRELOAD=faults.so python faults_below_python.py FOLDER OPERATION MOMENTS

Each moment is a fork of its own, on a fresh copy of FOLDER. Afterwards its table opens with the rows of before or of
after, and with those of after if the operation said that it was done. Prints one line of JSON.
"""

import ctypes
import errno
import gc
import json
import os
import random
import shutil
import sys
import warnings
from pathlib import Path

import torch

from sense_v2.cli.main import main
from sense_v2.engram.delta.apply import open_table_as_it_is
from sense_v2.engram.upkeep.check import check_table
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.saving.save import save_pretrained

LIBRARY = ctypes.CDLL(None)
TABLE = Path("base/engram/engram_table.dat")


def commit(folder):
    storage = open_table_as_it_is(folder / TABLE, mode="r+")
    storage.write(torch.tensor([3, 900]), torch.full((2, 8), 2.0))
    storage.commit(step=7)


def save(folder):
    save_pretrained(from_pretrained(folder / "taught"), folder / "base")


def apply(folder):
    assert main(["delta", "apply", str(folder / "delta.safetensors"), str(folder / "base")]) == 0


def train(folder):
    words = ["--corpus", folder / "corpus", "--output", folder / "base", "--force", "--config", folder / "run.yaml"]
    assert main(["train", *map(str, words)]) == 0


def attempt(operation, folder, moment, number, stays):
    """(whether it said that it was done, how many calls there were)"""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        LIBRARY.fault_arm(os.fsencode(folder), ctypes.c_long(moment), number, stays)
        try:
            operation(folder)
            gc.collect()
            is_done = True
        except BaseException:
            is_done = False
        count = LIBRARY.fault_count()
        LIBRARY.fault_arm(b"", ctypes.c_long(0), 0, 0)
        os.write(write, json.dumps([is_done, count]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        found = said.read()
    os.waitpid(child, 0)
    return json.loads(found) if found else (False, 0)


def state(folder):
    """What the folder says, once it was opened as a user would: rows, and the loss of the model's own words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that rows were put back, and where a run that ended early is
        model = from_pretrained(folder / "base", mode="r+")  # which puts rows back
        with torch.no_grad():
            logits = model(torch.arange(3, 13)[None]).logits
        model.engram.storage.close()
        assert check_table(folder / TABLE).num_wrong == 0
        storage = open_table_as_it_is(folder / TABLE)
    return storage.identity().digest, round(float(logits.double().abs().sum()), 4)


def run(original, name, wanted):
    operation, work = globals()[name], original.with_name("work")

    def fresh():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(original, work)

    fresh()
    before = state(work)
    is_done, calls = attempt(operation, work, 0, 0, 0)
    assert is_done, calls
    after = state(work)
    assert after != before
    moments = sorted(random.Random(name).sample(range(1, calls + 1), min(wanted, calls)))
    ends = {"before": 0, "after": 0, "done": 0}
    for moment in moments:
        number, stays = ((errno.ENOSPC, 1), (errno.EIO, 0))[moment % 2]
        fresh()
        is_done, _ = attempt(operation, work, moment, number, stays)
        found = state(work)
        assert found in (before, after), f"call {moment}: {found} is neither {before} nor {after}"
        assert found == after or not is_done, f"call {moment}: it said it was done, and it wasn't"
        ends["after" if found == after else "before"] += 1
        ends["done"] += is_done
    print(json.dumps({"calls": calls, "failed": len(moments), **ends}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
