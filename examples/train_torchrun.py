"""A small model and its memory trained by several processes, on one host or on several; by one it is the same.

    python examples/train_torchrun.py                                                    one process
    torchrun --nproc-per-node 2 examples/train_torchrun.py                               two, the same bits
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_torchrun.py              after a crash it goes on
    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        examples/train_torchrun.py --layout shards                                       two hosts, a shard on each

Run again, it goes on from its last commit. Downloads nothing; docs/distributed.md says what happens.
"""

import argparse
import dataclasses

import torch
import torch.distributed as dist

from sense_v2.engram.optim import RowWiseAdagrad
from sense_v2.engram.ranks.collectives import start_ranks
from sense_v2.hf.data.corpus import encode, standard_library
from sense_v2.hf.training.fresh_model import END_OF_TEXT_ID, fresh_backbone, small_memory, train_bpe
from sense_v2.hf.training.global_checkpoint import commit, resume
from sense_v2.hf.training.ranks import GlobalStep, attach_on_every_rank, table_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--commit-every", type=int, default=20)
parser.add_argument("--micro-batches", type=int, default=4, help="of a step, over all processes")
parser.add_argument("--layout", choices=["file", "shards"], default="file")
parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a process that doesn't come")
parser.add_argument("--output", default="runs/torchrun", help="weights and, on each host, rows")
options = parser.parse_args()

torch.set_num_threads(1)
ranks = start_ranks(timeout_seconds=options.timeout)
if options.micro_batches % ranks.num_ranks:
    parser.error(f"{options.micro_batches} micro-batches aren't divisible by {ranks.num_ranks} processes")

# The same on every process: a tokenizer, blocks of 64 tokens, a model.
texts = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library()[::20]]
tokenizer = train_bpe(texts)
stream = torch.from_numpy(encode(texts, tokenizer, separator_id=END_OF_TEXT_ID)).long()
blocks = stream[: len(stream) // 64 * 64].view(-1, 64)
model = fresh_backbone(tokenizer.get_vocab_size(), seed=0)
config = dataclasses.replace(small_memory(options.output), table_size=200_000)
attach_on_every_rank(model, config, tokenizer, layout=options.layout, ranks=ranks)
model.train()

table = table_of(model)
weights = torch.optim.AdamW(model.parameters(), lr=3e-3)
rows = table.row_optimizer(RowWiseAdagrad, lr=0.1)
first = resume(model, weights, options.output)
step = GlobalStep(model)
per_rank = options.micro_batches // ranks.num_ranks
for number in range(first + 1, options.steps + 1):
    for micro_batch in range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank):
        # What a micro-batch reads depends on its number alone, not on who takes it.
        chance = torch.Generator().manual_seed(number * options.micro_batches + micro_batch)
        token_ids_BT = blocks[torch.randint(len(blocks), (4,), generator=chance)]
        step.backward(model(input_ids=token_ids_BT, labels=token_ids_BT, use_cache=False).loss)
    loss, norm = step.finish(max_norm=1.0)
    weights.step()
    weights.zero_grad()
    table.step_rows(rows)
    if number % options.commit_every == 0 or number == options.steps:
        commit(model, weights, options.output, number)
    if ranks.rank == 0 and (number % 10 == 0 or number == options.steps):
        print(f"step {number}: loss {loss:.6f}, norm {norm:.4f}; {table.take_traffic()}", flush=True)
    else:
        table.take_traffic()

table.close()
ranks.close()
if dist.is_initialized():
    dist.destroy_process_group()
