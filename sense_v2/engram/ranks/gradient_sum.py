"""Row gradients of all ranks -> their sums at the rows' owners, with the same bits for any number of ranks.

    gradients: counts ──▶ gradients: ids ──▶ gradients: rows ──▶ owners add, in the order of `tree_sum.py`

U rows, D row width, W ranks, K nodes of a rank's part of the tree.
"""

from __future__ import annotations

import torch

from sense_v2.engram.ranks.collectives import Ranks
from sense_v2.engram.ranks.ownership import Ownership, RowIds
from sense_v2.engram.ranks.tree_sum import RowGrads, TreeSum, add_row_grads, node_sizes


def summed_at_owners(
    ranks: Ranks, ownership: Ownership, own: TreeSum[RowGrads], num_own: int, width: int
) -> RowGrads:
    """Send every rank's sums to the rows' owners, which add them in the fixed order; by all ranks.

    Args:
        ranks: All of them.
        ownership: Which rows each owns.
        own: The sum of this rank's micro-batches, as far as it is part of the fixed order.
        num_own: How many micro-batches each rank had.
        width: D.

    Returns:
        Of the rows that this rank owns: ids [U], ascending, and the sum of their gradients over all ranks [U, D].
    """
    num_ranks = ranks.num_ranks
    sizes_WK = [node_sizes(rank * num_own, num_own) for rank in range(num_ranks)]
    num_nodes = max(len(sizes) for sizes in sizes_WK)
    counts_WK = torch.zeros(num_ranks, num_nodes, dtype=torch.int64)
    for column, node in enumerate(own.nodes):
        counts_WK[:, column] = torch.tensor(ownership.counts(RowIds(node.value[0])))
    theirs_WK = ranks.swap_counts("gradients: counts", counts_WK)
    counts, theirs = counts_WK.sum(dim=1).tolist(), theirs_WK.sum(dim=1).tolist()
    parts: list[RowGrads] = []
    for rank in range(num_ranks):
        for column, node in enumerate(own.nodes):
            start = int(counts_WK[:rank, column].sum())
            stop = start + int(counts_WK[rank, column])
            parts.append((node.value[0][start:stop], node.value[1][start:stop]))
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, width)
    parts = parts or [nothing]
    ids = ranks.all_to_all("gradients: ids", torch.cat([part[0] for part in parts]), counts, theirs)
    grads = ranks.all_to_all("gradients: rows", torch.cat([part[1] for part in parts]), counts, theirs)
    tree: TreeSum[RowGrads] = TreeSum(add_row_grads)
    at = 0
    for rank, sizes in enumerate(sizes_WK):
        for column, size in enumerate(sizes):
            count = int(theirs_WK[rank, column])
            tree.push((ids[at : at + count], grads[at : at + count]), size)
            at += count
    return tree.total() if tree.nodes else nothing
