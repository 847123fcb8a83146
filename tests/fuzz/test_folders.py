"""Whatever lies in a table's folder: opening it says what is wrong, or gives the rows of the manifest's commit.

`make fuzz` looks for more, guided by which lines ran (fuzz_folders.py).
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from folder_cases import JOURNAL, MANIFEST, TABLE, Case, history, make_case, quick_folder
from folder_oracle import expect, open_case
from hypothesis import example, given, settings
from hypothesis import strategies as st


def outcome(data: bytes) -> str:
    with quick_folder() as folder:
        return open_case(make_case(data, folder))


def test_every_moment_of_a_run_opens_as_its_last_commit() -> None:
    """The test of these tests, too: the moments are those of a run with commits, live journals and files in the
    making."""
    moments = history().moments
    assert len(history().commits) == 4
    assert len(moments) > 100
    outcomes = Counter()
    for moment in moments:
        with quick_folder() as folder:
            case = Case(folder / "table", moment)
            case.write(moment)
            outcomes[open_case(case)] += 1
            if TABLE in moment and MANIFEST in moment:
                assert expect(moment, write=True).files in history().commits.values()
    # Not one is refused to who may write.
    assert set(outcomes) == {"opened to read, opened to write", "refused to read, opened to write"}
    assert min(outcomes.values()) > 10


@pytest.mark.parametrize("commit", range(4))
def test_the_manifest_of_any_commit_beside_the_files_of_any_moment(commit: int) -> None:
    """That commit's rows, or an error."""
    mark = list(history().commits)[commit]
    manifests = [moment[MANIFEST] for moment in history().moments if MANIFEST in moment]
    manifest = next(raw for raw in manifests if json.loads(raw)["commit"] == mark)
    outcomes = Counter()
    for moment in history().moments:
        if TABLE in moment and moment.get(JOURNAL):
            with quick_folder() as folder:
                case = Case(folder / "table", moment)
                if moment.get(MANIFEST) != manifest:
                    case.changes[MANIFEST] = "moment"
                case.write({**moment, MANIFEST: manifest})
                outcomes[open_case(case)] += 1
    assert outcomes["refused to read, refused to write"] > 10
    assert outcomes["refused to read, opened to write"] > 2


@settings(max_examples=400)
@given(st.binary(max_size=40))
@example(b"")
def test_a_folder_of_anything(data: bytes) -> None:
    outcome(data)
