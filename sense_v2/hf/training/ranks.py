"""A model with memory in several processes: attaching it on all of them, and a step over all their micro-batches.

    attach_on_every_rank   one table for all ranks: one file of this host, or a shard on each rank's disk
    GlobalStep             losses of micro-batches ──▶ gradients of weights and rows, summed in one fixed order

The weights are the same on every rank, as with DDP, and each rank computes its own micro-batches. `GlobalStep` sums
the weights' gradients as the rows' are: by a tree that the micro-batches' numbers fix, cut into equal parts, one a
rank, and put together again. That moves as many bytes as an all-reduce does, and gives the same bits whatever the
number of ranks. Where that isn't needed, DDP or FSDP reduce the weights (EngramTrainer does so), and the rows go by
`ShardedTable.exchange_gradients` all the same.

P numbers of all weights together, W ranks.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.sharded_table import ShardedTable, open_sharded_table
from sense_v2.engram.ranks.tree_sum import Node, TreeSum, exact_sum, node_sizes, row_squares
from sense_v2.hf.attach import attach_engram, shadow_map_of, with_paths
from sense_v2.hf.memory import memory_of


def attach_on_every_rank(
    model: PreTrainedModel,
    config: EngramConfig,
    tokenizer: Any = None,
    *,
    layout: str = "file",
    mode: str = "r+",
    ranks: Ranks | None = None,
) -> PreTrainedModel:
    """`attach_engram` in every process that torchrun or `accelerate launch` started, over one table.

    `layout` "file" is for the processes of one host: rank 0 makes or opens the table, all map it, and each stores to
    the rows it owns. "shards" keeps each rank's rows in a table of their own at `config.storage_path` of its host
    (`engram_table.1-of-4.dat`). Alone, or in a process group of one, it is the same without the others.

    Raises `RuntimeError` where the process group isn't there yet (make the TrainingArguments first) and `ValueError`
    for one file over several hosts; what fails on one rank is an error on all.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1 and not dist.is_initialized():
        raise with_way_out(
            RuntimeError(f"{num_ranks} processes were started, and they have no process group yet"),
            "make the TrainingArguments (or an accelerate.PartialState), or call "
            "torch.distributed.init_process_group(), before memory is attached",
        )
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if layout == "file" and num_here != num_ranks:
        raise ValueError(
            f"{num_ranks} processes, {num_here} of them on this host: one file is for one host. layout='shards' "
            "keeps each rank's rows on its own host"
        )
    ranks = Ranks() if ranks is None else ranks
    config = with_paths(config, tokenizer)
    embedding: Any = model.get_input_embeddings()
    num_tokens: int = embedding.weight.shape[0]
    # One rank makes it where all see it; a host that sees none makes its own.
    ranks.together("shadow map", lambda: shadow_map_of(config, tokenizer, (), num_tokens), only=0)
    shadow_map = ranks.together("shadow map: others", lambda: shadow_map_of(config, tokenizer, (), num_tokens))
    table = open_sharded_table(config, shadow_map, ranks, layout=layout, mode=mode)
    attach_engram(model, config, shadow_map, mode=mode, storage=table)
    memory_of(model).owns_tables = True
    return model


def table_of(model: nn.Module) -> ShardedTable:
    """The table that `attach_on_every_rank` attached. Raises `ValueError` for another one."""
    storage: Any = memory_of(model).storage
    if not storage.needs_all_ranks:
        raise with_way_out(
            ValueError("this model's memory was attached for one process"), "attach_on_every_rank(model, config)"
        )
    table: ShardedTable = storage
    return table


class GlobalStep:
    """The gradients of one optimizer step after another, over all ranks' micro-batches. By all ranks.

    >>> step = GlobalStep(model)                          # doctest: +SKIP
    >>> for batch in own_micro_batches:                   # doctest: +SKIP
    ...     step.backward(model(**batch).loss)
    >>> loss, norm = step.finish(max_norm=1.0)            # doctest: +SKIP
    >>> optimizer.step(), step.table.step_rows(rows)      # doctest: +SKIP

    Rank r's micro-batches are numbers r·m to r·m + m - 1 of the whole batch, m the number of them a rank. Every
    micro-batch weighs the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.table = table_of(model)
        self._ranks = self.table.ranks
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._begin()

    def _begin(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._leaves: list[torch.Tensor] = []

    def backward(self, loss: torch.Tensor) -> None:
        """Takes the gradients of the next micro-batch, whose mean loss this is."""
        loss.backward()
        self._losses.append(loss.detach().double().cpu())
        self._leaves.append(self._taken())

    def _taken(self) -> torch.Tensor:
        """All weights' gradients [P], float32, and none of them left."""
        parts = []
        for parameter in self._parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.detach().float().reshape(-1))
            parameter.grad = None
        return torch.cat(parts) if parts else torch.empty(0)

    def finish(self, max_norm: float | None = None) -> tuple[float, float]:
        """Leaves every weight the mean gradient of all micro-batches, and every owner that of its rows; scaled down
        to `max_norm` together where it is given. Returns (the mean loss, the norm before that): the same bits on all
        ranks, whatever their number.

        Raises `FloatingPointError` where one isn't finite, before anything is updated.
        """
        num_own = len(self._losses)
        self.table.exchange_gradients()
        num_all = num_own * self._ranks.num_ranks
        losses = self._ranks.all_gather("losses", torch.stack(self._losses)).reshape(-1)
        loss = float(exact_sum(losses.numpy()) / num_all) if bool(torch.isfinite(losses).all()) else float("nan")
        mean_P = self._summed(num_own) / num_all
        norm = float(row_squares(mean_P[None]).sum() + self.table.gradient_norm() ** 2) ** 0.5
        self._begin()
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not value < float("inf"):
                self.table.clear_gradients()
                raise with_way_out(
                    FloatingPointError(f"the {name} is {value}: nothing was updated"), "Lower the learning rates"
                )
        if max_norm is not None:
            scale = min(1.0, max_norm / (norm + 1e-6))
            mean_P *= scale
            self.table.scale_gradients(scale)
        at = 0
        for parameter in self._parameters:
            part = mean_P[at : at + parameter.numel()]
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
            at += parameter.numel()
        return loss, norm

    def _summed(self, num_own: int) -> torch.Tensor:
        """The sum over all ranks' micro-batches [P], on each rank: every rank sums one part of all weights."""
        ranks = self._ranks
        own: TreeSum[torch.Tensor] = TreeSum(torch.add, ranks.rank * num_own)
        for leaf_P in self._leaves:
            own.push(leaf_P)
        if ranks.num_ranks == 1:
            return own.total()
        num_values = len(self._leaves[0])
        part = -(-num_values // ranks.num_ranks)
        sizes_WK = [node_sizes(rank * num_own, num_own) for rank in range(ranks.num_ranks)]
        theirs: list[list[Node[torch.Tensor]]] = [[] for _ in sizes_WK]
        for column in range(max(len(sizes) for sizes in sizes_WK)):
            # Whoever has fewer nodes sends nothing of this one.
            has = [column < len(sizes) for sizes in sizes_WK]
            padded = torch.empty(0, part)
            if has[ranks.rank]:
                padded = torch.zeros(ranks.num_ranks * part)
                padded[:num_values] = own.nodes[column].value
                padded = padded.view(ranks.num_ranks, part)
            counts = [int(has[ranks.rank])] * ranks.num_ranks
            received = iter(ranks.all_to_all("weights: parts", padded, counts, [int(one) for one in has]))
            for rank in range(ranks.num_ranks):
                if has[rank]:
                    theirs[rank].append(Node(0, sizes_WK[rank][column], next(received)))
        tree: TreeSum[torch.Tensor] = TreeSum(torch.add)
        for nodes in theirs:
            for node in nodes:
                tree.push(node.value, node.size)
        return ranks.all_gather("weights: sums", tree.total()).reshape(-1)[:num_values]
