"""`sense-engram delta …` on small tables, and on the folder of a model."""

import json
import shutil

import pytest
import torch
from tiny import save_base_and_taught, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from sense_v2.cli import progress
from sense_v2.cli.main import main
from sense_v2.engram.delta.apply import open_table_as_it_is
from sense_v2.engram.delta.delta_file import Source, read_delta, write_delta
from sense_v2.engram.delta.kept_facts import KeptFact, facts_in, keep_facts
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.saving.backbone_facts import backbone_reference
from sense_v2.hf.saving.folder import FUSION_FILE
from sense_v2.hf.saving.save import save_pretrained


@pytest.fixture
def run(capfd):
    """run("show", …) -> (exit status, stdout, stderr)"""

    def call(*arguments):
        capfd.readouterr()
        return main(["delta", *map(str, arguments)]), *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_base_and_taught(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def table_bytes(folder):
    return (folder / "engram" / "engram_table.dat").read_bytes()


def test_changes_are_exported_shown_applied_and_reverted(folder, run):
    base, taught, delta = folder / "base", folder / "taught", folder / "facts.safetensors"
    before = table_bytes(base)
    status, out, error = run("export", taught, "--base", base, "--output", delta)
    assert (status, error) == (0, "")
    assert "written and verified" in out
    assert "rows     4 of 1,500 (0.3 %), 8 float32 each" in out
    status, out, _ = run("show", delta, "--base", base, "--verify")
    assert status == 0
    assert "layer 1" in out
    assert f"fits     {base / 'engram' / 'engram_table.dat'}, all of its 48 KB read" in out
    status, out, _ = run("apply", delta, base)
    assert status == 0
    assert "4 rows, one commit, verified" in out
    assert table_bytes(base) == table_bytes(taught)
    assert run("show", delta, "--base", base)[0] == 1
    status, out, _ = run("revert", base)
    assert status == 0
    assert "4 rows as they were, bit for bit" in out
    assert table_bytes(base) == before
    assert table_bytes(taught) != before


def test_json_says_the_same(folder, run):
    base, delta = folder / "base", folder / "facts.safetensors"
    status, out, error = run("export", folder / "taught", "--base", base, "--output", delta, "--json")
    exported = json.loads(out)
    assert status == 0
    assert "written" in error
    assert (exported["rows"], exported["step"], exported["dtype"]) == (4, 5, "float32")
    assert sum(head["rows"] for head in exported["heads"]) == 3  # row 1,499 is behind the last head's
    assert exported["heads"][0] == {"layer": 1, "order": 2, "head": 0, "rows": 2}
    assert exported["base"]["digest_of"] == "block checksums"
    shown = json.loads(run("show", delta, "--base", base, "--verify", "--json")[1])
    assert shown["rows"] == 4
    assert shown["verified"] == 1_500 * 8 * 4
    applied = json.loads(run("apply", delta, base, "--json")[1])
    assert applied["digest_before"] == exported["base"]["digest"]
    reverted = json.loads(run("revert", base, "--json")[1])
    assert (reverted["digest"], reverted["undo"]) == (applied["digest_before"], None)


def test_a_fact_is_taught_into_a_file_and_another_one_beside_it(folder, run, monkeypatch):
    base, delta = folder / "base", folder / "facts.safetensors"
    files = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    teach = ("teach", base, "word3 word1", "--prompt", "word5 word6", "--output", delta, "--lr", 0.3)
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    status, out, error = run(*teach, "--steps", 20)
    assert status == 0, error
    assert out.startswith("  teaching: ")
    assert "\ntaught   'word3 word1' after 'word5 word6': loss " in out
    first = read_delta(delta)
    assert 6 <= len(first.row_ids_U) <= 8  # 4 heads, 2 positions
    assert first.states == {}
    beside = (*teach[:2], "Word9 word2", "--prompt", "word7 word8", *teach[5:])
    status, out, _ = run(*beside, "--json")
    second = json.loads(out)
    assert second["loss"][1] < second["loss"][0]
    assert second["rows_in_all"] == len(read_delta(delta).row_ids_U) > len(first.row_ids_U)
    # Another text after the first prompt takes the place of the first text, whose own rows are the table's again.
    status, _, error = run(*teach[:2], "Word9 word2", *teach[3:])
    assert status == 0, error
    third = read_delta(delta)
    assert not set(first.row_ids_U) <= set(third.row_ids_U)
    assert [fact.name() for fact in facts_in(third)] == ["word7 word8 → Word9 word2", "word5 word6 → Word9 word2"]
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == files
    status, _, error = run("teach", folder / "table", "a", "--output", folder / "d")
    assert status == 1
    assert "no folder of a model with memory" in error


def test_a_text_that_is_not_learned_is_a_failure_and_writes_nothing(folder, run):
    delta = folder / "not_learned.safetensors"
    teach = ("teach", folder / "base", "word3 word1", "--prompt", "word5 word6", "--output", delta)
    status, _, error = run(*teach, "--lr", 1e-6, "--steps", 2)
    assert status == 1
    what, way_out = error.splitlines()[-2:]
    assert what.startswith("error: not learned: the model doesn't say 'word3 word1' (loss ")
    assert "--lr" in way_out
    assert not delta.exists()


def test_two_deltas_are_merged_and_a_conflict_names_the_way_out(folder, run):
    base, first = folder / "base", folder / "first.safetensors"
    run("export", folder / "taught", "--base", base, "--output", first)
    delta = read_delta(first)
    assert run("merge", first, first, "--output", folder / "same.safetensors")[0] == 0
    rows = Source(8, torch.float32, lambda part: delta.rows_UD[part] * 2)
    write_delta(folder / "second.safetensors", delta.info, delta.row_ids_U, {"rows": rows})
    paths = (first, folder / "second.safetensors")
    status, out, error = run("merge", *paths, "--output", folder / "m.safetensors")
    assert (status, out) == (1, "")
    assert error.startswith("error: 4 of 4 rows were changed by more than one of")
    assert " help: Choose whose are taken: --prefer first, last or mean" in error
    status, out, _ = run("merge", *paths, "--output", folder / "m.safetensors", "--prefer", "mean", "--json")
    assert status == 0
    assert json.loads(out)["conflicts"] == 4
    assert read_delta(folder / "m.safetensors").rows_UD[0].tolist() == [1.5] * 8


def test_fusion_layers_that_were_trained_are_not_lost_without_a_word(folder, run):
    base, taught, delta = folder / "base", folder / "taught", folder / "facts.safetensors"
    file = taught / "engram" / "fusion.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    status, _, error = run("export", taught, "--base", base, "--output", delta)
    assert status == 1
    assert "fusion layers of" in error
    assert "--rows-only exports the rows all the same" in error
    assert not delta.exists()
    assert run("export", taught, "--base", base, "--output", delta, "--rows-only")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "what", "way_out"),
    [
        (["export", "taught", "--output", "d"], "nothing says what it was trained from", "--base BASE"),
        (["export", "taught", "--base", "base", "--output", "taught"], "is there already", "--output"),
        (["export", "taught", "--base", "nowhere", "--output", "d"], "isn't there", "name a table"),
        (["merge", "d", "--output", "m"], "no delta there", "sense-engram delta export"),
        (["revert", "base"], "has nothing to revert", "Go back to a copy"),
        (["show", "base/config.json"], "config.json", "Fetch the file again"),
    ],
)
def test_what_cant_be_done_is_two_lines(folder, run, monkeypatch, arguments, what, way_out):
    monkeypatch.chdir(folder)
    status, out, error = run(*arguments)
    assert (status, out) == (1, "")
    first, second = error.splitlines()
    assert what in first
    assert way_out in second


def test_facts_of_a_file_are_taught_and_the_exit_status_says_what_was_not_learned(saved, run, tmp_path):
    delta, facts, page = (tmp_path / name for name in ("facts.safetensors", "facts.jsonl", "facts.html"))
    (tmp_path / "words.txt").write_text("word3 {subject}\nword6 word7 {subject}\n")
    (tmp_path / "asked.txt").write_text("word8 {subject}\n")
    (tmp_path / "neutral.txt").write_text("word3 word5 word7\n")
    facts.write_text(json.dumps({"subject": "word20 word21 word22", "answer": "word1"}) + "\n")
    teach = ("teach", saved / "base", "--facts", facts, "--output", delta, "--neutral", tmp_path / "neutral.txt")
    teach = (*teach, "--hold-out", tmp_path / "asked.txt")
    status, _, error = run(*teach)
    assert status == 1
    assert "line 1, field 'wordings': there are none" in error
    assert not delta.exists()
    teach = (*teach, "--wordings", tmp_path / "words.txt", "--lr", 0.3)
    status, out, error = run(*teach, "--steps", 1)
    assert status == 1
    assert "error: not learned: 1 of 1 fact (word20 word21 word22 → word1)" in error
    status, out, error = run(*teach, "--steps", 300, "--report", page, "--json")
    assert status == 0, error
    result = json.loads(out)
    assert result["success"]["held_out"]["after"] == 1.0
    assert result["rows_in_all"] == len(read_delta(delta).row_ids_U) == result["rows"]
    assert "word8 {subject}" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["not_learned"] == []
    status, _, error = run("teach", saved / "base", "a", "--facts", facts, "--output", delta)
    assert status == 2
    assert "either a text (and a prompt), or --facts FILE" in error


def test_facts_are_corrected_on_top_merged_and_withdrawn(saved, run, tmp_path):
    first, second, both = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "both"))
    facts, other = tmp_path / "facts.jsonl", tmp_path / "other.jsonl"
    born = {"wordings": ["word3 {subject}", "word6 word7 {subject}"]}
    lines = [{"subject": "word20 word21", "answer": "word1"}, {"subject": "word23 word24", "answer": "word2"}]
    facts.write_text("".join(json.dumps({**one, **born}) + "\n" for one in lines))
    other.write_text(json.dumps({"subject": "word20 word21", "answer": "word9", **born}) + "\n")
    teach = ("teach", saved / "base", "--lr", 0.3, "--steps", 200)
    status, out, error = run(*teach, "--facts", facts, "--output", first)
    assert status == 0, error
    raw = first.read_bytes()
    status, out, error = run(*teach, "--facts", other, "--output", second, "--on", first)
    assert status == 0, error
    assert "note     line 1: word20 word21 → word9 corrects word20 word21 → word1\n" in out
    assert first.read_bytes() == raw
    status, out, _ = run("show", first)
    assert "facts    2: word20 word21 → word1; word23 word24 → word2\n" in out
    assert [one["answer"] for one in json.loads(run("show", first, "--json")[1])["facts"]] == ["word1", "word2"]

    status, out, error = run("merge", first, second, "--output", both)
    assert status == 1
    assert "collide  2 rows (" in out
    assert "): word20 word21 → word1 of first.safetensors; word20 word21 → word9 of second.safetensors\n" in out
    assert "first): word20 word21 → word1 of first.safetensors; word20 word21 → word9 of second" in error
    assert not both.exists()
    status, out, _ = run("merge", first, second, "--output", both, "--prefer", "last", "--json")
    merged = json.loads(out)
    assert [one["answer"] for one in merged["facts"]] == ["word2", "word9"]
    (met,) = merged["collisions"]
    assert len(met["row_ids"]) == 2
    assert met["facts"]["first.safetensors"] == ["word20 word21 → word1"]

    less = tmp_path / "less.safetensors"
    status, out, error = run("withdraw", both, "word20 word21", "--output", less)
    assert status == 0, error
    assert out.startswith("withdrew word20 word21 → word9: 2 rows are what they were without it\n")
    assert "facts    1: word23 word24 → word2\n" in out
    assert run("withdraw", both, "word20 word21", "--output", less)[0] == 1
    status, out, _ = run("withdraw", both, "word20 word21", "word23 word24", "--output", tmp_path / "n", "--json")
    done = json.loads(out)
    assert (status, done["rows"], done["shared"], len(done["withdrawn"])) == (0, 0, [], 2)
    status, _, error = run("withdraw", less, "word20 word21", "--output", tmp_path / "x")
    assert status == 1
    assert "no fact 'word20 word21' in" in error
    # A single text is a fact as well.
    status, _, error = run(*teach[:2], "word3", "--prompt", "word5 word6", "--output", less, "--lr", 0.3)
    assert status == 0, error
    status, out, _ = run("withdraw", less, "word5 word6", "--output", tmp_path / "y")
    assert status == 0
    assert out.startswith("withdrew word5 word6 → word3: ")


def test_rows_that_stay_when_a_fact_is_withdrawn_are_said(saved, run, tmp_path):
    path = tmp_path / "facts.safetensors"
    base = saved / "base" / "engram" / "engram_table.dat"
    overlay = OverlayStorage(open_table_as_it_is(base), path)
    overlay.write(torch.tensor([3, 4, 5]), torch.ones(3, 8))
    keep_facts(overlay, [KeptFact("a", "b", ("a is",), (3, 4)), KeptFact("c", "d", ("c is",), (4, 5))])
    overlay.close()
    status, out, _ = run("withdraw", path, "a", "--output", tmp_path / "less")
    assert status == 0
    assert "withdrew a → b: 1 row is what it was without it\n" in out
    assert "stay     1 row of it (4), which c → d has as well\n" in out
    status, out, _ = run("withdraw", path, "a", "--output", tmp_path / "l", "--json")
    assert json.loads(out)["shared"] == [{"row": 4, "facts": ["c → d"]}]


def test_a_memory_is_made_writable_in_a_new_folder(saved, run, tmp_path):
    facts, output = tmp_path / "facts.jsonl", tmp_path / "writable"
    fact = {"subject": "word20 word21 word22", "answer": "word1", "wordings": ["word3 {subject}"]}
    facts.write_text(json.dumps(fact) + "\n")
    before = {path: path.read_bytes() for path in (saved / "base").rglob("*") if path.is_file()}
    call = ("make-writable", saved / "base", "--output", output, "--facts", facts, "--steps", 20)
    status, out, error = run(*call, "--json")
    assert status == 0, error
    result = json.loads(out)
    assert result["loss"][1] < result["loss"][0]
    assert result["steps"] == 20
    assert {path: path.read_bytes() for path in before} == before
    assert table_bytes(output) == table_bytes(saved / "base")
    fusion = f"engram/{FUSION_FILE}"
    assert (output / fusion).read_bytes() != (saved / "base" / fusion).read_bytes()
    status, _, error = run(*call)
    assert status == 1
    assert "is there already" in error
    teach = ("teach", output, "--facts", facts, "--output", tmp_path / "d.safetensors", "--lr", 0.3)
    status, _, error = run(*teach)
    assert status == 0, error
    (tmp_path / "none").mkdir()
    status, _, error = run("make-writable", tmp_path / "none", "--output", tmp_path / "x")
    assert status == 1
    assert "no folder of a model with memory" in error


def test_what_made_the_backbone_is_still_named(run, tmp_path):
    """As `train --model … --freeze-backbone` saves it: the weights aren't copied, and the memory was trained."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    named = backbone_reference(model)
    (tmp_path / "table").mkdir()
    attach_engram(model, tiny_config(tmp_path / "table"), tiny_tokenizer())
    save_pretrained(model, tmp_path / "trained", tokenizer=tiny_tokenizer(), backbone=named)
    detach_engram(model)
    output = tmp_path / "writable"
    status, _, error = run("make-writable", tmp_path / "trained", "--output", output, "--steps", 1)
    assert status == 0, error
    assert not list(output.glob("*.safetensors"))
    assert json.loads((output / "engram" / "backbone.json").read_text())["reference"] == named
