"""What ranks run that train a model with memory; see rank_runs.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import VOCABULARY, tiny_config, tiny_model, tiny_tokenizer

from sense_v2.engram.optim import RowAdam
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.range_copy import copy_table
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.global_checkpoint import commit, load_checkpoint, resume, save_checkpoint
from sense_v2.hf.training.ranks import GlobalStep, attach_on_every_rank, table_of

NUM_MICRO_BATCHES = 4


def token_ids(step: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randint(3, VOCABULARY, (2, 9), generator=generator)


def attached(ranks: Ranks, folder: Path, layout: str) -> Any:
    config = tiny_config(folder, layer_indices=[1, 2])
    return attach_on_every_rank(tiny_model("llama"), config, tiny_tokenizer(), layout=layout, ranks=ranks)


def train(
    ranks: Ranks,
    folder: Path,
    *,
    layout: str,
    last_step: int,
    load: str | None = None,
    save: str | None = None,
    event: Callable[[str], None],
) -> dict[str, Any]:
    """Trains from the last commit, or from the checkpoint `load`, to `last_step`; then saves one to `save`."""
    model = attached(ranks, folder, layout)
    model.train()
    table = table_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = resume(model, optimizer, folder) if load is None else load_checkpoint(model, optimizer, load)
    # From here on, or a restored state would have been another optimizer's.
    rows = table.row_optimizer(RowAdam, lr=0.01)
    step = GlobalStep(model)
    own = NUM_MICRO_BATCHES // ranks.num_ranks
    found = []
    traffic = None
    for number in range(first + 1, last_step + 1):
        for micro_batch in range(ranks.rank * own, (ranks.rank + 1) * own):
            ids = token_ids(number, micro_batch)
            step.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        found.append(step.finish(max_norm=0.5))
        optimizer.step()
        optimizer.zero_grad()
        table.step_rows(rows)
        traffic = table.take_traffic()
        commit(model, optimizer, folder, number)
    if save is not None:
        save_checkpoint(model, optimizer, save)
    assert traffic is not None
    result = {
        "first": first,
        "steps": found,
        "rows": own_part(table, table.own.weight),
        "state": own_part(table, rows.state_file.values),
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "sent_bytes": traffic.sent_bytes,
        "text": str(traffic),
    }
    table.close()
    return result


def own_part(table: Any, values: torch.Tensor) -> list[list[float]]:
    start = table.own_rows.start - table.own_file.first_row
    part: list[list[float]] = values[start : start + len(table.own_rows)].tolist()
    return part


def bytes_of_a_step(ranks: Ranks, folder: Path, *, event: Callable[[str], None]) -> dict[str, Any]:
    """What one step in shards sent, and what it should have: counted from the row ids themselves."""
    model = attached(ranks, folder, "shards")
    model.train()
    table = table_of(model)
    step = GlobalStep(model)
    own = NUM_MICRO_BATCHES // ranks.num_ranks
    table.take_traffic()
    ids_asked, num_tokens = [], 0
    for number in range(ranks.rank * own, (ranks.rank + 1) * own):
        ids = token_ids(0, number)
        step.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
        row_ids = torch.stack([layer.row_ids(ids) for layer in memory_of(model)])
        ids_asked.append(sorted(set(row_ids.reshape(-1).tolist())))
        num_tokens += row_ids.numel()
    step.finish()
    sent = table.take_traffic().sent_bytes
    others = [[row for row in asked if row not in table.own_rows] for asked in ids_asked]
    union = {row for asked in others for row in asked}
    theirs = ranks.gather("asked", others)
    mine = [
        row for rank, all_asked in enumerate(theirs) if rank != ranks.rank for asked in all_asked for row in asked
    ]
    return {
        "sent": sent,
        "lookup: ids": 8 * sum(map(len, others)),
        "lookup: rows": 4 * table.embedding_dim * sum(row in table.own_rows for row in mine),
        "gradients: ids": 8 * len(union),
        "gradients: rows": 4 * table.embedding_dim * len(union),
        "tokens_times_heads": num_tokens,
    }


def with_fsdp(ranks: Ranks, folder: Path, *, layout: str, event: Callable[[str], None]) -> dict[str, Any]:
    """The backbone by FSDP2, the rows by their owners; and a checkpoint of both."""
    from torch.distributed.fsdp import fully_shard

    model = attached(ranks, folder, layout)
    model.train()
    table = table_of(model)
    if ranks.num_ranks > 1:
        mesh = dist.init_device_mesh("cpu", (ranks.num_ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = table.row_optimizer(RowAdam, lr=0.01)
    losses = []
    for number in range(1, 4):
        own = NUM_MICRO_BATCHES // ranks.num_ranks
        for micro_batch in range(ranks.rank * own, (ranks.rank + 1) * own):
            ids = token_ids(number, micro_batch)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / own
            loss.backward()
            losses.append(float(loss) * own)
        # FSDP has the mean over ranks, and so have the rows then.
        table.exchange_gradients(divide_by=ranks.num_ranks)
        optimizer.step()
        optimizer.zero_grad()
        table.step_rows(rows)
        commit(model, optimizer, folder, number)
    by_rank = ranks.gather("losses", losses)
    width = len(losses) // 3
    ordered = [list(itertools.chain(*(one[s * width : (s + 1) * width] for one in by_rank))) for s in range(3)]
    copy_table(table, folder / "copy" / "engram_table.dat")
    return {"losses": ordered, "rows": own_part(table, table.own.weight)}
