"""Several processes on one host, one table: rank 0 writes, the others map the file and hand their gradients over.

    every rank: backward ──▶ its rows' gradients ──all-gather──▶ the mean over ranks, the same on each
    rank 0: stores rows          the others: wait, and see them in the mapping

As DDP leaves the averaged gradient of the weights on every rank, so here of the rows: clipping and the check for
infinities then come to the same on all of them without another word.

U rows of a rank's batch, D row width.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from sense_v2.core.config import EngramConfig
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.hf.attach import attach_engram, memory_of


def attach_on_every_rank(model: PreTrainedModel, config: EngramConfig, tokenizer: Any = None) -> PreTrainedModel:
    """`attach_engram` in every process that torchrun or `accelerate launch` started: rank 0 makes or opens the table
    to write, then the others open it to read and collect gradients for rank 0. Alone it is `attach_engram`.

    Raises `RuntimeError` where the process group isn't there yet (make the TrainingArguments first) and `ValueError`
    where it spans several hosts.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        return attach_engram(model, config, tokenizer)
    if not dist.is_initialized():
        raise RuntimeError(
            f"{num_ranks} processes were started, and they have no process group yet: make the TrainingArguments (or "
            "an accelerate.PartialState) before memory is attached"
        )
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if num_here != num_ranks:
        raise ValueError(f"{num_ranks} processes, {num_here} of them on this host: one table is for one host so far")
    # The first is done, or has failed, before the others look.
    error: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            attach_engram(model, config, tokenizer)
        except BaseException as found:
            error = [f"{type(found).__name__}: {found}"]
            dist.broadcast_object_list(error)
            raise
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise RuntimeError(f"rank 0 could not attach the memory: {error[0]}")
    if dist.get_rank() != 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "process .* is writing to", UserWarning)
            attach_engram(model, config, tokenizer, mode="r")
        memory_of(model).storage.collects_gradients = True
    return model


def average_gradients(storage: MMapEmbeddingStorage) -> None:
    """The storage's gradients become their mean over all ranks: of a row's, zero where a rank didn't meet it. Called
    by all ranks after the same backward."""
    num_ranks = dist.get_world_size()
    gradients = storage.gradients()
    if gradients is None:
        ids_U = torch.empty(0, dtype=torch.int64)
        gradients = ids_U, torch.empty(0, storage.embedding_dim)
    # NCCL has no tensors on the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_ranks)]
    dist.all_gather(counts, torch.tensor([len(gradients[0])], dtype=torch.int64, device=device))
    ids, grads = (_gather([int(count) for count in counts], part.to(device)) for part in gradients)
    storage.replace_gradients([(one.cpu(), part.cpu() / num_ranks) for one, part in zip(ids, grads, strict=True)])


def _gather(counts: list[int], part: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's tensor [its count, …]; all_gather wants one shape, so all are padded to the longest."""
    padded = part.new_zeros((max(counts), *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [one[:count] for one, count in zip(parts, counts, strict=True)]
