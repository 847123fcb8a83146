"""One table over several ranks: the same losses, rows and states for every number of them, bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_runs import NUM_MICRO_BATCHES, ROWS, WIDTH, Server, micro_batch, rank_server

from sense_v2.engram.ranks.collectives import start_ranks
from sense_v2.engram.ranks.global_commit import GlobalManifest
from sense_v2.engram.ranks.shards import shard_name
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.check import check_table

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


def test_the_losses_are_those_of_plain_torch(alone: tuple[str, dict[str, Any], Path], tmp_path: Path) -> None:
    """One embedding in memory, one loss over the whole batch, torch's own clipping and SparseAdam."""
    optimizer, found, _ = alone
    if optimizer != "adam":
        pytest.skip("torch has no row-wise Adagrad; tests/test_optim.py holds ours against one in NumPy")
    table = MMapEmbeddingStorage(ROWS, WIDTH, tmp_path / "noise.dat", seed=3, init_std=0.5)
    embedding = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
    with torch.no_grad():
        embedding.weight.copy_(table.weight)
    table.close()
    adam = torch.optim.SparseAdam(embedding.parameters(), lr=0.02)
    for step, expected in enumerate(found["losses"], start=1):
        losses = []
        for number in range(NUM_MICRO_BATCHES):
            row_ids, targets = micro_batch(step, number)
            losses.append((torch.tanh(embedding(row_ids).sum(dim=1)) - targets).square().mean())
        torch.stack(losses).mean().backward()
        assert torch.stack(losses).tolist() == pytest.approx(expected, rel=1e-5)
        gradient = embedding.weight.grad
        assert gradient is not None
        gradient = gradient.coalesce()
        embedding.weight.grad = gradient * min(1.0, 0.05 / (float(gradient.values().norm()) + 1e-6))
        adam.step()
        adam.zero_grad()
    np.testing.assert_allclose(found["rows"], embedding.weight.detach().numpy(), atol=2e-5)


def test_begin_returns_at_once_and_the_rows_are_the_owners(server: Server, tmp_path: Path) -> None:
    """Rank 1 comes half a second late, while rank 0 has other work; bfloat16 travels, too."""
    first, second = server.results("overlap", 2, tmp_path)
    assert first["begun_seconds"] < 0.25 < 0.4 < first["got_seconds"]
    assert first["rows"] == second["rows"]
    halves = [np.fromfile(tmp_path / shard_name("table.dat", rank, 2), "<u2") for rank in (0, 1)]
    bits = np.concatenate(halves).reshape(-1, WIDTH).astype(np.uint32) << 16
    assert first["rows"] == bits.view(np.float32)[[0, 96, 50]].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_look_up_and_store_as_one_does(server: Server, tmp_path: Path, layout: str) -> None:
    """What tests/contract asks of every table, of one that two ranks have."""
    results = server.results("as_one", 2, tmp_path, layout=layout)
    names = ["table.dat"] if layout == "file" else ["table.0-of-2.dat", "table.1-of-2.dat"]
    rows = np.concatenate([np.fromfile(tmp_path / name, "<f4") for name in names]).reshape(-1, 8)
    for rank, found in enumerate(results):
        for ids, looked_up in found["rows"]:
            assert np.array_equal(
                np.array(looked_up, np.float32).reshape(*np.shape(ids), 8), rows[np.array(ids, int)]
            )
        assert found["types"] == ["torch.float32"] * 2
        assert found["outside"] == [f"IndexError: row id 97: {tmp_path / 'table.dat'} has rows 0 to 96"] * 3
        assert found["others"] == [f"PermissionError: row id {found['others_row']}: rank {rank} owns rows"] * 3
        assert found["closed"].startswith("RuntimeError")
    assert rows[0].tolist() == [1.0] * 8
    assert rows[96].tolist() == [2.0] * 8


def test_what_ranks_do_apart_is_refused_on_all(server: Server, tmp_path: Path) -> None:
    for found in server.results("refusals", 2, tmp_path):
        assert "has rows at hand only of its last begin(row_ids)" in found["forward"]
        assert found["numbers"] == "ranks took different numbers of micro-batches since the last step: [2, 1]"
        assert found["outside"] == f"row id {ROWS}: {tmp_path / 'table.dat'} has rows 0 to {ROWS - 1}"


def test_several_torchruns_that_keep_their_store_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"):
        start_ranks()


def test_a_global_manifest_that_isnt_one_is_refused(tmp_path: Path) -> None:
    whole = GlobalManifest(10, [0, 4, 10], ["a", "b"], ["1", "2"])
    path = tmp_path / "table.shards.json"
    path.write_text(whole.to_json())
    assert GlobalManifest.read(path) == whole
    for changes, told in (
        ({"format_version": 2}, "format_version must be 1"),
        ({"bounds": [0, 7, 4]}, "bounds go from 0 up to rows"),
        ({"files": ["a"]}, "one for each shard"),
        ({"rows": "10"}, "integers of 0 or more"),
        ({"commits": [1, 2]}, "are texts"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ):
        path.write_text(json.dumps({**json.loads(whole.to_json()), **changes}))
        with pytest.raises(ValueError, match=f"isn't the global manifest of a table in shards: .*{told}"):
            GlobalManifest.read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="isn't the global manifest"):
        GlobalManifest.read(path)
