"""What training on a table in a file costs, in memory and in time, whatever the table's size.

The physics. A step needs the batch's rows, a few MB, and writes them back: memory has no reason to follow the table,
nor has time as long as the pages are in memory. The ceiling of a step is the same model without any memory; the
fairest peer has the table in RAM (`nn.Embedding(sparse=True)`, a row-wise Adagrad on its sparse gradient). What a
file adds to that peer is the journal: each row's old bytes are copied, hashed and written once between two commits
(beside the forward pass), and with durability "power" synced. The ceiling of writing rows is `index_copy_` into a
tensor in RAM. A row that is in no memory costs a read of 4 KiB from the disk.

Four parts (`--parts`), each printed with what it is aimed at:

sizes   the demo's model on sparse tables of 1 M, 10 M and 100 M rows, a process each, which take turns every two
        steps. Peak anonymous memory with the rows that the text hashes to. Step time with ids confined to the same
        number of warm pages, spread over the table (30 rows and their optimizer state on 960 pages of state): without
        that a small table would be compared by how many of its rows share a page. Then the same, cold: the pages are
        dropped before each step.
limit   the same training inside a memory cgroup smaller than a quarter of the table, and without; losses and the
        table's checksums have to be equal, bit for bit. That the limit bites is seen from the pages that were
        taken away and read again, which the group counts.
peers   step time against the resident table and against no memory at all, in one process, in blocks of ten steps that
        take turns. One bare loop trains them all, since a table in RAM is nothing that a Trainer could train.
writes  `write`, and a whole step of the row optimizer, against `index_copy_`; what journaling costs.

    python benchmarks/train_out_of_core.py [--quick] [--parts sizes,limit,peers,writes] [--folder data]

Medians, with the tenth and ninetieth percentile, of wall time and of processor time (see turns.py: where other work
runs beside it, OMP_NUM_THREADS=1 and processor time are what compares). The last line of stdout is JSON. Needs Linux.

Long because its parts share one model, one corpus and one loop, so that their figures are of the same step.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import hashlib
import json
import mmap
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from resident import ResidentAdagrad, ResidentRows
from transformers import PreTrainedModel
from turns import (
    MemoryPeak,
    ProcessorClock,
    Text,
    Turn,
    drop_from_cache,
    machine,
    memory_limit,
    prepare_text,
    take_turns,
)

from sense_v2.core.config import TrainConfig
from sense_v2.engram.hashing import NgramHasher
from sense_v2.engram.model import EngramFusionLayer, compressed_pad_id
from sense_v2.engram.optim import RowWiseAdagrad, clip_grad_norm_
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.experiments.step_times import spread
from sense_v2.hf.memory import attached_memory, memory_of
from sense_v2.hf.training.fit import History, fit

WIDTH = 64
"""D. Rows of 256 bytes, sixteen to a page."""
PAGE_FLOATS = mmap.PAGESIZE // 4
ROWS_A_STATE_PAGE = 32
MB = 1e6


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    text_bytes: int
    table_rows: tuple[int, ...]
    state_pages: int
    warm_up_steps: int
    steps: int
    cold_steps: int
    limit_bytes: int
    limit_steps: int
    limit_sparse: bool
    resident_rows: int
    rounds: int
    block_steps: int
    commit_every: int
    write_ids: int
    write_rows: int
    write_rounds: int


FULL = Size(
    text_bytes=4 * 2**20,
    table_rows=(1_000_000, 10_000_000, 100_000_000),
    state_pages=960,
    warm_up_steps=10,
    steps=40,
    cold_steps=6,
    limit_bytes=768 * 2**20,
    limit_steps=160,
    limit_sparse=False,
    resident_rows=1_000_000,
    rounds=20,
    block_steps=10,
    commit_every=100,
    write_ids=32_768,
    write_rows=1 << 20,
    write_rounds=20,
)
QUICK = Size(
    text_bytes=200_000,
    table_rows=(50_000, 500_000),
    state_pages=40,
    warm_up_steps=1,
    steps=4,
    cold_steps=1,
    limit_bytes=768 * 2**20,
    limit_steps=3,
    limit_sparse=True,
    resident_rows=20_000,
    rounds=2,
    block_steps=2,
    commit_every=4,
    write_ids=1024,
    write_rows=1 << 14,
    write_rounds=3,
)


def settings_of(steps: int, **changes: Any) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), steps=steps, eval_every=0, row_optimizer="adagrad", **changes)


# sizes


@dataclass(frozen=True)
class SizeRun:
    text: Text
    folder: Path
    rows: int
    confined: bool
    size: Size


def train_a_size(turn: Turn, run: SizeRun) -> dict[str, Any]:
    """A child: trains on a sparse table, and watches its memory or, with confined ids, its time."""
    size = run.size
    cold_steps = size.cold_steps if run.confined else 0
    settings = settings_of(size.warm_up_steps + size.steps + cold_steps, commit_every=size.steps // 2)
    # One stream of batches for all sizes, and so one learning rate each step.
    with tempfile.TemporaryDirectory(dir=run.folder) as folder, MemoryPeak() as peak:
        model = run.text.model(settings, run.text.memory(Path(folder), run.rows, width=WIDTH, sparse=True))
        storage = memory_of(model).storage
        if run.confined:
            confine(model, storage, size.state_pages, size.table_rows[0])
        peaks, faults = [], []
        clock = ProcessorClock()

        def on_step(history: History) -> None:
            clock.step_is_done()
            done = len(history.steps)
            if done == size.warm_up_steps:
                peak.begin()
            if done == size.warm_up_steps + size.steps:
                peaks.append(peak.bytes)
            if done >= size.warm_up_steps + size.steps and done < settings.steps:
                drop_pages(storage)
                faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
            turn.on_step(history)
            clock.go_on()

        history = fit(model, run.text.batches(settings), settings, on_step=on_step)
        seconds = history.step_seconds()
        disk_bytes = sum(file.stat().st_blocks * 512 for file in Path(folder).iterdir())
        table_bytes = storage.path.stat().st_size
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
    warm_end = size.warm_up_steps + size.steps
    return {
        "peak_bytes": peaks[0],
        "seconds": seconds[size.warm_up_steps : warm_end],
        "processor_seconds": clock.seconds[size.warm_up_steps : warm_end],
        "cold_seconds": seconds[warm_end:],
        "cold_faults": [after - before for before, after in pairwise(faults)],
        "losses": hashlib.sha256(repr(history.train_loss).encode()).hexdigest()[:12],
        "table_bytes": table_bytes,
        "disk_bytes": disk_bytes,
    }


def confine(model: PreTrainedModel, storage: MMapEmbeddingStorage, state_pages: int, least_rows: int) -> None:
    """Sends every lookup to one of `state_pages` × 32 rows, each on a page of its own, and writes those rows once.

    The rows of one page of state lie next to each other, so that rows and state take the same number of pages
    in a table of any size. The ids are hashed as in the smallest table, so the same tokens get the same rows.
    """
    total_pages = storage.num_embeddings // PAGE_FLOATS
    pages = torch.arange(state_pages) * total_pages // state_pages
    step = PAGE_FLOATS // ROWS_A_STATE_PAGE
    chosen_K = (pages[:, None] * PAGE_FLOATS + torch.arange(ROWS_A_STATE_PAGE) * step).flatten()
    for layer in memory_of(model):
        layer.hasher = confined_hasher(layer, least_rows, chosen_K)
    state = storage.open_state("adagrad", 1)
    storage.protect(chosen_K)
    storage.write_state(state, chosen_K, torch.zeros(len(chosen_K), 1))
    storage.write(chosen_K, torch.zeros(len(chosen_K), storage.embedding_dim))
    storage.flush()


def confined_hasher(layer: EngramFusionLayer, rows: int, chosen_K: torch.Tensor) -> Any:
    hasher = NgramHasher.from_config(
        dataclasses.replace(layer.config, table_size=rows),
        layer_id=layer.layer_id,
        compressed_vocab_size=layer.tokenizer.compressed_vocab_size,
        pad_id=compressed_pad_id(layer.config, layer.tokenizer, None),
    )

    def row_ids(compressed_ids_BT: torch.Tensor, **masks: Any) -> torch.Tensor:
        return chosen_K[hasher(compressed_ids_BT, **masks) % len(chosen_K)]

    stand_in: Any = row_ids
    stand_in.pad_id, stand_in.look_back = hasher.pad_id, hasher.look_back
    return stand_in


def drop_pages(storage: MMapEmbeddingStorage) -> None:
    """Everything of the table and its state leaves memory."""
    storage.flush()
    state = storage.open_state("adagrad", 1)
    for values, path in ((storage.weight, storage.path), (state.values, state.path)):
        address, length = ctypes.c_void_p(values.data_ptr()), ctypes.c_size_t(values.nbytes)
        if ctypes.CDLL(None, use_errno=True).madvise(address, length, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
        drop_from_cache(path)


def measure_sizes(text: Text, folder: Path, size: Size) -> dict[str, Any]:
    runs = [SizeRun(text, folder, rows, confined, size) for rows in size.table_rows for confined in (False, True)]
    results = take_turns(train_a_size, runs, steps=2)
    found: dict[str, Any] = {}
    print("\nsizes: anonymous memory aimed at within 5 % of each other, step time within 10 %")
    least: dict[str, Any] = {}
    for rows in size.table_rows:
        hashed, confined = (
            result for run, result in zip(runs, results, strict=True) if run.rows == rows and result is not None
        )
        warm, cold = spread(confined["seconds"]), spread(confined["cold_seconds"])
        one = {
            "peak_bytes": hashed["peak_bytes"],
            "peak_bytes_confined": confined["peak_bytes"],
            "step_seconds": warm,
            "processor_seconds": spread(confined["processor_seconds"]),
            "step_seconds_hashed": spread(hashed["seconds"]),
            "processor_seconds_hashed": spread(hashed["processor_seconds"]),
            "cold_step_seconds": cold,
            "cold_faults": statistics.median(confined["cold_faults"]),
            "table_bytes": hashed["table_bytes"],
            "disk_bytes": hashed["disk_bytes"],
            "losses_confined": confined["losses"],
        }
        least = least or one
        one["memory_ratio"] = one["peak_bytes"] / least["peak_bytes"]
        for name in ("step", "processor"):
            key = f"{name}_seconds"
            one[f"{name}_ratio"] = one[key]["median"] / least[key]["median"]
        print(
            f"  {rows:>11,} rows, {one['table_bytes'] / 1e9:5.1f} GB: {one['peak_bytes'] / MB:4.0f} MB anonymous "
            f"({one['memory_ratio']:.3f}×); warm {line(warm)} ({one['step_ratio']:.3f}×), of the processor "
            f"{line(one['processor_seconds'])} ({one['processor_ratio']:.3f}×); cold {line(cold)}, "
            f"{one['cold_faults']:.0f} major faults a step; disk {one['disk_bytes'] / MB:.0f} MB"
        )
        found[str(rows)] = one
    same = len({one["losses_confined"] for one in found.values()}) == 1
    print(f"  losses with confined ids: {'equal, bit for bit' if same else 'DIFFERENT'} in all sizes")
    return {**found, "same_losses": same}


# limit


def limit_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """A child, inside the limit or not: trains on a table that lies there already, all of it cold."""
    size = QUICK if arguments["quick"] else FULL
    settings = settings_of(size.limit_steps, commit_every=size.limit_steps // 2)
    text = Text(Path(arguments["text"]), arguments["vocab_size"])
    memory = text.memory(Path(arguments["folder"]), arguments["rows"], width=WIDTH, sparse=size.limit_sparse)
    model = text.model(settings, memory)
    storage = memory_of(model).storage
    batches = text.batches(settings)
    row_ids = torch.cat([layer.row_ids(ids) for ids in islice(batches, settings.steps) for layer in memory_of(model)])
    touched_pages = len(torch.unique(row_ids.flatten() // (PAGE_FLOATS // WIDTH)))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    history = fit(model, batches, settings)
    return {
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "losses": history.train_loss,
        "checksums": hashlib.sha256(repr(storage.manifest.checksums).encode()).hexdigest(),
        "seconds": history.step_seconds(),
        "touched_bytes": touched_pages * mmap.PAGESIZE,
        "table_bytes": storage.path.stat().st_size,
    }


def measure_limit(text: Text, folder: Path, size: Size, quick: bool) -> dict[str, Any]:
    rows = 4 * size.limit_bytes // (4 * WIDTH) * 21 // 20
    print(f"\nlimit: {size.limit_bytes / MB:.0f} MB for the process and the pages it uses, aimed at equal losses")
    found: dict[str, Any] = {}
    try:
        with memory_limit(size.limit_bytes) as (enter, used):
            for name in ("limited", "free"):
                with tempfile.TemporaryDirectory(dir=folder) as table_folder:
                    found[name] = run_limited(text, Path(table_folder), rows, size, quick, name, enter)
                if name == "limited":
                    found["group"] = used()
    except OSError as error:
        print(f"  not shown: {error}")
        return {"not_shown": str(error)}
    limited, free = found["limited"], found["free"]
    equal = limited["losses"] == free["losses"] and limited["checksums"] == free["checksums"]
    result = {
        "limit_bytes": size.limit_bytes,
        "table_bytes": free["table_bytes"],
        "touched_bytes": free["touched_bytes"],
        "bit_for_bit": equal,
        "group": found["group"],
        "major_faults": {name: found[name]["major_faults"] for name in ("limited", "free")},
        "last_loss": free["losses"][-1],
        "step_seconds": {name: spread(found[name]["seconds"]) for name in ("limited", "free")},
    }
    group = result["group"]
    peak_share = group["peak_bytes"] / size.limit_bytes
    read_again_bytes = group["pages_read_again"] * mmap.PAGESIZE
    print(
        f"  table {result['table_bytes'] / result['limit_bytes']:.1f}× the limit, its pages touched "
        f"{result['touched_bytes'] / MB:.0f} MB; inside, the peak was {peak_share:.1%} of the limit, and "
        f"{read_again_bytes / MB:,.0f} MB of pages that had been taken away were read again"
        f"{'' if read_again_bytes else ': THE LIMIT DID NOT BITE'}"
    )
    print(f"  major faults while training: {limited['major_faults']:,} inside, {free['major_faults']:,} outside")
    print(f"  {size.limit_steps} losses and all checksums: {'equal, bit for bit' if equal else 'DIFFERENT'}")
    for name in ("limited", "free"):
        print(f"  {name:8} {line(result['step_seconds'][name])} a step, the table cold at the start")
    return result


def run_limited(
    text: Text, folder: Path, rows: int, size: Size, quick: bool, name: str, enter: Callable[[], None]
) -> dict[str, Any]:
    """Makes the table without a limit, drops it from memory, and trains in a new process.

    Pages count for the group that first touches them, so none may be left over from the making.
    """
    memory = text.memory(folder, rows, width=WIDTH, sparse=size.limit_sparse)
    arguments = {"quick": quick, "text": str(text.folder), "vocab_size": text.vocab_size}
    arguments |= {"folder": str(folder), "rows": rows}
    if not size.limit_sparse:
        model = text.model(settings_of(1), memory)
        memory_of(model).storage.close()
        del model
        drop_from_cache(Path(memory.paths()[0]))
    command = [sys.executable, __file__, "--limit-run", json.dumps(arguments)]
    done = subprocess.run(
        command, preexec_fn=enter if name == "limited" else None, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the {name} run failed with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# peers


def make_optimizers(model: PreTrainedModel, settings: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for the weights, and the row optimizer where there is memory."""
    memory = attached_memory(model)
    fusion = set() if memory is None else set(memory.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [one for one in model.parameters() if one not in fusion], "weight_decay": settings.weight_decay},
        {"params": list(fusion), "lr": settings.fusion_learning_rate},
    ]
    weights = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    return [weights] if memory is None else [weights, RowWiseAdagrad(memory.storage, settings.row_learning_rate)]


def bare_step(
    model: PreTrainedModel, token_ids_BT: torch.Tensor, optimizers: list[torch.optim.Optimizer], max_norm: float
) -> float:
    """Forward, backward, clipping over weights and rows, update. Returns the loss."""
    loss = model(input_ids=token_ids_BT, labels=token_ids_BT, use_cache=False).loss
    loss.backward()
    memory = attached_memory(model)
    if memory is None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    else:
        clip_grad_norm_(model.parameters(), memory.storage, max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


@dataclass
class Peer:
    name: str
    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    commit_every: int = 0
    """0: nothing to commit."""
    blocks: list[float] = dataclasses.field(default_factory=list)
    """Mean seconds of a step, commits left out, for each block."""
    processor_blocks: list[float] = dataclasses.field(default_factory=list)
    """The same of the processor."""
    commits: list[float] = dataclasses.field(default_factory=list)
    processor_commits: list[float] = dataclasses.field(default_factory=list)
    steps_done: int = 0
    last_loss: float = 0.0

    def run(self, batches: list[torch.Tensor], max_grad_norm: float) -> None:
        seconds, processor = 0.0, 0.0
        for token_ids_BT in batches:
            started, processor_started = time.perf_counter(), time.process_time()
            self.last_loss = bare_step(self.model, token_ids_BT, self.optimizers, max_grad_norm)
            seconds += time.perf_counter() - started
            processor += time.process_time() - processor_started
            self.steps_done += 1
            if self.commit_every and self.steps_done % self.commit_every == 0:
                started, processor_started = time.perf_counter(), time.process_time()
                memory_of(self.model).storage.commit(step=self.steps_done)
                self.commits.append(time.perf_counter() - started)
                self.processor_commits.append(time.process_time() - processor_started)
        self.blocks.append(seconds / len(batches))
        self.processor_blocks.append(processor / len(batches))

    def with_commits(self, blocks: list[float], commits: list[float]) -> list[float]:
        """Mean seconds of a step for each block but the first, which warms up; each with its share of the commits."""
        share = statistics.median(commits) / self.commit_every if commits else 0.0
        return [seconds + share for seconds in blocks[1:]]


def make_peers(text: Text, folder: Path, size: Size, settings: TrainConfig) -> list[Peer]:
    def make(name: str) -> tuple[PreTrainedModel, list[torch.optim.Optimizer]]:
        memory = text.memory(folder / name.replace(" ", "_"), size.resident_rows, width=WIDTH)
        model = text.model(settings, memory)
        return model, make_optimizers(model, settings)

    def resident(name: str, kind: Callable[[ResidentRows], torch.optim.Optimizer]) -> Peer:
        model, optimizers = make(name)
        memory = memory_of(model)
        rows = ResidentRows(memory.storage.weight.clone())
        memory.storage.close()
        for module in (memory, *memory):
            module.storage = rows
        model.train()
        return Peer(name, model, [optimizers[0], kind(rows)])

    plain = text.model(settings, None).train()
    peers = [Peer("no memory", plain, make_optimizers(plain, settings))]
    peers.append(resident("resident", lambda rows: ResidentAdagrad(rows, settings.row_learning_rate)))
    peers.append(
        resident("resident torch", lambda rows: torch.optim.Adagrad([rows.weight], lr=settings.row_learning_rate))
    )
    for durability in ("process", "power"):
        for every in (size.commit_every, 1):
            name = f"{durability} {every}"
            model, optimizers = make(name)
            memory_of(model).storage.durability = durability
            peers.append(Peer(name, model.train(), optimizers, every))
    return peers


def measure_peers(text: Text, folder: Path, size: Size) -> dict[str, Any]:
    settings = settings_of(size.rounds * size.block_steps)
    print(
        f"\npeers: {size.resident_rows:,} rows; aimed at 1.03× the resident table or less with durability process, "
        f"1.10× with power, a commit every {size.commit_every} steps"
    )
    with tempfile.TemporaryDirectory(dir=folder) as tables:
        peers = make_peers(text, Path(tables), size, settings)
        stream = iter(text.batches(settings))
        for number in range(size.rounds + 1):
            batches = list(islice(stream, size.block_steps))
            first = number % len(peers)
            for peer in peers[first:] + peers[:first]:
                peer.run(batches, settings.max_grad_norm)
        for peer in peers:
            if peer.commit_every:
                memory_of(peer.model).storage.flush()
                memory_of(peer.model).storage.close()
    by_name = {peer.name: peer for peer in peers}
    base = by_name["resident"]
    found: dict[str, Any] = {}
    for peer in peers:
        wall = peer.with_commits(peer.blocks, peer.commits)
        processor = peer.with_commits(peer.processor_blocks, peer.processor_commits)
        # Round by round, so that what slows the machine down for a while cancels.
        one: dict[str, Any] = {
            "step_seconds": spread(wall),
            "processor_seconds": spread(processor),
            "commit_seconds": statistics.median(peer.commits) if peer.commits else 0.0,
            "of_resident": spread(ratios(wall, base.blocks[1:])),
            "processor_of_resident": spread(ratios(processor, base.processor_blocks[1:])),
            "last_loss": peer.last_loss,
        }
        print(
            f"  {peer.name:15} {line(one['step_seconds'])}, {times(one['of_resident'])} the resident table; "
            f"processor {line(one['processor_seconds'])}, {times(one['processor_of_resident'])}; a commit "
            f"{one['commit_seconds'] * 1e3:.0f} ms; loss {peer.last_loss:.4f}"
        )
        found[peer.name] = one
    return found


def ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def times(values: dict[str, float]) -> str:
    return f"{values['median']:.3f}× ({values['low']:.3f} to {values['high']:.3f})"


# writes


def measure_writes(folder: Path, size: Size) -> dict[str, Any]:
    print(f"\nwrites: {size.write_ids:,} ids, warm; aimed at 60 % of index_copy_ or more")
    return {str(width * 4): measure_width(folder, size, width) for width in (64, 256)}


def measure_width(folder: Path, size: Size, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> None:
        started, processor_started = time.perf_counter(), time.process_time()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        processor.setdefault(name, []).append(time.process_time() - processor_started)

    with tempfile.TemporaryDirectory(dir=folder) as table_folder:
        rows = size.write_rows * 64 // width
        storage = MMapEmbeddingStorage(rows, width, Path(table_folder) / "engram_table.dat").train()
        optimizer = RowWiseAdagrad(storage)
        in_ram = ResidentRows(storage.weight.clone())
        ram_optimizer = ResidentAdagrad(in_ram, lr=0.05)
        storage.commit()
        for number in range(2 * size.write_rounds + 2):
            storage.durability = "process" if number % 2 else "power"
            ids_U = torch.randperm(rows, generator=generator)[: size.write_ids].sort().values
            rows_UD = torch.randn(len(ids_U), width, generator=generator)
            timed(f"protect, first time, {storage.durability}", partial(storage.protect, ids_U))
            calls: list[tuple[str, Callable[[], Any]]] = [
                ("index_copy_", partial(in_ram.weight.data.index_copy_, 0, ids_U, rows_UD)),
                # A sync leaves pages clean: the next store to each is a page fault.
                ("write" if number % 2 == 0 else "write, after a sync", partial(storage.write, ids_U, rows_UD)),
            ]
            for name, call in calls if number % 4 < 2 else calls[::-1]:
                timed(name, call)
            stepping: list[tuple[str, Any, torch.optim.Optimizer]] = [
                ("step, resident", in_ram, ram_optimizer),
                ("step", storage, optimizer),
            ]
            for name, table, stepper in stepping:
                (table(ids_U) * rows_UD).sum().backward()
                table.gradients()
                timed(name, stepper.step)
                stepper.zero_grad()
            timed(f"commit, {storage.durability}", storage.commit)
        storage.close()
    found: dict[str, dict[str, Any]] = {
        name: {"seconds": spread(values[1:]), "processor_seconds": spread(processor[name][1:])}
        for name, values in seconds.items()
    }
    ceiling = found["index_copy_"]
    print(
        f"  rows of {width * 4} bytes: ceiling, index_copy_ "
        f"{size.write_ids / median(ceiling, 'seconds') / MB:.2f} M rows/s"
    )
    for name, one in found.items():
        one["of_index_copy"] = {
            key: median(ceiling, key) / median(one, key) for key in ("seconds", "processor_seconds")
        }
        print(
            f"    {name:30} {size.write_ids / median(one, 'seconds') / MB:6.2f} M rows/s, "
            f"{one['of_index_copy']['seconds']:4.0%} of the ceiling, {line(one['seconds'])}; processor "
            f"{line(one['processor_seconds'])}, {one['of_index_copy']['processor_seconds']:4.0%}"
        )
    return found


def median(one: dict[str, Any], key: str) -> float:
    return float(one[key]["median"])


def line(values: dict[str, float]) -> str:
    return f"{values['median'] * 1e3:.1f} ms ({values['low'] * 1e3:.1f} to {values['high'] * 1e3:.1f})"


def print_ceilings(text: Text, settings: TrainConfig) -> dict[str, float]:
    """What no memory can beat: the model without one, and copying in RAM."""
    model = text.model(settings, None).train()
    optimizers = make_optimizers(model, settings)
    seconds = []
    for token_ids_BT in islice(text.batches(settings), 8):
        started = time.perf_counter()
        bare_step(model, token_ids_BT, optimizers, settings.max_grad_norm)
        seconds.append(time.perf_counter() - started)
    source, target = torch.ones(1 << 24), torch.zeros(1 << 24)
    copies = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - started)
    found = {"step_seconds": statistics.median(seconds[1:]), "copy_bytes_per_second": source.nbytes / min(copies)}
    print(
        f"ceiling: a step without memory {found['step_seconds'] * 1e3:.0f} ms; copying in RAM "
        f"{found['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a look at whether it runs; the figures mean nothing")
    parser.add_argument("--parts", default="sizes,limit,peers,writes")
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk to measure")
    parser.add_argument("--limit-run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.limit_run:
        print(json.dumps(limit_run(json.loads(arguments.limit_run))))
        return
    size = QUICK if arguments.quick else FULL
    parts = arguments.parts.split(",")
    results: dict[str, Any] = {"benchmark": "train_out_of_core", "quick": arguments.quick, "machine": machine()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        text = prepare_text(folder, size.text_bytes)
        results["ceiling"] = print_ceilings(text, settings_of(8))
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "sizes": lambda: measure_sizes(text, folder, size),
            "limit": lambda: measure_limit(text, folder, size, arguments.quick),
            "peers": lambda: measure_peers(text, folder, size),
            "writes": lambda: measure_writes(folder, size),
        }
        for part in parts:
            results[part] = measures[part]()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
