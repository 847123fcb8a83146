"""Deltas made from tables, put into tables, taken out again and merged: the files' bytes are the oracle."""

import dataclasses
import json
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
from tables import D, N, in_a_fork, make, manifest, on_disk, slow_sums

from sense_v2.engram.delta import apply
from sense_v2.engram.delta.apply import apply_delta, export_delta, merge_deltas, revert_delta, strip_delta
from sense_v2.engram.delta.delta_file import read_delta
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.optim import RowAdam
from sense_v2.engram.storage import MMapEmbeddingStorage
from sense_v2.engram.upkeep.check import check_table
from sense_v2.engram.upkeep.convert import convert_table


@pytest.fixture
def base(tmp_path):
    make(tmp_path / "base.dat", init_std=1.0, provenance={"variant": "sense"}).close()
    return tmp_path / "base.dat"


def copy(table, name):
    target = table.with_name(name)
    for suffix in (".dat", ".json"):
        shutil.copy(table.with_suffix(suffix), target.with_suffix(suffix))
    return target


def change(table, **values):
    """row_3=1.0: row 3 is all ones from here on."""
    storage = apply.open_table_as_it_is(table, mode="r+")
    for name, value in values.items():
        storage.write(torch.tensor([int(name.removeprefix("row_"))]), torch.full((1, storage.embedding_dim), value))
    storage.commit(step=9)
    storage.close()
    return table


def taught(base, name, **values):
    """The same as a delta."""
    overlay = OverlayStorage(apply.open_table_as_it_is(base), base.with_name(name))
    for row, value in values.items():
        overlay.write(torch.tensor([int(row.removeprefix("row_"))]), torch.full((1, overlay.embedding_dim), value))
    overlay.commit()
    overlay.close()
    return base.with_name(name)


# Export


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_table_and_its_base_give_the_rows_that_differ(tmp_path, dtype):
    base = tmp_path / "base.dat"
    make(base, dtype=dtype).close()
    trained = change(copy(base, "trained.dat"), row_3=1.0, row_40=2.0, row_7=0.5)
    before = base.read_bytes(), trained.read_bytes()
    delta = export_delta(trained, base, tmp_path / "d")
    assert delta.row_ids_U.tolist() == [3, 7, 40]
    assert delta.rows_UD[:, 0].tolist() == [1.0, 0.5, 2.0]
    assert delta.info.step == 9
    assert (base.read_bytes(), trained.read_bytes()) == before


def test_minus_zero_is_a_change_and_a_row_stored_again_is_none(base):
    change(base, row_1=0.0)
    trained = change(copy(base, "trained.dat"), row_1=-0.0, row_2=5.0)
    change(base, row_2=5.0)
    assert export_delta(trained, base, base.with_name("d")).row_ids_U.tolist() == [1]
    same = export_delta(base, base, base.with_name("none"))
    assert same.row_ids_U.tolist() == []


def test_only_blocks_that_differ_are_read_of_a_large_table(tmp_path, monkeypatch):
    table = tmp_path / "base.dat"
    MMapEmbeddingStorage(3 * 4096, 2, table).close()
    trained = change(copy(table, "trained.dat"), row_5000=1.0)
    read = []
    plain = MMapEmbeddingStorage.__call__
    monkeypatch.setattr(MMapEmbeddingStorage, "__call__", lambda self, ids: read.append(ids) or plain(self, ids))
    assert export_delta(trained, table, tmp_path / "d").row_ids_U.tolist() == [5000]
    met = torch.cat(read)
    assert (int(met.min()), int(met.max())) == (4096, 8191)


def test_the_delta_of_a_compact_table_is_in_the_type_it_is_looked_up_as(base):
    convert_table(base, base.with_name("base8.dat"), "int8")
    convert_table(base.with_name("base8.dat"), base.with_name("back.dat"), "float32")
    trained = change(base.with_name("back.dat"), row_4=1.0)
    delta = export_delta(trained, base.with_name("base8.dat"), base.with_name("d"))
    assert delta.row_ids_U.tolist() == [4]
    with pytest.raises(ValueError, match=r"int8, which are only read. Look them up through"):
        apply_delta(base.with_name("d"), base.with_name("base8.dat"))


def test_tables_that_arent_of_one_kind_are_refused(base, tmp_path):
    make(tmp_path / "other.dat", provenance={"variant": "paper"}, dtype="float16").close()
    with pytest.raises(ValueError, match=r"can't have been made from .*torch.float32.*'sense', here 'paper'"):
        export_delta(tmp_path / "other.dat", base, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_damaged_table_is_found_when_its_delta_is_checked(base):
    trained = change(copy(base, "trained.dat"), row_3=1.0)
    raw = bytearray(trained.read_bytes())
    raw[8 * D * 4] ^= 1
    trained.write_bytes(raw)
    with pytest.raises(ValueError, match="isn't what its manifest says"):
        export_delta(trained, base, base.with_name("d"))


def test_what_is_sent_has_no_optimizer_states(base):
    overlay = OverlayStorage(apply.open_table_as_it_is(base), base.with_name("trained"))
    optimizer = RowAdam(overlay, lr=0.1)
    overlay(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    overlay.commit()
    overlay.close()
    whole, sent = (
        read_delta(base.with_name("trained")),
        strip_delta(base.with_name("trained"), base.with_name("sent")),
    )
    assert whole.states.keys() == {"adam"}
    assert sent.states == {}
    assert torch.equal(sent.rows_UD, whole.rows_UD)
    assert sent.num_bytes < whole.num_bytes


# In place, and back


def test_an_applied_delta_changes_its_rows_in_one_commit_and_is_reverted_bit_for_bit(base):
    delta = taught(base, "d", row_3=1.0, row_40=2.0)
    before, expected = base.read_bytes(), on_disk(base)
    untouched = manifest(base)
    done = apply_delta(delta, base)
    expected[3], expected[40] = 1, 2
    np.testing.assert_array_equal(on_disk(base), expected)
    after = manifest(base)
    assert after["generation"] == untouched["generation"] + 1
    assert after["checksums"] == slow_sums(base)
    assert done.undo is not None
    assert done.undo.name == f"base.undo-1-{done.digest[:12]}.safetensors"
    assert check_table(base).findings == []
    back = revert_delta(base)
    assert base.read_bytes() == before
    assert manifest(base)["checksums"] == untouched["checksums"]
    assert manifest(base)["updates"] == untouched["updates"]
    assert (back.digest, back.digest_before) == (done.digest_before, done.digest)
    assert sorted(path.name for path in base.parent.glob("*undo*")) == []
    # And again, as if nothing had been.
    assert apply_delta(delta, base).digest == done.digest


def test_what_is_looked_up_is_the_same_through_an_overlay_and_in_place(base):
    delta = taught(base, "d", row_3=1.0, row_40=2.0)
    overlay = OverlayStorage(apply.open_table_as_it_is(base), delta, mode="r").eval()
    seen = overlay(torch.arange(N))
    overlay.close()
    apply_delta(delta, base)
    np.testing.assert_array_equal(on_disk(base), seen.numpy())


def test_deltas_on_top_of_one_another_are_reverted_one_after_the_other(base):
    first = taught(base, "first", row_3=1.0)
    states = [base.read_bytes()]
    apply_delta(first, base)
    states.append(base.read_bytes())
    apply_delta(taught(base, "second", row_3=2.0, row_4=2.0), base)
    for expected in reversed(states):
        revert_delta(base)
        assert base.read_bytes() == expected
    with pytest.raises(ValueError, match=r"nothing to revert: its rows have digest [0-9a-f]{64}, .* are none"):
        revert_delta(base)


def test_a_delta_that_takes_another_one_back_is_reverted_like_any_other(base):
    """The table has the same rows at two heights of the stack: each undo is its own."""
    tables = [copy(base, "original.dat")]
    apply_delta(taught(base, "first", row_3=1.0), base)
    tables.append(copy(base, "at_first.dat"))
    apply_delta(taught(base, "second", row_4=2.0), base)
    states = [table.read_bytes() for table in (*tables, base, tables[1])]
    for number, back_to in enumerate(reversed(tables)):
        export_delta(back_to, base, base.with_name(f"back {number}"))
        apply_delta(base.with_name(f"back {number}"), base)
        assert base.read_bytes() == back_to.read_bytes()
    assert len(list(base.parent.glob("base.undo-*"))) == 4
    for expected in reversed(states):
        revert_delta(base)
        assert base.read_bytes() == expected
    assert list(base.parent.glob("*undo*")) == []


def test_an_undo_without_a_number_is_found(base):
    """Releases before named undos by digest alone."""
    before = base.read_bytes()
    done = apply_delta(taught(base, "d", row_3=1.0), base)
    done.undo.rename(base.with_name(f"base.undo-{done.digest[:12]}.safetensors"))
    revert_delta(base)
    assert base.read_bytes() == before


def test_a_delta_of_another_table_is_refused_and_nothing_changes(base):
    delta = taught(base, "d", row_3=1.0)
    other = change(copy(base, "other.dat"), row_9=1.0)
    before = other.read_bytes()
    with pytest.raises(ValueError, match=r"another table than .*digest '[0-9a-f]{64}', here '[0-9a-f]{64}'"):
        apply_delta(delta, other)
    assert other.read_bytes() == before
    assert list(base.parent.glob("*undo*")) == []
    late = taught(base, "late", row_9=1.0)
    apply_delta(delta, base)
    with pytest.raises(ValueError, match="another table"):
        apply_delta(late, base)


def test_what_is_done_already_is_recognised_and_not_done_again(base):
    first = taught(base, "d", row_3=1.0)
    done, again = apply_delta(first, base), apply_delta(first, base)
    assert (done.is_new, again.is_new) == (True, False)
    assert dataclasses.replace(again, is_new=True) == done
    before = base.read_bytes()
    undo = apply_delta(taught(base, "second", row_9=1.0), base).undo
    kept = undo.read_bytes()
    revert_delta(base)
    undo.write_bytes(kept)  # as after a kill behind the commit
    assert not revert_delta(base).is_new
    assert not undo.exists()
    assert base.read_bytes() == before  # and the first delta is still in
    assert revert_delta(base).digest == done.digest_before


def test_a_table_that_was_trained_since_isnt_reverted(base):
    apply_delta(taught(base, "d", row_3=1.0), base)
    change(base, row_9=1.0)
    before = base.read_bytes()
    with pytest.raises(ValueError, match=r"nothing to revert.*undos beside it are base\.undo-1-[0-9a-f]{12}"):
        revert_delta(base)
    assert base.read_bytes() == before


def test_a_delta_that_changes_nothing_leaves_no_undo(base):
    done = apply_delta(taught(base, "d"), base)
    assert (done.num_rows, done.undo, done.digest) == (0, None, done.digest_before)


def test_a_forged_undo_is_refused_before_anything_is_stored(base):
    done = apply_delta(taught(base, "d", row_3=1.0), base)
    raw = done.undo.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    delta = json.loads(header["__metadata__"]["delta"])
    delta["extra"]["reverts_to"] = "00" * 32
    header["__metadata__"]["delta"] = json.dumps(delta)
    text = json.dumps(header).encode()
    done.undo.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    before = base.read_bytes()
    with pytest.raises(ValueError, match="doesn't lead back"):
        revert_delta(base)
    assert base.read_bytes() == before


def test_a_kill_between_undo_and_commit_leaves_the_table_as_it_was(base, monkeypatch):
    delta, before = taught(base, "d", row_3=1.0), base.read_bytes()

    def killed():
        import os
        import signal

        monkeypatch.setattr(MMapEmbeddingStorage, "flush", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        apply_delta(delta, base)

    with pytest.raises(AssertionError):  # the child didn't end by itself
        in_a_fork(killed)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that rows were put back
        MMapEmbeddingStorage(N, D, base).close()
    assert base.read_bytes() == before
    assert not revert_delta(base).is_new
    apply_delta(delta, base)
    revert_delta(base)
    assert base.read_bytes() == before


# Merge


def test_deltas_of_other_rows_become_one(base):
    paths = [taught(base, "a", row_3=1.0), taught(base, "b", row_40=2.0, row_1=3.0), taught(base, "c", row_3=1.0)]
    merged = merge_deltas(paths, base.with_name("m"))
    assert merged.delta.row_ids_U.tolist() == [1, 3, 40]
    assert merged.delta.rows_UD[:, 0].tolist() == [3.0, 1.0, 2.0]
    assert (merged.num_shared, merged.num_conflicts) == (1, 0)
    assert merged.delta.info.extra == {"merged": ["a", "b", "c"]}
    apply_delta(base.with_name("m"), base)


@pytest.mark.parametrize(("prefer", "value"), [("first", 1.0), ("last", 4.0), ("mean", 7 / 3)])
def test_a_row_that_several_changed_is_a_conflict_with_three_ways_out(base, prefer, value):
    paths = [taught(base, "a", row_3=1.0, row_5=9.0), taught(base, "b", row_3=2.0), taught(base, "c", row_3=4.0)]
    with pytest.raises(ValueError, match=r"1 of 2 rows .* a, b, c, to different values \(row 3 first\).*--prefer"):
        merge_deltas(paths, base.with_name("m"))
    assert not base.with_name("m").exists()
    merged = merge_deltas(paths, base.with_name("m"), prefer=prefer)
    assert merged.num_conflicts == 1
    assert merged.delta.rows_UD[:, 0].tolist() == [pytest.approx(value), 9.0]


def test_deltas_of_other_bases_a_lone_one_and_an_unknown_way_are_refused(base):
    first = taught(base, "a", row_3=1.0)
    other = taught(change(copy(base, "other.dat"), row_9=1.0), "b", row_3=1.0)
    with pytest.raises(ValueError, match=r"another table than that of .*b: digest"):
        merge_deltas([first, other], base.with_name("m"))
    with pytest.raises(ValueError, match="name two or more"):
        merge_deltas([first], base.with_name("m"))
    with pytest.raises(ValueError, match="prefer = 'ours': must be one of first, last, mean"):
        merge_deltas([first, first], base.with_name("m"), prefer="ours")
