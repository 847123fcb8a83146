"""One table over several ranks: the same losses, rows and states for every number of them, bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_runs import ROWS, WIDTH, Server, rank_server

from sense_v2.engram.check import check_table
from sense_v2.engram.sharding import shard_name

LAYOUTS = ("file", "shards")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rank_server() as one:
        yield one


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole table that the ranks' own rows make."""
    first = results[0]
    for result in results:
        for key in ("losses", "state_steps", "step", "generation"):
            assert result[key] == first[key]
    rows = list(itertools.chain(*(result["rows"] for result in results)))
    states = {
        name: list(itertools.chain(*(result["states"][name] for result in results))) for name in first["states"]
    }
    return {
        **{key: first[key] for key in ("losses", "state_steps", "step", "generation")},
        "rows": rows,
        "states": states,
    }


@pytest.fixture(scope="module", params=["adagrad", "adam"])
def alone(request: Any, server: Server, tmp_path_factory: Any) -> tuple[str, dict[str, Any], Path]:
    """(optimizer, what one rank finds, its folder)."""
    folder = tmp_path_factory.mktemp("alone")
    found = server.results("train", 1, folder, layout="file", last_step=4, optimizer=request.param)
    return request.param, joined(found), folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_ranks_gives_the_same_bits(
    server: Server, tmp_path: Path, alone: tuple[str, dict[str, Any], Path], layout: str, num_ranks: int
) -> None:
    optimizer, expected, folder = alone
    found = joined(server.results("train", num_ranks, tmp_path, layout=layout, last_step=4, optimizer=optimizer))
    assert found == expected
    assert len(found["rows"]) == ROWS
    # And as NumPy alone reads it.
    names = ["table.dat"] if layout == "file" else [shard_name("table.dat", r, num_ranks) for r in range(num_ranks)]
    rows = np.concatenate([np.memmap(tmp_path / name, "<f4", "r").reshape(-1, WIDTH) for name in names])
    assert rows.tobytes() == (folder / "table.dat").read_bytes()
    for name in names:
        check = check_table(tmp_path / name)
        assert not check.num_wrong, check.findings
    if layout == "file":
        theirs, ours = (json.loads((one / "table.json").read_text()) for one in (folder, tmp_path))
        for manifest in (theirs, ours):
            del manifest["commit"]
        assert ours == theirs, "checksums too"
