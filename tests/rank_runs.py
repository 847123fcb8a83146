"""Runs a function in several processes with torch.distributed between them, many times, without starting Python anew.

A server that has torch imported forks the ranks of each run; they meet in a file. It kills or stops one where it is
asked to: when that rank has told of an event often enough. What the ranks run are the functions below; their results
and errors come back by rank.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import importlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from disk_calls import half, watched

from sense_v2.engram.optim import RowAdam, RowWiseAdagrad
from sense_v2.engram.ranks import global_commit
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.sharded_table import ShardedTable

HANGS_AFTER_SECONDS = 150.0
ROWS, WIDTH = 97, 8
# First rows of eight heads.
HEADS = (0, 13, 24, 35, 48, 60, 71, 83)
NUM_MICRO_BATCHES = 4
OPTIMIZERS: dict[str, Any] = {
    "adagrad": functools.partial(RowWiseAdagrad, lr=0.1),
    "adam": functools.partial(RowAdam, lr=0.02),
}


# What ranks run


def open_table(ranks: Ranks, folder: Path, layout: str, **settings: Any) -> ShardedTable:
    path = folder / "table.dat"
    return ShardedTable(
        ROWS, WIDTH, path, ranks=ranks, layout=layout, head_rows=HEADS, seed=3, init_std=0.5, **settings
    )


def micro_batch(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ids [5, 3] with repetitions, some of them of no row that another micro-batch has; targets [5, WIDTH]. In
    step 3 all rows are of the first head, which one rank owns."""
    chance = np.random.default_rng((step, number))
    ids = chance.integers(0, HEADS[1] if step == 3 else ROWS, (5, 3))
    return torch.from_numpy(ids), torch.from_numpy(chance.normal(size=(5, WIDTH)).astype(np.float32))


def backward(table: ShardedTable, step: int, number: int) -> float:
    row_ids, targets = micro_batch(step, number)
    table.begin(row_ids)
    loss = (torch.tanh(table(row_ids).sum(dim=1)) - targets).square().mean()
    loss.backward()
    return float(loss)


def train_steps(
    ranks: Ranks,
    table: ShardedTable,
    steps: range,
    *,
    optimizer: str = "adagrad",
    commit_every: int = 2,
    event: Callable[[str], None] = lambda name: None,
) -> list[list[float]]:
    """Losses of every step, by micro-batch."""
    rows = table.row_optimizer(OPTIMIZERS[optimizer])
    num_own = NUM_MICRO_BATCHES // ranks.num_ranks
    losses = []
    for step in steps:
        own = [backward(table, step, number) for number in range(ranks.rank * num_own, (ranks.rank + 1) * num_own)]
        table.exchange_gradients()
        event("exchanged")
        # Clipped, and by a norm that all must agree on.
        table.scale_gradients(min(1.0, 0.05 / (table.gradient_norm() + 1e-6)))
        table.step_rows(rows)
        event("stepped")
        losses.append(list(itertools.chain(*ranks.gather("losses", own))))
        if step % commit_every == 0:
            event("commit")
            table.commit(step, extra={"losses": losses[-1]})
            event("committed")
    return losses


def whole(table: ShardedTable) -> dict[str, Any]:
    """This rank's own rows and states, as numbers."""
    local = slice(*(row - table.own_file.first_row for row in (table.own_rows.start, table.own_rows.stop)))
    return {
        "rows": table.own.weight[local].tolist(),
        "states": {name: state.values[local].tolist() for name, state in table.own._states.items()},
        "state_steps": {name: state.step for name, state in table.own._states.items()},
        "step": table.committed_step,
        "generation": table.generation,
    }


def train(
    ranks: Ranks,
    folder: Path,
    *,
    layout: str,
    last_step: int,
    optimizer: str = "adagrad",
    first_commits: bool = True,
    die: list[Any] | None = None,
    event: Callable[[str], None] = lambda name: None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains from the last commit on to `last_step`. `die`: (rank, its call number, "before" or "amid")."""
    doomed = die is not None and die[0] == ranks.rank
    with watched(_killer(*die[1:])) if die is not None and doomed else contextlib.nullcontext():
        table = open_table(ranks, folder, layout, **settings)
        found = {"step": table.committed_step or 0, "generation": table.generation}
        event("open")
        losses = train_steps(ranks, table, range(found["step"] + 1, last_step + 1), optimizer=optimizer, event=event)
        result = {"found": found, "losses": losses, **whole(table)}
        table.close()
    return result


def count_calls(ranks: Ranks, folder: Path, *, event: Callable[[str], None], **arguments: Any) -> list[str]:
    """The names of the calls that change what is on this rank's disk."""
    calls: list[str] = []

    def around(name: str, call: Callable[..., Any], *given: Any) -> Any:
        calls.append(name)
        return call(*given)

    with watched(around):
        train(ranks, folder, event=event, **arguments)
    return calls


def overlap(ranks: Ranks, folder: Path, *, event: Callable[[str], None]) -> dict[str, Any]:
    """Rank 1 begins late; when rank 0 gets its rows, and when `begin` let it go on."""
    table = open_table(ranks, folder, "shards", dtype="bfloat16")
    ranks.barrier("start")
    if ranks.rank == 1:
        time.sleep(0.5)
    started = time.monotonic()
    row_ids = torch.tensor([0, 96, 50])
    table.begin(row_ids)
    begun = time.monotonic() - started
    rows = table(row_ids)
    got = time.monotonic() - started
    assert rows.dtype == torch.bfloat16
    return {"begun_seconds": begun, "got_seconds": got, "rows": rows.tolist()}


def refusals(ranks: Ranks, folder: Path, *, event: Callable[[str], None]) -> dict[str, str]:
    """What is said of a forward without `begin`, of an id outside, of unequal numbers of micro-batches."""
    table = open_table(ranks, folder, "shards")
    told = {}
    table.begin(torch.tensor([3]))
    for name, call in (
        ("forward", lambda: table(torch.tensor([3, 4]))),
        ("outside", lambda: table.begin(torch.tensor([ROWS]))),
    ):
        try:
            call()
        except (ValueError, IndexError) as error:
            told[name] = str(error)
    table.clear_gradients()
    # An evaluation is no micro-batch.
    for training in (True, ranks.rank == 0):
        table.train(training)
        table.begin(torch.tensor([3]))
    try:
        table.exchange_gradients()
    except RuntimeError as error:
        told["numbers"] = str(error)
    return told


def as_one(ranks: Ranks, folder: Path, *, layout: str, event: Callable[[str], None]) -> dict[str, Any]:
    """What a contract asks of every table, of one that two ranks have; each rank looks up other ids."""

    def told(*calls: Callable[[], Any]) -> list[str]:
        found = []
        for call in calls:
            try:
                found.append(str(call()))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    table = open_table(ranks, folder, layout).eval()
    mine, others = (0, ROWS - 1) if ranks.rank == 0 else (ROWS - 1, 0)
    ones = torch.ones(1, WIDTH)
    table.write(torch.tensor([mine]), (ranks.rank + 1) * ones)
    ranks.barrier("written")
    state = table.open_state("adam", WIDTH)
    result: dict[str, Any] = {"rows": [], "types": [], "others_row": others}
    for ids in (
        torch.tensor([[0, 96, 50], [96, 3, 3]])[:, ranks.rank :],
        torch.tensor(7 + ranks.rank),
        torch.empty(0, 3, dtype=torch.int64),
        torch.arange(ROWS, dtype=torch.int32).reshape(1, -1).T if ranks.rank else torch.tensor([1]),
    ):
        table.begin(ids)
        table.prefetch(ids)
        rows = table(ids)
        result["rows"].append([ids.tolist(), rows.tolist()])
    result["types"] = [str(rows.dtype), str(table.gather(torch.tensor([mine])).dtype)]
    outside, theirs = torch.tensor([ROWS]), torch.tensor([others])
    result["outside"] = told(lambda: table.begin(outside), lambda: table(outside), lambda: table.prefetch(outside))
    result["others"] = [
        text[: text.index(" rows") + 5]
        for text in told(
            lambda: table.write(theirs, ones),
            lambda: table.protect(theirs),
            lambda: table.write_state(state, theirs, ones),
        )
    ]
    table.commit()
    table.close()
    (result["closed"],) = told(lambda: table.begin(torch.tensor([1])))
    return result


def come_late(ranks: Ranks, folder: Path, *, layout: str, event: Callable[[str], None]) -> None:
    """Rank 1 does something else for longer than the others wait."""
    table = open_table(ranks, folder, layout)
    if ranks.rank == 1:
        time.sleep(3)
    table.commit(1)


def fail_to_prepare(ranks: Ranks, folder: Path, *, layout: str, event: Callable[[str], None]) -> None:
    """Rank 1 has no room for its commit."""
    table = open_table(ranks, folder, layout)

    def fail(*arguments: Any, **settings: Any) -> Any:
        raise OSError(errno.ENOSPC, "no room: here")

    if ranks.rank == 1:
        table.own.prepared_commit = fail  # type: ignore[method-assign]
    table.commit(1)


def die_before_finishing(ranks: Ranks, folder: Path, *, layout: str, event: Callable[[str], None]) -> None:
    """Rank 1 dies when the commit is decided, before it knows."""
    table = open_table(ranks, folder, layout)
    if ranks.rank == 1:
        global_commit._go_forward = lambda files: os.kill(os.getpid(), signal.SIGKILL)
    train_steps(ranks, table, range(1, 3))


def _killer(number: int, moment: str) -> Callable[..., Any]:
    numbers = itertools.count()

    def around(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if next(numbers) == number:
            if moment == "amid":
                half(name, call, arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return around


# The server


def _be_rank(rank: int, request: dict[str, Any], folder: Path, pipe: int) -> None:
    def event(name: str) -> None:
        os.write(pipe, f"{rank} {name}\n".encode())

    try:
        num_ranks = request["num_ranks"]
        if num_ranks > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meet",
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=30),
            )
        ranks = Ranks(timeout_seconds=request["timeout_seconds"], beat_seconds=0.15)
        call = getattr(sys.modules[request["module"]], request["call"])
        result = call(ranks, Path(request["folder"]), event=event, **request["arguments"])
        message = {"result": result}
        ranks.barrier("end")
    except BaseException as error:
        message = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    (folder / f"rank{rank}.part").write_text(json.dumps(message))
    os.replace(folder / f"rank{rank}.part", folder / f"rank{rank}.json")
    os._exit(0)


def _answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank returned or raised, or how it ended."""
    folder = Path(tempfile.mkdtemp(prefix="sense-v2-ranks-"))
    ours, theirs = os.pipe()
    children = []
    for rank in range(request["num_ranks"]):
        child = os.fork()
        if child == 0:
            os.close(ours)
            _be_rank(rank, request, folder, theirs)
        children.append(child)
    os.close(theirs)
    _listen(ours, children, request["signal"])
    answers = []
    for rank, child in enumerate(children):
        status = os.waitpid(child, 0)[1]
        path = folder / f"rank{rank}.json"
        if os.WIFSIGNALED(status):
            answers.append({"killed": os.WTERMSIG(status)})
        else:
            answers.append(json.loads(path.read_text()) if path.exists() else {"error": f"status {status}"})
    shutil.rmtree(folder)
    return answers


def _listen(pipe: int, children: list[int], wanted: list[Any] | None) -> None:
    """Until all have ended; `wanted` is (rank, event, how often, seconds after it, signal)."""
    text, sent, hung_at = b"", False, time.monotonic() + HANGS_AFTER_SECONDS
    stopped: int | None = None
    with os.fdopen(pipe, "rb", buffering=0) as file:
        while True:
            if not select.select([file], [], [], 0.05)[0]:
                if time.monotonic() > hung_at:
                    for child in children:
                        os.kill(child, signal.SIGKILL)
                    hung_at = float("inf")
                if stopped is not None and _all_others_ended(children, stopped):
                    os.kill(stopped, signal.SIGKILL)
                    stopped = None
                continue
            part = file.read(1 << 16)
            text += part
            if wanted and not sent:
                rank, event, count, delay, number = wanted
                if text.decode().splitlines().count(f"{rank} {event}") >= count:
                    time.sleep(delay)
                    os.kill(children[rank], number)
                    sent = True
                    if number == signal.SIGSTOP:
                        stopped = children[rank]
            if not part:
                return


def _all_others_ended(children: list[int], stopped: int) -> bool:
    for child in children:
        if child != stopped and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
    return True


def serve() -> None:
    torch.set_num_threads(1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    # What is imported at its first use: a fork would do that again and again.
    torch.optim.SGD([torch.empty(0)])
    torch.unique(torch.zeros(2, dtype=torch.int64), return_inverse=True)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


class Server:
    """The other end: starts the server as a program, and asks it."""

    def __init__(self, module: str | None = None) -> None:
        self._module = module or "__main__"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *([module] if module else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def ask(
        self,
        call: str,
        num_ranks: int,
        folder: Path,
        *,
        send: tuple[int, str, int, float, int] | None = None,
        timeout_seconds: float = 20.0,
        **arguments: Any,
    ) -> list[dict[str, Any]]:
        """What each rank did; see `_answer`."""
        folder.mkdir(parents=True, exist_ok=True)
        request = {
            "call": call,
            "num_ranks": num_ranks,
            "folder": str(folder),
            "signal": send,
            "timeout_seconds": timeout_seconds,
            "module": self._module,
            "arguments": arguments,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        # PyTorch 2.8's Gloo says there, too, which ranks are connected.
        answer = next(line for line in self._process.stdout if line.startswith("[{"))
        answers: list[dict[str, Any]] = json.loads(answer)
        return answers

    def results(self, call: str, num_ranks: int, folder: Path, **arguments: Any) -> list[Any]:
        """What each rank returned, of a run that nobody disturbs."""
        answers = self.ask(call, num_ranks, folder, timeout_seconds=90.0, **arguments)
        for answer in answers:
            assert "result" in answer, answer.get("trace", answer)
        return [answer["result"] for answer in answers]

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def rank_server(module: str | None = None) -> Iterator[Server]:
    """`module` is where the functions to be called are, if not here."""
    server = Server(module)
    try:
        yield server
    finally:
        server.close()


if __name__ == "__main__":
    serve()
