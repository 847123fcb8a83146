"""Runs a script that torchrun started; in torchrun's first attempt rank 1 kills itself in the middle of a step.

torchrun_dies.py STEP SCRIPT ARGUMENTS…
"""

import os
import runpy
import signal
import sys

from sense_v2.hf.training.ranks import GlobalStep

finish = GlobalStep.finish
taken = 0


def finish_or_die(step: GlobalStep, max_norm: float | None = None) -> tuple[float, float]:
    global taken
    taken += 1
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first and os.environ["RANK"] == "1" and taken == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(step, max_norm)


number, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
GlobalStep.finish = finish_or_die  # type: ignore[method-assign]
runpy.run_path(script, run_name="__main__")
