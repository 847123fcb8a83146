"""The report of a pretrained model: the sentences follow the numbers, and every number comes from the results."""

import copy
import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from report_pages import HOSTILE, NAN, Page

from sense_v2.report import pretrained

RUN = {"label": "", "description": "", "steps": 60, "seconds": 99.0, "bits_per_byte": 1.0}


def way(label, loss, divergence=None, changed=0.0, *, fusion=0, lora=0):
    damage = None if divergence is None else {"divergence": divergence, "changed": changed, "tokens": 2048}
    perplexity = 2.718281828**loss
    trained = {"fusion": fusion, "lora": lora}
    return {**RUN, "label": label, "loss": loss, "perplexity": perplexity, "damage": damage, "trained": trained}


RESULTS = {
    "title": "What does memory add?",
    "created": "2026-11-30T12:00:00+00:00",
    "corpus": {"name": "code", "files": 80, "held_out_files": 9, "tokens": 1_234_567, "held_out_tokens": 4096},
    "model": {"name": "tiny", "type": "llama", "layers": 30, "hidden_size": 576, "parameters": 134_515_008},
    "engram": {"engram_dim": 512},
    "train": {"seed": 7, "steps": 60},
    "table": {"rows": 2_097_074, "width": 64, "dtype": "float32", "bytes": 536_850_944, "layers": [8, 20]},
    "runs": {
        "untouched": way("the model as it is", 2.4),
        "counted": {**way("memory, counted", 2.1, 0.004, 0.04), "steps": 0, "seconds": 17.4},
        "memory": way("memory", 2.0, 0.008, 0.05, fusion=1_500_000),
        "lora": way("LoRA", 1.98, 0.24, 0.31, lora=2_400_000),
        "both": way("memory and LoRA", 1.82, 0.25, 0.32, fusion=1_500_000, lora=2_400_000),
        "random_rows": way("random rows", 2.32, 0.001, 0.01, fusion=1_500_000),
    },
    "changes": {
        "counted - untouched": {"mean": -0.3, "low": -0.35, "high": -0.25},
        "counted - lora": {"mean": 0.12, "low": 0.09, "high": 0.14},
        "memory - untouched": {"mean": -0.4, "low": -0.5, "high": -0.3},
        "memory - lora": {"mean": 0.02, "low": -0.01, "high": 0.05},
        "both - lora": {"mean": -0.16, "low": -0.19, "high": -0.12},
    },
    "random_rows_keep": 0.2,
    "reading": {"calls": 70, "rows": 9_876, "bytes": 632_064, "asked": 0, "slow": 0, "wait_seconds": 0.0},
    "step_times": {"ratio": 0.78, "low": 0.74, "high": 0.83, "rounds": 6, "seconds": {}},
    "generations": [
        {"prompt": "def f(", "untouched": "x)", "memory": "y)", "lora": "z)", "both": "u)", "random_rows": HOSTILE}
    ],
    "machine": {"cpu": "a cpu", "cores": 2, "memory_bytes": 2**34, "python": "3.11", "torch": "2.13"},
    "seconds": 600.0,
}


def changed(**parts):
    results = copy.deepcopy(RESULTS)
    for path, value in parts.items():
        *where, last = path.replace("_less_", " - ").split("__")
        part = results
        for key in where:
            part = part[key]
        part[last] = value
    return results


def test_the_page_is_whole_and_says_what_the_results_hold(tmp_path):
    pretrained.write_report(RESULTS, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    for told in ("2.400", "0.0080", "0.2400", "31 %", "2,097,074", "1,234,567", "def f(", "z)", "layer 8 of 30"):
        assert told in page.text.replace("\u00a0", " "), told
    assert "70 lookups of 9,876 rows, 632 KB" in page.text.replace("\u00a0", " ")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_the_headline_has_what_was_learned_and_what_was_lost():
    assert pretrained.headline(RESULTS) == (
        "Memory: perplexity 33 % lower; a LoRA: 34 % lower, and 30 times the damage."
    )
    assert "damage" not in pretrained.headline(changed(runs__memory__damage__divergence=0.0))
    assert "broke down" in pretrained.headline(changed(runs__lora__loss=NAN))


@pytest.mark.parametrize(
    ("low", "high", "mean", "told"),
    [
        (-0.01, 0.05, 0.02, "not clearly different: +0.020 nats"),
        (-0.19, -0.12, -0.16, "0.160 nats a token lower"),
        (0.12, 0.19, 0.16, "0.160 nats a token higher"),
    ],
)
def test_a_difference_is_told_only_where_its_interval_has_no_zero(low, high, mean, told):
    results = changed(changes__memory_less_lora={"mean": mean, "low": low, "high": high})
    assert told in pretrained.sentences(results)[0].replace("−", "-")


@pytest.mark.parametrize(
    ("kept", "told"),
    [(0.2, "keeps 20 % of"), (-0.1, "keeps nothing"), (1.3, "did not help"), (NAN, "did not help"), (None, None)],
)
def test_what_random_rows_keep_is_said(kept, told):
    text = " ".join(pretrained.sentences(changed(random_rows_keep=kept)))
    assert (told in text) if told else ("noise" not in text)


def test_step_times_that_are_not_clear_give_no_ratio():
    assert "0.78 times as long" in pretrained.costs(RESULTS)
    told = pretrained.costs(changed(step_times__low=0.5, step_times__high=1.2))
    assert "changed too much" in told
    assert "0.78" not in told


def test_without_the_ways_that_quick_leaves_out(tmp_path):
    results = changed(random_rows_keep=None)
    for name in ("both", "random_rows"):
        del results["runs"][name], results["generations"][0][name]
    del results["changes"]["both - lora"]
    pretrained.write_report(results, tmp_path / "report.html")
    pretrained.write_picture(results, tmp_path / "picture.png")
    assert "memory and LoRA" not in pretrained.terminal_table(results)


def test_the_table_for_a_terminal_is_narrow_and_its_numbers_are_those_of_the_page(tmp_path):
    table = pretrained.terminal_table(RESULTS)
    assert max(map(len, table.splitlines())) <= 80
    pretrained.write_report(RESULTS, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text()).text.replace("\u00a0", " ")
    for run in RESULTS["runs"].values():
        row = next(line for line in table.splitlines() if line.startswith(run["label"] + "  "))
        for cell in filter(None, row.removeprefix(run["label"]).split("  ")):
            if "lower" not in cell:
                assert cell.strip() in page, cell


def test_names_of_points_that_lie_near_each_other_stand_apart():
    figure = Figure(figsize=(10, 5.6))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.115, 0.14, 0.845, 0.63))
    untouched = RESULTS["runs"]["untouched"]["loss"]
    pretrained._draw(axes, changed(runs__random_rows__loss=untouched - 0.01)["runs"])
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == len(RESULTS["runs"])
    whole = axes.get_window_extent()
    assert all(whole.y0 - 9 < (box.y0 + box.y1) / 2 < whole.y1 + 9 for box in boxes)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_results_that_are_not_finite_are_drawn_without_them(tmp_path):
    results = changed(runs__memory__loss=NAN, runs__memory__perplexity=NAN)
    results["runs"]["memory"]["damage"]["divergence"] = NAN
    results["changes"]["memory - lora"] = {"mean": NAN, "low": NAN, "high": NAN}
    pretrained.write_report(results, tmp_path / "report.html")
    pretrained.write_picture(results, tmp_path / "picture.png")
    json.dumps(results)
