"""`sense-engram analyze`, `ablate` and `eval --tasks` on a small trained model, and what their reports say."""

import copy
import doctest
import io
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from report_pages import HOSTILE, NAN, Page
from test_cli import content
from test_harness import QUESTIONS

from sense_v2.cli import main, output
from sense_v2.cli.output import finite
from sense_v2.report import ablation, analysis, charts, page


@pytest.fixture(scope="module")
def results(trained, corpus, tmp_path_factory):
    """(what analyze returned, what ablate returned, where their reports are, what was said)."""
    folder, output = trained[0], tmp_path_factory.mktemp("reports") / "new"
    before = content(folder)
    found, said = [], io.StringIO()
    common = ("--corpus", str(corpus), "--sequences", "6", "--json")
    for name, more in (("analyze", ("--text-tokens", "20")), ("ablate", ("--resamples", "200"))):
        page = output / {"analyze": "analysis.html", "ablate": "ablation.html"}[name]
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(said):
            assert main.main([name, str(folder), "--output", str(page), *common, *more]) == 0, said.getvalue()
        found.append(json.loads(out.getvalue()))
    assert content(folder) == before
    return *found, output, said.getvalue().splitlines()


# --- the commands ---


def test_both_write_a_page_and_its_numbers(results):
    *found, folder, said = results
    for one, name in zip(found, ("analysis", "ablation"), strict=True):
        assert json.loads((folder / f"{name}.json").read_text()) == json.loads(json.dumps(finite(one)))
        assert (folder / f"{name}.html").stat().st_size > 10_000
    assert f"report  {folder / 'ablation.html'}, its numbers in {folder / 'ablation.json'}" in said
    assert any(line.startswith("memory off") for line in said)


def test_their_losses_are_those_of_eval(run_json, results, trained, corpus):
    analyzed, ablated, *_ = results
    found = run_json("eval", trained[0], "--corpus", corpus, "--sequences", 6, "--without-memory")
    off = next(one for one in ablated["ablations"] if one["name"] == "memory_off")
    for name, values in (("with_memory", (analyzed["loss"]["with"], ablated["loss"])),):
        assert values == pytest.approx((found["loss"][name],) * 2, abs=1e-6)
    assert (analyzed["loss"]["without"], off["loss"]) == pytest.approx(
        (found["loss"]["without_memory"],) * 2, abs=1e-6
    )
    assert analyzed["bits_per_byte"]["with"] == pytest.approx(found["bits_per_byte"]["with_memory"])
    assert ablated["bits_per_byte"] == pytest.approx(found["bits_per_byte"]["with_memory"])


def test_what_was_trained_on_has_moved_and_nothing_else(results):
    rows = results[0]["rows"]
    groups = {one["low"]: one for one in rows["by_lookups"]}
    # Whoever never looked a row up cannot have moved it.
    assert groups[0]["unmoved"] == 1.0
    assert groups[max(groups)]["unmoved"] < 0.5
    assert rows["measured_rows"] == rows["table_rows"] == 2000
    assert results[0]["counted"]["held_out"]


def test_arguments_that_do_not_fit_are_two_lines(run, trained, corpus, tmp_path):
    for command in ("analyze", "ablate"):
        status, _, error = run(command, trained[0], "--output", tmp_path / "report.pdf")
        assert (status, len(error.splitlines())) == (1, 2)
        assert "a report is an .html file" in error
        assert "report.html" in error
    bare = tmp_path / "bare"
    assert run("train", "--corpus", corpus, "--output", bare, "--steps", 1, "--no-memory", *_SMALL)[0] == 0
    for command in ("analyze", "ablate"):
        status, _, error = run(command, bare, "--output", tmp_path / "r.html")
        assert (status, "no memory to" in error) == (1, True)
    assert not (tmp_path / "r.html").exists()


_SMALL = ("--batch-size", "2", "--sequence-length", "32", "--table-size", "2000")


def test_an_interrupted_ablation_leaves_all_as_it_was(run, trained, corpus, tmp_path, monkeypatch):
    from sense_v2.hf.insight import ablation as ablations

    before, calls = content(trained[0]), []
    losses = ablations.token_losses

    def third_time(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(*arguments, **settings)

    monkeypatch.setattr(ablations, "token_losses", third_time)
    output = tmp_path / "ablation.html"
    assert run("ablate", trained[0], "--corpus", corpus, "--sequences", 2, "--output", output)[0] == 130
    assert content(trained[0]) == before
    assert not output.exists()


def test_eval_runs_tasks_with_memory_and_without(run, run_json, trained, tmp_path):
    (tmp_path / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = tmp_path / "choice.yaml"
    task.write_text(
        "task: word_choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.json'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    found = run_json("eval", trained[0], "--tasks", task, "--without-memory", "--limit", 2)
    (metric,) = found["tasks"]
    assert (metric["task"], metric["metric"], metric["samples"]) == ("word_choice", "acc", 2)
    for name in ("with_memory", "without_memory"):
        assert metric[name]["value"] in (0, 0.5, 1)
    status, out, error = run("eval", trained[0], "--tasks", "word_choice", "--include-path", tmp_path)
    assert (status, error) == (0, "")
    assert re.search(r"word_choice +acc +\d\.\d{4} ± \d\.\d{4} +3", out)
    status, _, error = run("eval", trained[0], "--tasks", "nothing", "--include-path", tmp_path / "nowhere")
    assert (status, "no such folder" in error) == (1, True)


# --- the pages ---


def hostile(results):
    results["model"] = results["corpus"]["name"] = HOSTILE
    for token in results.get("text", {}).get("tokens", []):
        token["text"] = token["layers"][0][0]["text"] = HOSTILE
    for entry in [*results.get("helped", []), *results.get("harmed", [])]:
        entry["context"] = entry["token"] = HOSTILE
    for part in results.get("leaned_on", []):
        for entry in part["ngrams"]:
            entry["text"] = HOSTILE


def broken(results):
    """Every measured loss is no number."""

    def spoil(values):
        if isinstance(values, dict):
            return {
                key: NAN
                if isinstance(value, float) and key not in ("confidence", "share", "expected_sharing", "seconds")
                else spoil(value)
                for key, value in values.items()
            }
        return [spoil(value) for value in values] if isinstance(values, list) else values

    for key in (
        "loss",
        "perplexity",
        "bits_per_byte",
        "gain",
        "scattered",
        "classes",
        "by_frequency",
        "ablations",
        "text",
    ):
        if key in results:
            results[key] = spoil({"": results[key]})[""]


def bare(results):
    """Nothing in the parts that can be empty, one block, a table whose beginning isn't known."""
    if "ablations" in results:
        results["ablations"] = [one for one in results["ablations"] if one["group"] in ("memory", "rows", "gate")]
        for one in results["ablations"]:
            one.update(low=NAN, high=NAN)
        results["blocks"] = 1
        return
    results.update(helped=[], harmed=[], by_frequency=[], leaned_on=[], zipf=[])
    results["rows"]["drift_histogram"] = None
    for group in [*results["rows"]["groups"], *results["rows"]["by_lookups"], *results["heads"]]:
        group.update(unmoved=None, drift=None)
    for head in results["heads"]:
        head.update(ngrams=0, sharing=0, expected_sharing=0.0, hit_rate=NAN, seen_rate=NAN)


def as_it_is(results):
    pass


def written(write, results, folder):
    write(results, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [as_it_is, hostile, broken, bare])
@pytest.mark.parametrize(("number", "report"), [(0, analysis), (1, ablation)])
def test_pages_are_well_formed_and_ask_nothing_of_anybody(results, change, number, report, tmp_path):
    changed = copy.deepcopy(results[number])
    change(changed)
    html = written(report.write_report, changed, tmp_path)
    read = Page(html)
    assert set(re.findall(r"""https?://[^\s"'<>]*""", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for tag, attributes in read.seen:
        assert tag not in ("script", "iframe", "img", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in html
    ids = [attributes["id"] for _, attributes in read.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\b(nan|inf|None|True|False)\b", read.text)
    assert not any(re.search(r"\d\.\d{7,}", text) for text in read.texts)
    told = ablation.terminal_table(changed) if number else "\n".join(analysis.lines(changed))
    assert not re.search(r"\b(nan|inf|None)\b", told)
    assert all(len(line) <= 80 for line in told.splitlines())
    assert written(report.write_report, json.loads(json.dumps(finite(changed))), tmp_path) == html


def test_every_token_of_the_text_is_there_with_its_facts(results, tmp_path):
    html = written(analysis.write_report, results[0], tmp_path)
    tokens = results[0]["text"]["tokens"]
    read = Page(html)
    assert sum("tabindex" in attributes for _, attributes in read.seen) == 20 * (
        1 + len(results[0]["text"]["layers"])
    )
    for ngram in tokens[7]["layers"][0]:
        assert ", ".join(map(str, ngram["rows"])) in read.text


# --- what the sentences say ---


def made(off=(0.5, 0.4, 0.6), kept=(0.0, 0.0, 0.0), gate=(0.02, 0.01, 0.03), head=(0.1, 0.05, 0.15), blocks=50):
    """Results of an ablation: changes with their intervals."""
    loss = 3.0

    def one(name, group, change, low, high, layer=None, order=None, head=None):
        numbers = {"loss": loss + change, "change": change, "low": low, "high": high}
        kept = 1 - change / off[0] if off[0] > 0 else None
        return {"name": name, "group": group, "layer": layer, "order": order, "head": head, **numbers, "kept": kept}

    rows = [(1 - share) * off[0] for share in kept]
    ablations = [
        one("memory_off", "memory", *off),
        *(
            one(name, "rows", change, change - 0.01, change + 0.01)
            for name, change in zip(("rows_shuffled", "capacity_one", "random_table"), rows, strict=True)
        ),
        one("gate_shut", "gate", *off),
        one("gate_open", "gate", *gate),
        one("a", "head", *head, layer=1, order=2, head=0),
        one("b", "head", 0.0, -0.01, 0.01, layer=1, order=2, head=1),
    ]
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "confidence": 0.95,
        "blocks": blocks,
        "ablations": ablations,
    }


def test_the_headline_follows_the_interval():
    assert ablation.outcome(made()) == "better"
    assert ablation.headline(made()) == (
        "The memory helps: the loss rises by 0.500 nats a token (95 % interval 0.400 to 0.600) when it is taken off "
        "(perplexity 20.09 with it, 33.12 without)."
    )
    assert ablation.headline(made(off=(-0.2, -0.3, -0.1))).startswith(
        "The memory harms on this text: the loss falls by 0.200 nats a token (95 % interval 0.100 to 0.300)"
    )
    unsure = made(off=(0.1, -0.1, 0.3))
    assert ablation.outcome(unsure) == "level"
    assert ablation.headline(unsure).startswith("This text doesn't tell whether the memory helps: the loss rises by")
    assert "no gain to divide up" in ablation.contents(unsure)
    assert ablation.outcome(made(off=(NAN, NAN, NAN))) == "broken"


def test_what_the_rows_hold_follows_what_is_kept():
    assert ablation.contents(made()).startswith("Nothing of that gain remains")
    assert ablation.contents(made(kept=(-0.5, 0.1, 0.2))) == (
        "What remains of that gain is nothing with rows "
        "shuffled, 10 % with capacity one, and 20 % with random table. "
        "So nearly all of it depends on what the rows hold."
    )
    assert "So 50 % of it depends on" in ablation.contents(made(kept=(0.1, 0.5, 0.2)))
    assert "So most of it does not depend on" in ablation.contents(made(kept=(0.1, 0.9, 0.2)))


def test_where_and_gate_follow_their_intervals():
    assert ablation.where(made()) == (
        "Taken off one at a time, 1 of 2 heads raises the loss measurably, most of all 2-grams, head 0 (+0.100)."
    )
    assert "Taking off a single head never raises the loss measurably" in ablation.where(made(head=(0.1, -0.1, 0.3)))
    assert ablation.gate(made()).startswith("The gate earns its place: the loss rises by 0.020")
    assert ablation.gate(made(gate=(-0.02, -0.03, -0.01))).startswith("The gate shuts too often: the loss falls")
    assert ablation.gate(made(gate=(0.0, -0.01, 0.01))).startswith("This text doesn't tell what the gate is worth")
    assert ablation.cautions(made()) == []
    assert "only 5 blocks, so the intervals are rough" in ablation.cautions(made(blocks=5))[0]
    assert "only 1 block, so no interval" in ablation.cautions(made(blocks=1))[0]
    apart = made()
    apart["ablations"][4]["loss"] += 0.1
    assert "A shut gate isn't the same as memory off" in ablation.cautions(apart)[0]


def test_bars_stand_where_their_numbers_are():
    (whole, heads) = ablation.panels(made())
    ends = [(0.0, whole["zero"])] + [(bar["change"], bar["at"]) for bar in whole["bars"]]
    slope = np.polyfit([value for value, _ in ends], [at for _, at in ends], 1)[0]
    for value, at in ends:
        assert at == pytest.approx(whole["zero"] + slope * value, abs=0.02)
    for panel in (whole, heads):
        for bar in panel["bars"]:
            assert 0 <= bar["from"] <= bar["at"] <= bar["from"] + bar["width"] <= 100
            assert (bar["from"] <= panel["zero"] <= bar["from"] + bar["width"]) == (bar["effect"] == 0)


def test_the_analysis_tells_collisions_from_chance(results):
    found = copy.deepcopy(results[0])
    for head in found["heads"]:
        head.update(rows=1000, ngrams=400, sharing=132, expected_sharing=131.5)
    assert "share their row with another, about as many as chance alone gives (33 %)." in " ".join(
        analysis.lines(found)
    )
    assert "larger table" not in " ".join(analysis.lines(found))
    for head in found["heads"]:
        head.update(ngrams=600, sharing=400)
    told = " ".join(analysis.lines(found)).replace("\u00a0", " ")
    assert "more than chance alone gives (22 %)" in told
    assert "a larger table would separate them" in told


@pytest.mark.parametrize("command", [("analyze", "no-such-folder"), ("demo",)])
def test_a_report_without_matplotlib_is_refused_before_the_work(run, command, monkeypatch):
    monkeypatch.setattr("sense_v2.cli.output.find_spec", lambda name: None)
    status, out, error = run(*command)
    assert (status, out) == (1, "")
    assert "matplotlib, not installed" in error
    assert 'pip install "sense-v2[demo]"' in error


@pytest.mark.parametrize("module", [analysis, ablation, charts, page, output])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
