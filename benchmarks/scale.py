"""What rows that lie on several ranks cost: bytes and time measured at 1, 2 and 4 processes, and a model for more.

The physics. A micro-batch of T tokens looks up U distinct rows (H a token, repetitions once). Of these, (W - 1) / W
belong to others: 8 bytes an id go there, 4 × D bytes a row come back, and gradients travel the same way once more. U
grows slower than T, since n-grams repeat, and knows nothing of how large the table is: neither do the bytes. What a
larger table costs is on its owner's disk: fewer of the rows asked for are in memory.

Measured: `ShardedTable` (layout "shards") between stand-ins for a model's layers, two before the memory and two
after, fed with the row ids of the standard library's text. Strong scaling: four micro-batches a step, divided among
the ranks. Weak: one micro-batch a rank. Every number of ranks is measured several times, in turn. Ranks are processes
of this machine and talk over its loopback: bytes and what is hidden behind the layers mean something, times only as
far as there is a core for each rank.

The model: bytes are counted from U, W and D, and held against what was sent. Time is the layers', plus what of the
exchange they don't hide, with the messages and bytes a second of `Cluster`, whose numbers for this machine are
measured in the same run and for larger ones are assumed and printed.

    python benchmarks/scale.py [--quick] [--picture docs/scale.png]

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from turns import machine, prepare_text

from sense_v2.core.config import EngramConfig
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.optim import RowWiseAdagrad
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.sharded_table import ShardedTable
from sense_v2.engram.tokenizer import EngramTokenizer
from sense_v2.report.plots import PALETTE, style

WORLD_SIZES = (1, 2, 4)
MICRO_BATCHES = 4
HIDDEN, WIDTH = 512, 64
ID_BYTES, VALUE_BYTES = 8, 4
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Plan:
    tokens: int
    """Of a micro-batch."""
    rows: int
    steps: int
    rounds: int


FULL, QUICK = Plan(tokens=2048, rows=500_000, steps=8, rounds=3), Plan(tokens=256, rows=20_000, steps=3, rounds=1)
WARM_UP_STEPS = 2


# Measuring


@dataclass(frozen=True)
class Job:
    folder: Path
    plan: Plan
    micro_batches: int
    """Of a step, over all ranks."""
    num_ranks: int
    head_rows: tuple[int, ...]
    turn: int


def be_rank(rank: int, job: Job, results: Any) -> None:
    """One process: trains, and rank 0 tells what all measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=job.folder) as own_disk:
        if job.num_ranks > 1:
            meeting = f"file://{job.folder / f'meeting-{job.turn}'}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.num_ranks)
        ranks = Ranks()
        found = {"link": measure_link(ranks), "steps": train(ranks, job, Path(own_disk))}
        everyone = ranks.gather("results", found)
        if rank == 0:
            results.put(everyone)
        ranks.barrier("end")
        ranks.close()


def train(ranks: Ranks, job: Job, own_disk: Path) -> list[dict[str, Any]]:
    row_ids_MTH = torch.from_numpy(np.load(job.folder / "row_ids.npy"))
    heads = row_ids_MTH.shape[-1]
    path = own_disk / "table.dat"
    table = ShardedTable(
        job.plan.rows, WIDTH, path, ranks=ranks, layout="shards", head_rows=job.head_rows, init_std=0.02
    ).train()
    before, after = layers(), layers()
    value = nn.Linear(heads * WIDTH, HIDDEN)
    rows = table.row_optimizer(RowWiseAdagrad, lr=0.05)
    own = job.micro_batches // ranks.num_ranks
    steps = []
    for step in range(WARM_UP_STEPS + job.plan.steps):
        ranks.barrier("step")
        ranks.take_sent_bytes()
        table.take_traffic()
        started, first_layers = time.perf_counter(), 0.0
        unique = 0
        for number in range(own):
            micro_batch = (step * job.micro_batches + ranks.rank * own + number) % len(row_ids_MTH)
            row_ids_TH = row_ids_MTH[micro_batch]
            unique += len(torch.unique(row_ids_TH))
            table.begin(row_ids_TH)
            since = time.perf_counter()
            hidden_TC = before(torch.ones(len(row_ids_TH), HIDDEN))
            first_layers += time.perf_counter() - since
            rows_THD = table(row_ids_TH)
            after(hidden_TC + value(rows_THD.flatten(1))).square().mean().backward()
        since = time.perf_counter()
        table.exchange_gradients()
        table.step_rows(rows)
        ended = time.perf_counter()
        traffic = table.take_traffic()
        steps.append(
            {
                "seconds": ended - started,
                "first_layers_seconds": first_layers,
                "lookup_seconds": traffic.exchange_seconds,
                "waited_seconds": traffic.waited_seconds,
                "update_seconds": ended - since,
                "sent_bytes": traffic.sent_bytes,
                "unique_rows": unique,
            }
        )
    table.commit()
    table.close()
    return steps[WARM_UP_STEPS:]


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))


def measure_link(ranks: Ranks) -> dict[str, float]:
    """What an exchange of nothing takes, and how fast bytes leave a rank: the ceilings here."""
    if ranks.num_ranks == 1:
        return {"call_seconds": 0.0, "bytes_per_second": float("inf")}

    def exchange(num_bytes: int) -> float:
        values = torch.zeros(num_bytes * ranks.num_ranks, dtype=torch.uint8)
        counts = [num_bytes] * ranks.num_ranks
        started = time.perf_counter()
        ranks.all_to_all("link", values, counts, counts)
        return time.perf_counter() - started

    large = 1 << 22
    calls = statistics.median(exchange(8) for _ in range(60))
    seconds = statistics.median(exchange(large) for _ in range(7)) - calls
    return {"call_seconds": calls, "bytes_per_second": large * (ranks.num_ranks - 1) / seconds}


def run(job: Job) -> list[dict[str, Any]]:
    """What each rank measured."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [context.Process(target=be_rank, args=(rank, job, results)) for rank in range(job.num_ranks)]
    for child in children:
        child.start()
    try:
        found: list[dict[str, Any]] = results.get(timeout=600)
    finally:
        for child in children:
            child.join(timeout=30)
            child.kill()
    return found


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of several runs with one number of ranks: medians over steps and runs, of the mean rank."""
    steps = [
        {name: statistics.mean(rank["steps"][number][name] for rank in ranks) for name in NUMBERS}
        for ranks in runs
        for number in range(len(ranks[0]["steps"]))
    ]
    phases = sorted(
        {phase for ranks in runs for rank in ranks for step in rank["steps"] for phase in step["sent_bytes"]}
    )
    sent = {
        phase: statistics.mean(
            step["sent_bytes"].get(phase, 0) for ranks in runs for rank in ranks for step in rank["steps"]
        )
        for phase in phases
    }
    links = [rank["link"] for ranks in runs for rank in ranks]
    return {
        **{name: statistics.median(step[name] for step in steps) for name in NUMBERS},
        "unique_rows": statistics.mean(step["unique_rows"] for step in steps),
        "sent_bytes": sent,
        "link": {name: statistics.median(link[name] for link in links) for name in links[0]},
    }


NUMBERS = ("seconds", "first_layers_seconds", "lookup_seconds", "waited_seconds", "update_seconds", "unique_rows")


# The model


def predicted_bytes(unique_rows: float, num_ranks: int, width: int, micro_batches: int = 1) -> dict[str, float]:
    """What a rank sends in a step: its micro-batches' `unique_rows` in all, ids and rows there and back.

    Gradients of a rank's micro-batches are summed before they travel where the fixed order allows it; this counts
    them as if none were, so it is the most that can travel.
    """
    away = (num_ranks - 1) / num_ranks
    return {
        "lookup: counts": ID_BYTES * (num_ranks - 1) * micro_batches,
        "lookup: ids": ID_BYTES * unique_rows * away,
        "lookup: rows": VALUE_BYTES * width * unique_rows * away,
        "gradients: ids": ID_BYTES * unique_rows * away,
        "gradients: rows": VALUE_BYTES * width * unique_rows * away,
    }


@dataclass(frozen=True)
class Cluster:
    """What a run's machines can do. The defaults are assumptions, and no measurement: a host with 8 accelerators."""

    ranks_per_host: int = 8
    link_bytes_per_second: float = 25e9
    """Of a host, shared by its ranks (200 Gbit/s)."""
    call_seconds: float = 50e-6
    """Of an exchange, whatever it carries, and"""
    peer_seconds: float = 2e-6
    """for each rank that takes part."""
    disk_reads_per_second: float = 2e6
    """Random pages, of a host's disks together."""
    disk_bytes: float = 60e12
    """Of a host."""
    cache_bytes: float = 512e9
    """Of a host's memory for the rows' pages."""
    gather_bytes_per_second: float = 5e9
    """Rows out of the page cache, and into it."""
    tokens: int = 16_384
    """Of a rank's micro-batch."""
    layers_seconds: float = 0.3
    """Forward and backward of a micro-batch,"""
    first_layers_seconds: float = 0.01
    """of which before the first memory layer."""

    def hosts(self, num_ranks: int) -> int:
        return -(-num_ranks // self.ranks_per_host)

    def missed(self, num_rows: float, num_ranks: int, width: int) -> float:
        """The share of rows that aren't in memory: n-grams by Zipf's law with exponent 1 over all rows, the hottest
        in memory, each with a page of its own."""
        held = self.hosts(num_ranks) * self.cache_bytes / max(PAGE_BYTES, VALUE_BYTES * width)
        return max(0.0, 1.0 - float(np.log1p(held) / np.log1p(num_rows)))

    def step(self, unique_rows: float, num_ranks: int, num_rows: float, width: int) -> dict[str, float]:
        """A step of one micro-batch a rank."""
        hosts = self.hosts(num_ranks)
        on_host = min(num_ranks, self.ranks_per_host)
        sent = predicted_bytes(unique_rows, num_ranks, width)
        leaves_host = 0.0 if hosts == 1 else (num_ranks - on_host) / (num_ranks - 1)
        call = self.call_seconds + self.peer_seconds * (num_ranks - 1) if num_ranks > 1 else 0.0

        def travel(phases: str) -> float:
            num_bytes = sum(count for phase, count in sent.items() if phase.startswith(phases))
            return 3 * call + num_bytes * leaves_host * on_host / self.link_bytes_per_second

        gather = unique_rows * VALUE_BYTES * width / self.gather_bytes_per_second
        read = self.missed(num_rows, num_ranks, width) * unique_rows * on_host / self.disk_reads_per_second
        lookup = travel("lookup") + gather + read
        waited = max(0.0, lookup - self.first_layers_seconds)
        update = travel("gradients") + 2 * gather
        return {
            "seconds": self.layers_seconds + waited + update,
            "lookup_seconds": lookup,
            "waited_seconds": waited,
            "update_seconds": update,
            "read_seconds": read,
            "sent_bytes": sum(sent.values()),
            "table_bytes_a_host": num_rows * (VALUE_BYTES * width + VALUE_BYTES) / hosts,
        }


def unique_growth(row_ids_TH: np.ndarray, largest: int) -> tuple[float, float, list[tuple[int, int]]]:
    """(a, b) of U = a · T^b (Heaps' law) for row ids of a running text, and the points it was fitted to."""
    points = []
    size = 256
    while size <= min(largest, len(row_ids_TH)):
        points.append((size, len(np.unique(row_ids_TH[:size]))))
        size *= 2
    sizes, unique = np.log(np.array(points)).T
    b, log_a = np.polyfit(sizes, unique, 1)
    return float(np.exp(log_a)), float(b), points


COLOURS = [PALETTE[name] for name in ("run-engram", "run-random_rows", "run-shuffled", "run-plain")]
RANKS = (8, 64, 1024)
TABLES = (10**9, 10**10, 10**11, 10**12)


def draw(path: Path, strong: dict[int, dict[str, Any]], model: dict[str, Any]) -> None:
    """Left: bytes by the model and as measured. Right: a step's time by the model, for tables of several sizes."""
    widths = [2**power for power in range(11)]
    unique = strong[1]["unique_rows"] / MICRO_BATCHES
    curve = [sum(predicted_bytes(unique, width, WIDTH).values()) / 1e6 for width in widths]
    measured = {w: sum(found["sent_bytes"].values()) / (MICRO_BATCHES // w) / 1e6 for w, found in strong.items()}
    with matplotlib.rc_context(style(10)):
        figure = Figure(figsize=(10, 4), dpi=150, facecolor=PALETTE["page"], layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(widths, curve, color=COLOURS[0], label="by the model")
        left.plot(list(measured), list(measured.values()), "o", color=COLOURS[1], label="measured")
        left.set(xscale="log", ylim=(0, None), ylabel="MB", title="Sent by a rank for a micro-batch")
        for number, table in enumerate(TABLES):
            times = [1e3 * model["clusters"][f"{ranks} ranks, {table:.0e} rows"]["seconds"] for ranks in RANKS]
            name = f"$10^{{{int(np.log10(table))}}}$ rows"
            right.plot(RANKS, times, marker="os^D"[number], color=COLOURS[number], label=name)
        layers_ms = 1e3 * Cluster().layers_seconds
        right.axhline(layers_ms, color=PALETTE["muted"], linestyle=":", label="the layers alone")
        right.set(xscale="log", ylim=(0, None), ylabel="ms", title="A step by the model, on assumed hosts")
        for axes, ticks in ((left, widths[::2]), (right, RANKS)):
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("ranks")
            axes.legend(frameon=False)
        figure.savefig(path)


def hasher_of(config: EngramConfig, shadow_map: EngramTokenizer) -> NgramHasher:
    return NgramHasher.from_config(
        config, layer_id=1, compressed_vocab_size=shadow_map.compressed_vocab_size, pad_id=0
    )


def measure(plan: Plan, folder: Path) -> dict[str, Any]:
    config = EngramConfig(table_size=plan.rows, engram_dim=16 * WIDTH, num_heads=8, layer_indices=[1])
    text = prepare_text(folder, 2**22 if plan is FULL else 2**20)
    shadow_map = EngramTokenizer(text.folder / "shadow_map.npy")
    hasher = hasher_of(config, shadow_map)
    token_ids = np.load(text.folder / "train.npy").astype(np.int64)
    needed = plan.tokens * (WARM_UP_STEPS + plan.steps) * max(WORLD_SIZES)
    token_ids = token_ids[: max(needed, 1 << 17)]
    row_ids_TH = hasher(shadow_map(token_ids[None]))[0]
    blocks = len(row_ids_TH) // plan.tokens
    np.save(folder / "row_ids.npy", row_ids_TH[: blocks * plan.tokens].reshape(blocks, plan.tokens, -1))
    head_rows = hasher.layout.offsets_LH[0]
    found: dict[str, dict[int, list[Any]]] = {"strong": {}, "weak": {}}
    turn = 0
    for _ in range(plan.rounds):
        for kind, by_ranks in found.items():
            for num_ranks in WORLD_SIZES:
                turn += 1
                micro_batches = MICRO_BATCHES if kind == "strong" else num_ranks
                job = Job(folder, plan, micro_batches, num_ranks, head_rows, turn)
                by_ranks.setdefault(num_ranks, []).append(run(job))
    # In a table so large that hardly any n-grams share a row; hashing needs none.
    large = dataclasses.replace(config, table_size=10**9)
    a, b, points = unique_growth(hasher_of(large, shadow_map)(shadow_map(token_ids[None]))[0], 1 << 17)
    return {
        "strong": {num_ranks: summary(runs) for num_ranks, runs in found["strong"].items()},
        "weak": {num_ranks: summary(runs) for num_ranks, runs in found["weak"].items()},
        "unique_growth": {"a": a, "b": b, "points": points},
    }


def check_model(strong: dict[int, dict[str, Any]]) -> dict[int, Any]:
    """Predicted against measured, for the steps measured here."""
    alone = strong[1]
    own_layers = alone["seconds"] - alone["waited_seconds"] - alone["update_seconds"]
    found = {}
    for num_ranks, measured in strong.items():
        if num_ranks == 1:
            continue
        share = 1 / num_ranks
        micro_batches = MICRO_BATCHES // num_ranks
        link = measured["link"]
        bytes_sent = predicted_bytes(measured["unique_rows"], num_ranks, WIDTH, micro_batches)

        def travel(
            phases: str, calls: int, sent: dict[str, float] = bytes_sent, link: dict[str, float] = link
        ) -> float:
            num_bytes = sum(count for phase, count in sent.items() if phase.startswith(phases))
            return calls * link["call_seconds"] + num_bytes / link["bytes_per_second"]

        # More ranks than cores take turns.
        crowd = max(1.0, num_ranks / (os.cpu_count() or 1))
        lookup = travel("lookup", 3 * micro_batches) + alone["lookup_seconds"] * share
        waited = max(0.0, lookup - alone["first_layers_seconds"] * share)
        update = travel("gradients", 5) + alone["update_seconds"] * share
        seconds = crowd * (own_layers * share + waited + update)
        travelling = ("lookup: ids", "lookup: rows", "gradients: ids", "gradients: rows")
        found[num_ranks] = {
            "bytes": {name: bytes_sent[name] / measured["sent_bytes"][name] for name in travelling},
            "seconds": seconds / measured["seconds"],
        }
    return found


def tell_measured(plan: Plan, result: dict[str, Any], checked: dict[int, Any]) -> None:
    strong = result["strong"]
    unique = strong[1]["unique_rows"] / MICRO_BATCHES
    print(f"{plan.tokens} tokens a micro-batch, {unique:,.0f} distinct rows of {WIDTH} float32")
    for num_ranks in WORLD_SIZES[1:]:
        link = strong[num_ranks]["link"]
        print(
            f"ceiling, {num_ranks} ranks: an exchange of nothing {1e3 * link['call_seconds']:.2f} ms, "
            f"{link['bytes_per_second'] / 1e9:.2f} GB/s out of a rank"
        )
    for kind in ("strong", "weak"):
        print(f"\n{kind:6}  a step   lookups  waited  hidden  update   sent a step and rank")
        for num_ranks, found in result[kind].items():
            hidden = 1 - found["waited_seconds"] / found["lookup_seconds"]
            sent = [f"{phase} {count / 1e6:.2f} MB" for phase, count in found["sent_bytes"].items() if count > 1e3]
            print(
                f"{num_ranks:4}  {1e3 * found['seconds']:7.1f} ms {1e3 * found['lookup_seconds']:7.1f} "
                f"{1e3 * found['waited_seconds']:7.1f}  {hidden:5.0%}  {1e3 * found['update_seconds']:6.1f}   "
                + ", ".join(sent)
            )
    print("\nthe model's bytes and seconds, of what was measured")
    for num_ranks, ratios in checked.items():
        parts = ", ".join(f"{phase} {ratio:.2f}" for phase, ratio in ratios["bytes"].items())
        print(f"{num_ranks:4}  {parts}; seconds {ratios['seconds']:.2f}")


def model_clusters(unique_rows: float, cluster: Cluster) -> dict[str, Any]:
    """Steps with tables of `TABLES` rows on `RANKS` ranks, by the model; told as well."""
    steps = {}
    for table in TABLES:
        for num_ranks in RANKS:
            step: dict[str, Any] = cluster.step(unique_rows, num_ranks, table, WIDTH)
            step["fits"] = step["table_bytes_a_host"] <= cluster.disk_bytes
            steps[f"{num_ranks} ranks, {table:.0e} rows"] = step
            note = "" if step["fits"] else "  (more than a host's disks hold)"
            print(
                f"{num_ranks:5} ranks, 10^{int(np.log10(table))} rows: a step {1e3 * step['seconds']:6.1f} ms, of it "
                f"waiting {1e3 * step['waited_seconds']:6.1f}, updating {1e3 * step['update_seconds']:5.1f}; "
                f"{step['sent_bytes'] / 1e6:6.1f} MB sent a rank; {step['table_bytes_a_host'] / 1e12:7.2f} TB a host"
                f"{note}"
            )
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and once, to see that it runs")
    parser.add_argument("--picture", type=Path, help="where the plot goes (.png)")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        result = measure(plan, Path(folder))
    checked = check_model(result["strong"])
    tell_measured(plan, result, checked)
    growth, cluster = result["unique_growth"], Cluster()
    unique = growth["a"] * cluster.tokens ** growth["b"]
    print(
        f"\ndistinct rows of T tokens of this text: {growth['a']:.1f} · T^{growth['b']:.3f}; "
        f"{unique:,.0f} of {cluster.tokens:,}\nassumed: {cluster}"
    )
    clusters = model_clusters(unique, cluster)
    model = {"checked": checked, "cluster": dataclasses.asdict(cluster), "unique_rows": unique, "clusters": clusters}
    if arguments.picture:
        draw(arguments.picture, result["strong"], model)
    print(json.dumps({"machine": machine(), **result, "model": model}))


if __name__ == "__main__":
    main()
