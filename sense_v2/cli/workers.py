"""--processes and --ray -> who works through a corpus."""

from __future__ import annotations

import sys

from sense_v2.core.errors import CommandError
from sense_v2.hf.data.workers import Processes, RayCluster


def chosen_workers(processes: int | None, ray: str | None) -> Processes | RayCluster:
    """One process where neither is given. Raises `CommandError` where both are."""
    if processes is not None and ray is not None:
        raise CommandError("--processes and --ray both say who works", "give one of them")
    progress = sys.stderr.isatty()
    if ray is not None:
        return RayCluster(ray, progress=progress)
    return Processes(1 if processes is None else processes, progress=progress)
