"""Two hosts with a disk and a network of their own: network namespaces, joined by a cable (veth) that can be cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_runs import rank_server

SCRIPT = Path(__file__).parents[2] / "host_trainer.py"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LAST_STEP = 6


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


class Hosts:
    """Two namespaces; names carry the process id, since several runs may be at work on this machine."""

    def __init__(self) -> None:
        self.names = tuple(f"sense{os.getpid()}h{host}" for host in (0, 1))
        self.cables = tuple(f"sv{os.getpid()}c{host}" for host in (0, 1))
        self.num_runs = 0
        try:
            for name in self.names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
            for name, cable, address in zip(self.names, self.cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
        except BaseException:
            self.remove()
            raise

    def start(self, rank: int, folder: Path, timeout_seconds: float) -> subprocess.Popen[str]:
        port = 29400 + self.num_runs
        address = f"{ADDRESSES[0]}:{port}"
        command = [sys.executable, "-W", "ignore", SCRIPT, address, rank, folder, LAST_STEP, timeout_seconds]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[rank], *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.cables[rank]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, folders: list[Path], *, cut_after: tuple[str, int] | None = None) -> list[tuple[str, str]]:
        """(stdout, stderr) of both; the cable is cut when host 1 has told of that event so often."""
        self.num_runs += 1
        timeout_seconds = 60.0 if cut_after is None else 4.0
        ranks = [self.start(rank, folder, timeout_seconds) for rank, folder in enumerate(folders)]
        try:
            if cut_after is not None:
                event, count = cut_after
                assert ranks[1].stdout is not None
                while count:
                    line = ranks[1].stdout.readline()
                    assert line, ranks[1].communicate()[1]
                    count -= line.strip() == event
                self.cable("down")
            return [rank.communicate(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()

    def cable(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", self.cables[1], state)

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no iproute2 (ip) on this machine: two hosts are only tested as processes over loopback")
    try:
        two = Hosts()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces can't be made here ({error.stderr.strip()}): only loopback is tested")
    try:
        yield two
    finally:
        two.remove()


@pytest.mark.slow
def test_a_host_that_is_cut_off_in_a_step_costs_that_step_and_no_more(hosts: Hosts, tmp_path: Path) -> None:
    folders = [tmp_path / "disk0", tmp_path / "disk1"]
    for folder in folders:
        folder.mkdir()
    started = time.monotonic()
    (_, error_0), (_, error_1) = hosts.run(folders, cut_after=("exchanged", 3))
    # 4 s that a collective waits, and what it takes to name the rank; Python's start included.
    assert time.monotonic() - started < 100
    assert "RankFailure: rank 0 of 2" in error_0
    assert "rank 1 is gone: no sign of life" in error_0
    assert "RankFailure: rank 1 of 2" in error_1
    assert "no sign of life of any other rank (0)" in error_1, error_1[-1500:]
    assert "or this host was cut off" in error_1

    hosts.cable("up")
    ends = hosts.run(folders)
    results = [json.loads(out.splitlines()[-1].removeprefix("=")) for out, error in ends if out or not print(error)]
    assert [result["found"] for result in results] == [{"step": 2, "generation": 1}] * 2, "the last commit"
    with rank_server() as server:
        (alone,) = server.results(
            "train", 1, tmp_path / "alone", layout="file", last_step=LAST_STEP, optimizer="adam"
        )
    assert results[0]["losses"] == results[1]["losses"] == alone["losses"][2:]
    assert results[0]["rows"] + results[1]["rows"] == alone["rows"]
    # Each host's disk has its own rows and no others.
    assert sorted(path.name for path in folders[1].glob("table*.dat")) == [
        "table.1-of-2.adam.dat",
        "table.1-of-2.dat",
    ]
    assert not (folders[1] / "table.shards.json").exists()
