"""One rank on a host of its own, as tests/engram/ranks/test_hosts.py runs it. Prints "EVENT" lines as it goes.

host_trainer.py ADDRESS RANK FOLDER LAST_STEP TIMEOUT
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rank_runs import train

from sense_v2.engram.ranks.collectives import Ranks

address, rank, folder, last_step, timeout = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"tcp://{address}", rank=int(rank), world_size=2, timeout=timedelta(seconds=300)
)
ranks = Ranks(timeout_seconds=float(timeout), beat_seconds=0.3)
result = train(
    ranks,
    Path(folder),
    layout="shards",
    last_step=int(last_step),
    optimizer="adam",
    event=lambda name: print(name, flush=True),
)
ranks.barrier("end")
print("=" + json.dumps(result), flush=True)
