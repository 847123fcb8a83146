"""Models with memory on 1, 2 and 4 ranks: losses, weights, rows, checkpoints; and what travels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_runs import Server, rank_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rank_server("rank_models") as one:
        yield one


def joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    first = results[0]
    for result in results:
        assert (result["steps"], result["weights"]) == (first["steps"], first["weights"]), "the same on all ranks"
    whole = {name: list(itertools.chain(*(result[name] for result in results))) for name in ("rows", "state")}
    return {"steps": first["steps"], "weights": first["weights"], **whole}


@pytest.fixture(scope="module")
def alone(server: Server, tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    results = server.results("train", 1, folder, layout="file", last_step=3, save=str(folder / "checkpoint"))
    return joined(results), folder / "checkpoint"


@pytest.fixture(scope="module")
def four(server: Server, tmp_path_factory: Any) -> tuple[list[dict[str, Any]], Path, Path]:
    folder = tmp_path_factory.mktemp("four")
    results = server.results("train", 4, folder, layout="shards", last_step=3, save=str(folder / "checkpoint"))
    return results, folder, folder / "checkpoint"


def test_four_ranks_in_shards_give_the_bits_of_one(alone: Any, four: Any) -> None:
    assert joined(four[0]) == alone[0]
    losses = [loss for loss, _ in alone[0]["steps"]]
    assert losses == sorted(losses, reverse=True) or min(losses) < losses[0], "it learns"


def test_two_ranks_on_one_file_give_the_bits_of_one(server: Server, tmp_path: Path, alone: Any) -> None:
    assert joined(server.results("train", 2, tmp_path, layout="file", last_step=3)) == alone[0]


@pytest.mark.parametrize(("layout", "num_ranks"), [("shards", 2), ("file", 1), ("file", 4)])
def test_a_checkpoint_of_four_goes_on_with_others(
    server: Server, tmp_path: Path, four: Any, alone: Any, layout: str, num_ranks: int
) -> None:
    results = server.results(
        "train", num_ranks, tmp_path, layout=layout, last_step=5, load=str(four[2]), save=str(tmp_path / "then")
    )
    assert all(result["first"] == 3 for result in results)
    # And the other way round: what one rank makes of its own checkpoint of that step.
    whole = server.results("train", 4, tmp_path / "back", layout="shards", last_step=5, load=str(alone[1]))
    assert joined(results) == joined(whole)
    # The copies are ordinary tables of the same bytes.
    copies = [path / "engram_table.dat" for path in (four[2], alone[1])]
    assert copies[0].read_bytes() == copies[1].read_bytes()


def test_a_damaged_checkpoint_is_refused_on_all_ranks(server: Server, tmp_path: Path, alone: Any) -> None:
    import shutil

    shutil.copytree(alone[1], tmp_path / "checkpoint")
    with open(tmp_path / "checkpoint" / "engram_table.dat", "r+b") as file:
        file.seek(40_000)
        file.write(b"\1")
    answers = server.ask("train", 2, tmp_path, layout="shards", last_step=5, load=str(tmp_path / "checkpoint"))
    for answer in answers:
        assert "doesn't have the checksums of its manifest: the copy is damaged" in answer["error"]


def test_unique_ids_and_their_rows_travel_and_nothing_else(server: Server, tmp_path: Path, four: Any) -> None:
    for found in server.results("bytes_of_a_step", 2, tmp_path):
        for phase in ("lookup: ids", "lookup: rows", "gradients: ids", "gradients: rows"):
            assert found["sent"][phase] == found[phase] > 0
        assert found["sent"]["lookup: ids"] < 8 * found["tokens_times_heads"]
    assert "bytes sent (" in four[0][0]["text"]
    assert "lookup: rows" in four[0][0]["text"]


def test_the_backbone_by_fsdp2_beside_sharded_rows(server: Server, tmp_path: Path) -> None:
    """FSDP averages in an order of its own: the same to the rounding."""
    (alone,) = server.results("with_fsdp", 1, tmp_path / "alone", layout="file")
    found = server.results("with_fsdp", 2, tmp_path / "two", layout="shards")
    np.testing.assert_allclose(found[0]["losses"], alone["losses"], rtol=1e-6)
    rows = found[0]["rows"] + found[1]["rows"]
    np.testing.assert_allclose(rows, alone["rows"], atol=2e-5)
    copy = np.fromfile(tmp_path / "two" / "copy" / "engram_table.dat", "<f4").reshape(-1, 8)
    assert copy.tolist() == rows
