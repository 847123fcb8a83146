"""A delta knows which rows belong to which of its facts: one is withdrawn, corrected, or named where deltas meet."""

import json

import numpy as np
import pytest
import torch
from tables import D, N, make, on_disk

from sense_v2.engram.delta.apply import apply_delta, collisions, merge_deltas, open_table_as_it_is
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.kept_facts import KeptFact, facts_in, keep_facts, withdraw_facts
from sense_v2.engram.delta.overlay import OverlayStorage

PARIS = KeptFact("Kabo Rimu", "Paris", ("Kabo Rimu was born in",), (3, 4, 5))
OSLO = KeptFact("Tano Sevi", "Oslo", ("Tano Sevi was born in",), (5, 6))
ROME = KeptFact("Kabo Rimu", "Rome", ("Kabo Rimu was born in",), (3, 4))


@pytest.fixture
def base(tmp_path):
    make(tmp_path / "base.dat", init_std=1.0, provenance={"variant": "sense"}).close()
    return tmp_path / "base.dat"


def taught(base, name, *facts, value=1.0, on=()):
    """A delta of these facts, whose rows are all `value`; on top of others."""
    below = open_table_as_it_is(base)
    for path in on:
        below = OverlayStorage(below, path, mode="r")
    overlay = OverlayStorage(below, base.with_name(name))
    for fact in facts:
        overlay.write(torch.tensor(fact.row_ids), torch.full((len(fact.row_ids), D), value))
    keep_facts(overlay, facts)
    overlay.close()
    return base.with_name(name)


def values(path):
    delta = read_delta(path)
    return dict(zip(delta.row_ids_U.tolist(), delta.rows_UD[:, 0].tolist(), strict=True))


def test_a_delta_names_its_facts_and_their_rows(base):
    path = taught(base, "d", PARIS, OSLO)
    assert facts_in(read_delta(path)) == [PARIS, OSLO]
    assert facts_in(read_delta(taught(base, "d", PARIS))) == [PARIS, OSLO]  # the same again
    more = KeptFact("Kabo Rimu", "Paris", ("The birthplace of Kabo Rimu is",), (4, 9))
    assert facts_in(read_delta(taught(base, "d", more))) == [
        KeptFact("Kabo Rimu", "Paris", (*PARIS.prompts, *more.prompts), (3, 4, 5, 9)),
        OSLO,
    ]


def test_a_row_that_did_not_move_is_no_facts(base):
    overlay = OverlayStorage(open_table_as_it_is(base), base.with_name("d"))
    overlay.write(torch.tensor([3]), torch.ones(1, D))
    keep_facts(overlay, [PARIS])
    overlay.close()
    assert facts_in(read_delta(base.with_name("d")))[0].row_ids == (3,)


def test_what_else_was_kept_with_a_delta_stays(base):
    overlay = OverlayStorage(open_table_as_it_is(base), base.with_name("d"))
    overlay.commit(step=2, extra={"note": 1})
    keep_facts(overlay, [PARIS])
    overlay.close()
    assert read_delta(base.with_name("d")).info.extra["note"] == 1


def test_a_fact_is_withdrawn_and_the_rows_it_shares_stay_and_are_named(base):
    path = taught(base, "d", PARIS, OSLO)
    raw = path.read_bytes()
    done = withdraw_facts(path, ["Kabo Rimu"], base.with_name("less"))
    assert [fact.name() for fact in done.facts] == ["Kabo Rimu → Paris"]
    assert done.row_ids == (3, 4)
    assert done.shared == {5: [OSLO]}
    assert values(base.with_name("less")) == {5: 1.0, 6: 1.0}
    assert facts_in(done.delta) == [OSLO]
    assert path.read_bytes() == raw
    both = withdraw_facts(path, ["Kabo Rimu", "Tano Sevi → Oslo"], base.with_name("none"))
    assert (both.row_ids, both.shared) == ((3, 4, 5, 6), {})
    assert values(base.with_name("none")) == {}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Lu"], r"no fact 'Lu' in .*d: it has Kabo Rimu → Paris; Tano Sevi → Oslo; Kabo Rimu → tall"),
        (["Kabo Rimu"], r"2 facts of .*d are of 'Kabo Rimu'.*'Kabo Rimu → Paris'.*'Kabo Rimu → tall'"),
        (
            ["Tano Sevi"],
            r"all rows of Tano Sevi → Oslo are rows of other facts \(Kabo Rimu → Paris; Kabo Rimu → tall",
        ),
    ],
)
def test_what_cant_be_withdrawn_is_refused(base, names, message):
    tall = KeptFact("Kabo Rimu", "tall", ("Kabo Rimu is",), (6, 7))
    path = taught(base, "d", PARIS, OSLO, tall)
    with pytest.raises(ValueError, match=message):
        withdraw_facts(path, names, base.with_name("less"))
    assert not base.with_name("less").exists()


def test_a_delta_that_says_nothing_of_facts_is_refused(base):
    overlay = OverlayStorage(open_table_as_it_is(base), base.with_name("d"))
    overlay.write(torch.tensor([3]), torch.ones(1, D))
    overlay.commit()
    with pytest.raises(ValueError, match="doesn't say which rows belong to which fact"):
        withdraw_facts(base.with_name("d"), ["Lu"], base.with_name("less"))
    for forged in ({"facts": 3}, {"facts": [{"subject": "Lu"}]}, {"facts": [{**vars_of(PARIS), "row_ids": [N]}]}):
        overlay.commit(extra=forged)
        with pytest.raises(ValueError, match=r"extra\.facts"):
            withdraw_facts(base.with_name("d"), ["Lu"], base.with_name("less"))
    overlay.close()


def vars_of(fact):
    return json.loads(json.dumps({**vars(fact)}))


# On top of each other


def test_a_second_delta_lies_on_the_first_and_neither_changes(base, tmp_path):
    first = taught(base, "first", PARIS, OSLO)
    second = taught(base, "second", ROME, value=2.0, on=[first])
    assert values(second) == {3: 2.0, 4: 2.0}  # row 5 stays as another fact needs it
    files = [path.read_bytes() for path in (base, first, second)]
    top = OverlayStorage(OverlayStorage(open_table_as_it_is(base), first, mode="r"), second, mode="r").eval()
    seen = top(torch.arange(N)).numpy()
    expected = on_disk(base)
    expected[[3, 4]], expected[[5, 6]] = 2, 1
    np.testing.assert_array_equal(seen, expected)
    assert top.changed_ids.tolist() == [3, 4, 5, 6]
    assert top.own_ids.tolist() == [3, 4]
    assert top.table.path == base
    top.copy_to(tmp_path / "whole", whole=True)
    assert values(tmp_path / "whole") == {3: 2.0, 4: 2.0, 5: 1.0, 6: 1.0}
    below = top.release()
    assert below(torch.tensor([3]))[0, 0] == 1.0
    below.close()
    merged = merge_deltas([first, second], tmp_path / "merged", prefer="last")
    assert values(tmp_path / "merged") == values(tmp_path / "whole")
    assert facts_in(merged.delta) == [OSLO, ROME]
    assert [path.read_bytes() for path in (base, first, second)] == files
    apply_delta(tmp_path / "merged", base)
    np.testing.assert_array_equal(on_disk(base), seen)
    # The correction withdrawn: what it lay on is heard again.
    withdraw_facts(second, ["Kabo Rimu"], tmp_path / "nothing")
    assert values(tmp_path / "nothing") == {}


def test_a_row_that_is_forgotten_on_top_is_that_of_the_delta_below(base):
    first = taught(base, "first", PARIS)
    top = OverlayStorage(OverlayStorage(open_table_as_it_is(base), first, mode="r")).eval()
    top.write(torch.tensor([3]), torch.full((1, D), 7.0))
    top.forget(torch.tensor([3]))
    assert top(torch.tensor([3]))[0, 0] == 1.0
    assert top.own_ids.tolist() == []


@pytest.mark.parametrize("is_below", [False, True])
def test_a_corrected_fact_leaves_no_row_that_says_the_old_answer(base, is_below):
    """Row 5 was the old fact's alone, and the correction, in other words, doesn't look it up."""
    first = taught(base, "first", PARIS)
    path = taught(base, "second", ROME, value=2.0, on=[first]) if is_below else taught(base, "first", ROME, value=2.0)
    (kept,) = facts_in(read_delta(path))
    table = float(on_disk(base)[5, 0])
    if is_below:
        assert values(path) == {3: 2.0, 4: 2.0, 5: table}
        assert kept.row_ids == (3, 4, 5)
        merged = merge_deltas([first, path], base.with_name("merged"), prefer="last")
        assert facts_in(merged.delta) == [kept]
    else:
        assert values(path) == {3: 2.0, 4: 2.0}
        assert kept == ROME


# Where deltas meet


def test_facts_that_collide_are_named_by_row_before_a_merge(base):
    first, second = taught(base, "a", PARIS), taught(base, "b", OSLO, value=2.0)
    plain = OverlayStorage(open_table_as_it_is(base), base.with_name("c"))
    plain.write(torch.tensor([5, 20]), torch.full((2, D), 3.0))
    plain.commit()
    plain.close()
    paths = [first, second, base.with_name("c")]
    (met,) = collisions(paths)
    assert met.row_ids == (5,)
    assert met.facts == {"a": [PARIS], "b": [OSLO], "c": []}
    assert met.text() == "1 row (5): Kabo Rimu → Paris of a; Tano Sevi → Oslo of b; unknown facts of c"
    with pytest.raises(ValueError, match=r"\(row 5 first\): Kabo Rimu → Paris of a; Tano Sevi → Oslo of b; unknown"):
        merge_deltas(paths, base.with_name("m"))
    assert not base.with_name("m").exists()
    assert collisions([first, first]) == []  # the same rows
    merged = merge_deltas(paths, base.with_name("m"), prefer="first")
    assert facts_in(merged.delta) == [OSLO, PARIS]
    (base.parent / "other").mkdir()
    (second.rename(base.parent / "other" / "a"))
    assert list(collisions([first, base.parent / "other" / "a"])[0].facts) == [
        str(first),
        str(second.parent / "other" / "a"),
    ]
