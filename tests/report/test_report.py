"""The training report, held to results made up here: what it says must follow from the numbers it is given."""

import copy
import doctest
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import HOSTILE, NAN, Page, contrast, schemes

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.hf.experiments.step_times import at_equal_time
from sense_v2.report import page, plots, training, verdict, wording
from sense_v2.report.training import terminal_table, write_picture, write_report

LABELS = {
    "plain": "without memory",
    "engram": "with memory",
    "random_rows": "rows at random",
    "shuffled": "rows shuffled",
}
CODE = '''def rows_of(table, row_ids):
    """Rows by their ids."""
\tfor row_id in row_ids:
        yield table[row_id]


'''


def run(label: str, end: float, step_seconds: float, seed: int, num_steps: int = 300) -> dict:
    """A run whose loss falls from ln 4096 to `end`."""
    noise = np.random.default_rng(seed)
    steps = np.arange(1, num_steps + 1)
    curve = end + (math.log(4096) - end) * np.exp(-4.5 * steps / num_steps) * (1 - steps / num_steps) ** 0.3
    losses = curve + 0.15 * noise.standard_normal(num_steps)
    seconds = np.cumsum(step_seconds * (1 + 0.1 * noise.random(num_steps)))
    evals = [
        {"step": int(s), "loss": float(curve[s - 1] + 0.04)}
        for s in range(num_steps // 6, num_steps + 1, num_steps // 6)
    ]
    for evaluation in evals:
        evaluation["perplexity"] = math.exp(evaluation["loss"])
    return {
        "label": label,
        "steps": steps.tolist(),
        "train_loss": losses.tolist(),
        "seconds": seconds.tolist(),
        "evals": evals,
        "loss": evals[-1]["loss"],
        "perplexity": evals[-1]["perplexity"],
        "bits_per_byte": evals[-1]["loss"] / math.log(2) / 3.2,
    }


def step_times(ratio: float = 1.32, low: float = 1.28, high: float = 1.37) -> dict:
    spread = {"plain": (0.27, 0.28, 0.34), "engram": (0.36, 0.37, 0.4)}
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "rounds": 9,
        "seconds": {name: dict(zip(("low", "median", "high"), own, strict=True)) for name, own in spread.items()},
    }


def made_results(engram: float = 2.47, controls: bool = True) -> dict:
    """Results of a whole demo; the plain model ends at a loss of 3.04 and the memory model at `engram` + 0.04."""
    noise = np.random.default_rng(5)
    runs = {"plain": run(LABELS["plain"], 3.0, 0.28, 1), "engram": run(LABELS["engram"], engram, 0.37, 2)}
    kept = {}
    if controls:
        runs["random_rows"] = run(LABELS["random_rows"], 2.96, 0.36, 3)
        runs["random_rows"]["description"] = "every position reads rows that have nothing to do with its tokens"
        runs["shuffled"] = run(LABELS["shuffled"], 2.98, 0.37, 4)
        gain = runs["plain"]["loss"] - runs["engram"]["loss"]
        kept = {
            name: (runs["plain"]["loss"] - runs[name]["loss"]) / gain if gain else NAN
            for name in ("random_rows", "shuffled")
        }
    tokens = re.findall(r" ?\w+|\s+(?=\s\w)|\s+|[^\w\s]+", CODE * 4)
    config = EngramConfig(
        table_size=2_000_000, engram_dim=256, num_heads=4, layer_indices=[1, 3], tokenizer_name="demo-bpe-4096"
    )
    return {
        "title": "Does n-gram memory help a small model?",
        "created": "2026-03-02T09:15:00+00:00",
        "corpus": {
            "name": "Python standard library",
            "files": 812,
            "held_out_files": 90,
            "tokens": 4_120_331,
            "held_out_tokens": 455_120,
            "bytes": 13_402_111,
            "held_out_bytes": 1_480_222,
        },
        "compression": {
            "tokenizer": "deepseek-ai/DeepSeek-V3",
            "tokens": 129_280,
            "ids": 102_201,
            "normalization": "nfkc",
            "examples": [
                {"compressed_id": 5, "tokens": ["The", " the", "THE", " The", "the"]},
                {"compressed_id": 9_120, "tokens": ["é", "É", " é"]},
                {"compressed_id": 12, "tokens": ["\n", "\n\n"]},
            ],
        },
        "demo_compression": {
            "tokenizer": "demo-bpe-4096",
            "tokens": 4_096,
            "ids": 3_370,
            "normalization": "nfkc",
            "examples": [{"compressed_id": 80, "tokens": ["return", " return", "Return"]}],
        },
        "model": {"type": "llama", "layers": 6, "hidden_size": 256, "parameters": 6_824_192},
        "engram": config.to_dict(),
        "table": {"rows": 1_999_840, "width": 32, "dtype": "float32", "bytes": 1_999_840 * 32 * 4},
        "fusion_parameters": 265_216,
        "train": TrainConfig().to_dict(),
        "trained_tokens": 614_400,
        "runs": runs,
        "step_times": step_times(),
        "equal_time": at_equal_time(runs["plain"]["evals"], runs["engram"]["evals"], step_times()),
        "controls": kept,
        "changed": {"tokens": tokens, "gains": [None, *noise.normal(0.5, 1.0, len(tokens) - 1).tolist()]},
        "gates": [
            {"layer": layer, "tokens": tokens, "gates": noise.beta(1.2, 2.5, len(tokens)).tolist()}
            for layer in (1, 3)
        ],
        "rows_touched": [
            {
                "layer": layer,
                "order": order,
                "head": head,
                "rows": 65_521,
                "touched": 20_000 + 9_000 * order + 100 * head,
            }
            for layer in (1, 3)
            for order in (2, 3)
            for head in range(4)
        ],
        "generations": [
            {
                "prompt": "def test_",
                "plain": "def test_self(self):\n    self.assertEqual(self.assertEqual(self.assertEqual(",
                "engram": "def test_read_rows(self):\n    with self.assertRaises(ValueError):\n        read(rows)\n",
            }
        ],
        "reading": {
            "calls": 1_300,
            "rows": 8_123_456,
            "bytes": 1_039_802_368,
            "asked": 12,
            "slow": 17,
            "wait_seconds": 0.25,
            "wait_seconds_p99": 0.065,
        },
        "machine": {
            "cpu": "Intel Xeon Processor @ 2.10GHz",
            "cores": 2,
            "memory_bytes": 8_200_000_000,
            "python": "3.11.9",
            "torch": "2.8.0",
        },
        "seconds": 641.2,
    }


def losing() -> dict:
    return made_results(engram=3.2)


def quick() -> dict:
    return made_results(controls=False)


def level() -> dict:
    return made_results(engram=3.001)


def diverged() -> dict:
    results = made_results()
    broken = results["runs"]["engram"]
    broken["train_loss"][120:] = [NAN] * 180
    for evaluation in broken["evals"][2:]:
        evaluation.update(loss=NAN, perplexity=float("inf"))
    broken.update(loss=NAN, perplexity=NAN, bits_per_byte=None)
    results["equal_time"].update(other=None, ratio=NAN, low=None, high=NAN)
    results["controls"] = {"random_rows": NAN, "shuffled": None}
    results["gates"][0]["gates"][3] = results["changed"]["gains"][4] = NAN
    return results


def never_finite() -> dict:
    """Nothing measured is a number: the plots have nothing to draw, and the report must still be written."""
    results = diverged()
    for broken in results["runs"].values():
        broken["train_loss"] = [NAN] * len(broken["steps"])
        for evaluation in broken["evals"]:
            evaluation.update(loss=None, perplexity=float("inf"))
        broken.update(loss=NAN, perplexity=NAN, bits_per_byte=NAN)
    results.update(step_times=step_times(NAN, None, NAN), equal_time=None)
    results["step_times"]["seconds"]["engram"] = {"median": NAN, "low": None, "high": NAN}
    for layer in results["gates"]:
        layer["gates"] = [NAN] * len(layer["tokens"])
    return results


def sparse() -> dict:
    """One step, one evaluation, and nothing where a part may be empty."""
    results = quick()
    for name, label in (("plain", "a"), ("engram", "b")):
        results["runs"][name] = run(label, 3.0, 0.1, 1, num_steps=6)
        for key in ("steps", "train_loss", "seconds"):
            results["runs"][name][key] = results["runs"][name][key][:1]
        results["runs"][name]["evals"] = [{**results["runs"][name]["evals"][-1], "step": 1}]
    results.update(
        changed={"tokens": [], "gains": []}, gates=[], rows_touched=[], generations=[], controls={}, equal_time=None
    )
    return results


def hostile() -> dict:
    results = made_results()
    results["title"] = results["corpus"]["name"] = results["machine"]["cpu"] = HOSTILE
    for name in results["runs"]:
        results["runs"][name]["label"] = results["runs"][name]["description"] = HOSTILE
    results["gates"][0] = {"layer": 1, "tokens": [HOSTILE, "\n", "", "  ", "\t"], "gates": [0.1, 0.2, 0.3, 0.4, 0.5]}
    results["changed"] = {"tokens": [HOSTILE, "\n", ""], "gains": [None, 0.5, -3.0]}
    results["compression"]["examples"][0]["tokens"] = [HOSTILE]
    results["compression"]["tokenizer"] = HOSTILE
    results["generations"] = [{"prompt": HOSTILE, "plain": HOSTILE + HOSTILE, "engram": HOSTILE}]
    results["engram"]["storage_path"] = HOSTILE
    return results


def too_noisy() -> dict:
    """The machine's speed changed so much that step times say nothing."""
    return {**made_results(), "step_times": step_times(0.9, 0.61, 1.9), "equal_time": None}


SHAPES = [made_results, too_noisy, losing, quick, level, diverged, never_finite, sparse, hostile]


def written(results: dict, folder: Path) -> str:
    write_report(results, folder / "new" / "report.html")
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("make", SHAPES)
def test_page_is_well_formed_and_asks_nothing_of_anybody(make, tmp_path):
    html = written(make(), tmp_path)
    read = Page(html)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"""https?://[^\s"'<>]*""", html)) == namespaces
    for tag, attributes in read.seen:
        assert tag not in ("script", "iframe", "img", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "srcset", "action", "poster", "data"):
                assert value == "data:," or value.startswith("#")
            elif not name.startswith("xmlns"):
                assert not re.search(r"url\((?!#)", value or "")
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", (page.FOLDER / "style.css").read_text())
    ids = [attributes["id"] for _, attributes in read.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert set(used) <= set(ids)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("make", SHAPES)
def test_no_number_is_printed_raw(make, tmp_path):
    text = Page(written(make(), tmp_path)).text
    assert not re.search(r"\b(nan|inf|None|True|False)\b", text)
    assert not re.search(r"\d\.\d{7,}", text)
    assert not re.search(r"\b(nan|inf|None)\b", terminal_table(make()))


@pytest.mark.parametrize("make", SHAPES)
def test_results_may_come_out_of_a_json_file(make, tmp_path):
    results = make()
    read = json.loads(json.dumps(results))
    assert written(read, tmp_path / "a") == written(results, tmp_path / "b")


def test_every_part_of_the_results_is_on_the_page(tmp_path):
    results = made_results()
    text = Page(written(results, tmp_path)).text.replace("\u00a0", " ").replace("’", "'")
    for part in (
        "Python standard library, 2 March 2026, 09:15 UTC",
        "129,280 tokens fold into 102,201 compressed ids, 21 % fewer",
        "4,096 tokens fold into 3,370 compressed ids, 18 % fewer",
        "6.82 M parameters",
        "265 K more parameters inside its layers and a table of 1,999,840 rows of 32 float32 values, 256 MB on disk",
        "Training reached 682,400 of 1,048,336 rows, 65 %: 58 % of those for 2-grams and 72 % of those for 3-grams",
        "Training text4,120,331 tokens, 812 files, 13.4 MB",
        "Trained on614,400 tokens in each run, 15 % of that text: 300 steps of 8 × 256",
        "(table_size asks for 2,000,000; each head gets a prime number of rows.)",
        "455,120 tokens, 90 files, 1.48 MB",
        "Intel Xeon Processor @ 2.10GHz, 2 cores, 8.2 GB of memory",
        "Python 3.11.9, PyTorch 2.8.0",
        "10 min 41 s",
        "from seed 0",
        "every position reads rows that have nothing to do with its tokens",
        "with self.assertRaises(ValueError):",
        "sequence_length256",
        "ngram_orders[2, 3]",
        "hidden_size256",
        verdict.headline(results),
        verdict.controls(results),
        verdict.steps(results),
        verdict.equal_time(results),
    ):
        assert part in text
    assert "def test_self(self):" not in text, "the prompt belongs to its own box"


def test_headline_follows_the_numbers():
    results = made_results()
    plain, engram = results["runs"]["plain"], results["runs"]["engram"]
    plain["perplexity"], engram["perplexity"] = 20.0, 11.8
    assert verdict.headline(results) == ("The memory model's perplexity is 41 % lower: 11.80 instead of 20.00.")
    engram["perplexity"] = 22.4
    assert verdict.outcome(results) == "worse"
    assert verdict.headline(results) == (
        "The memory model's perplexity is 12 % higher: 22.40 against 20.00 without memory. "
        "Here the memory did not help."
    )
    engram["perplexity"] = 900.0
    assert "is 45 times as high: 900.0 against" in verdict.headline(results)
    engram["perplexity"] = 20.06
    assert verdict.outcome(results) == "level"
    assert verdict.headline(results).endswith("end level: their perplexities, 20.06 and 20.00, are 0.3 % apart.")
    engram["perplexity"] = NAN
    assert verdict.headline(results) == (
        "The memory model's perplexity is not a finite number: training broke down. The plain model ended at 20.00. "
        "This run does not say whether the memory helps."
    )
    plain["perplexity"] = float("inf")
    assert verdict.headline(results).startswith("The memory and plain models' perplexity is not a finite number")
    engram["perplexity"] = 9.0
    assert verdict.headline(results).startswith("The plain model's perplexity is not a finite number")


def test_a_losing_memory_is_nowhere_called_a_gain(tmp_path):
    results = losing()
    for text in (Page(written(results, tmp_path)).text, terminal_table(results)):
        text = re.sub(r"\s+", " ", text)
        assert "higher" in text
        assert "Here the memory did not help." in text
        assert "There is no gain over the plain model for the controls to keep." in text
        assert not re.search(r"keeps \d", text)
        assert "instead of" not in text


def test_missing_controls_are_named(tmp_path):
    text = Page(written(quick(), tmp_path)).text
    assert "This run left out the controls" in text
    assert LABELS["shuffled"] not in text
    results = made_results()
    del results["runs"]["shuffled"], results["controls"]["shuffled"]
    assert verdict.controls(results).endswith("Left out of this run: shuffled.")
    written(results, tmp_path)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            (0.07, 0.03),
            "keeps 7.0 % of the gain. “rows shuffled” keeps 3.0 % of the gain. So nearly the whole gain, ",
        ),
        ((0.07, 0.03), "at least 93 % of it, comes from what the controls take away."),
        ((-0.2, -0.1), "So nearly the whole gain, all of it, comes from what the controls take away."),
        ((0.4, 0.1), "So 60 % of the gain comes from what “rows at random” takes away; the rest is there without"),
        ((0.1, 0.9), "So most of the gain is there without what “rows shuffled” takes away, which accounts for only"),
        ((0.1, 0.9), "accounts for only 10 % of it."),
        ((1.2, 0.1), "So what “rows at random” takes away did not help here: without it the model is at least as"),
        ((NAN, 0.1), "No share can be given for rows at random."),
    ],
)
def test_controls_sentence(kept, said):
    results = made_results()
    results["controls"] = dict(zip(("random_rows", "shuffled"), kept, strict=True))
    assert said in verdict.controls(results)


def test_cost_sentences():
    results = made_results()
    results["step_times"] = step_times(1.3214)
    assert verdict.steps(results) == (
        "A step of the memory model takes 1.32 times as long as a plain step (95 % interval 1.28 to 1.37; median "
        "370 ms against 280 ms)."
    )
    results["step_times"] = step_times(1.001, 0.98, 1.03)
    assert "takes as long as a plain step" in verdict.steps(results)
    same = {"base_steps": 300, "other_steps": 227.3, "base": 20.0, "other": 15.0, "ratio": 0.75, "low": 0.7}
    results["equal_time"] = {**same, "high": 0.8}
    assert verdict.equal_time(results) == (
        "At equal training time, 300 plain steps and 227 with memory, the memory model's perplexity is 25 % lower "
        "(30 % lower to 20 % lower over that interval): 15.00 against 20.00."
    )
    results["equal_time"] = {**same, "other": 25.0, "ratio": 1.25, "low": 1.2, "high": 1.3}
    assert "25 % higher" in verdict.equal_time(results)
    results["equal_time"] = {**same, "other": 19.0, "ratio": 0.95, "high": 1.04}
    assert verdict.equal_time(results).endswith(
        "this run doesn't tell which is better: perplexity 19.00 with memory and 20.00 without, somewhere from "
        "30 % lower to 4.0 % higher."
    )
    results["equal_time"] = None
    assert verdict.equal_time(results) == "The models were not compared at equal training time."


def test_step_times_that_vary_too_much_are_called_so(tmp_path):
    """No number in place of the ratio, none at equal time, and no curve over time."""
    results = too_noisy()
    assert verdict.steps(results) == (
        "This machine's speed changed too much to say what a step costs: the memory model's step time, divided by "
        "the plain model's, has a 95 % interval of 0.61 to 1.90."
    )
    assert verdict.equal_time(results) == "So no comparison at equal training time is made."
    text = Page(written(results, tmp_path)).text
    for shown in (text, re.sub(r"\s+", " ", terminal_table(results))):
        assert "speed changed too much to say what a step costs" in shown
        assert "times as long" not in shown
        assert "At equal training time" not in shown
    assert [panel["caption"] for panel in plots.loss_panels(results)] == [
        "Validation loss over steps",
        "Training loss over steps",
    ]


def test_time_in_the_plots_is_steps_times_what_was_measured_in_turns():
    """The seconds of runs that follow each other, and the runs that took no turns, are not drawn over time."""
    results = made_results()
    for run in results["runs"].values():
        run["seconds"] = [1000.0 * seconds for seconds in run["seconds"]]
    panels = plots.loss_panels(results)
    captions = [f"{kind} loss over {over}" for kind in ("Validation", "Training") for over in ("steps", "time")]
    assert [panel["caption"] for panel in panels] == captions
    for panel in panels[1::2]:
        text = Page(str(panel["svg"])).text
        assert "training time (seconds)" in text
        assert LABELS["engram"] in text
        assert LABELS["shuffled"].split()[1] not in text


def test_broken_losses_are_counted():
    told = verdict.curiosities(diverged())
    assert told == [
        "“with memory”: 180 of 300 training losses are not finite, the first at step 121.",
        "“with memory”: 4 of 6 validation losses are not finite, the first at step 150.",
    ]
    assert verdict.curiosities(made_results()) == []


def test_hostile_texts_stay_texts(tmp_path):
    html = written(hostile(), tmp_path)
    read = Page(html)
    assert "<script" not in html
    assert "alert('x')" in read.text
    assert [tag for tag, _ in read.seen if tag == "h1"] == ["h1"]
    # Markup in matplotlib's mathematics stays as it was typed.
    assert "$x^2$" in read.text
    assert any("<script>alert('x')</script>&\"quote\"" in text for text in read.texts)
    assert not re.search("[\x00\u202e]", html)
    assert all(line.isprintable() for line in terminal_table(hostile()).splitlines())


def test_white_space_of_tokens_is_kept_and_seen(tmp_path):
    results = made_results()
    results["gates"] = [
        {"layer": 1, "tokens": ["if", " x", ":\n", "    ", "\t", "y"], "gates": [0, 0.1, 0.2, 0.3, 0.4, 1]}
    ]
    html = written(results, tmp_path)
    tokens = re.search(r'<section id="gates">.*?<pre class="gate-text">(.*?)</pre>', html, re.DOTALL).group(1)
    shown = re.sub(r'<span class="tip".*?</span></span>', "", tokens)
    assert re.sub(r"<[^>]*>", "", shown) == "if x:↵\n····⇥\ty"
    tip = r'<span class="tip" role="tooltip"><b>(.*?)</b><span>gate</span><span>(.*?)</span>'
    assert re.findall(rf'<span class="(\w+)" tabindex="0">{tip}', tokens) == [
        ("g0", "if", "0.000"),
        ("g1", "·x", "0.100"),
        ("g3", ":↵", "0.200"),
        ("g4", "····", "0.300"),
        ("g6", "⇥", "0.400"),
        ("g15", "y", "1.000"),
    ]


def test_the_demos_text_is_coloured_by_what_memory_changed(tmp_path):
    results = made_results()
    results["changed"] = {"tokens": ["if", " x", ":", "\n"], "gains": [None, 0.5, -2.0, 0.01]}
    html = written(results, tmp_path)
    section = re.search(r'<section id="changed">(.*?)</section>', html, re.DOTALL).group(1)
    tip = r'<span class="tip" role="tooltip"><b>(.*?)</b>((?:<span>.*?</span>)*)</span>'
    shown = re.findall(rf'<span class="(\w*)" tabindex="0">{tip}', section)
    assert [(name, text) for name, text, _ in shown] == [("", "if"), ("up2", "·x"), ("down4", ":"), ("", "↵")]
    assert "+0.500 nats" in shown[1][2]
    assert "−2.000 nats" in shown[2][2]
    assert '<section id="changed">' not in written(sparse(), tmp_path)


def test_gates_have_a_scale_from_0_to_1():
    layers = training.gate_layers(
        [
            {"layer": 1, "tokens": ["a", "b"], "gates": [0.2, 0.4]},
            {"layer": 2, "tokens": ["a", "b"], "gates": [0.6, NAN]},
        ]
    )
    classes = [re.findall(r'class="(\w+)" tabindex', layer["text"]) for layer in layers]
    assert classes == [["g3", "g6"], ["g9", "none"]]
    assert layers[1]["mean"] == 0.6
    with pytest.raises(ValueError, match="gates of layer 7: 2 tokens and 1 gates"):
        training.gate_layers([{"layer": 7, "tokens": ["a", "b"], "gates": [0.2]}])


@pytest.mark.parametrize("make", SHAPES)
def test_terminal_table_fits_and_aligns(make):
    lines = terminal_table(make()).splitlines()
    assert all(len(line) <= 80 for line in lines)
    table = lines[: lines.index("")]
    assert len(table) == 2 + len(make()["runs"])
    ends = [match.end() for match in re.finditer(r"-+", table[1])]
    assert all(len(line) == ends[-1] for line in table)
    assert all(line[end : end + 2] == "  " for line in table for end in ends[:-1])


def test_terminal_numbers_come_from_the_results():
    """Every number changes with the result that it is made of, and no other number is there."""
    results = made_results()
    runs = results["runs"]
    for k, name in enumerate(runs, start=1):
        runs[name].update(perplexity=10.0 + k, loss=k + 0.25, bits_per_byte=k / 8)
        runs[name]["seconds"][-1] = 60.0 + k
    results["step_times"] = step_times(2.0, 1.9, 2.1)
    results["step_times"]["seconds"] = {"plain": {"median": 0.001}, "engram": {"median": 0.002}}
    results["equal_time"] = {"base_steps": 300, "other_steps": 150, "base": 11.0, "other": 13.2}
    results["equal_time"] |= {"ratio": 1.2, "low": 1.15, "high": 1.25}
    rows = {
        line[:14].strip(): re.split(r"\s{2,}", line[14:].strip()) for line in terminal_table(results).splitlines()
    }
    assert rows["without memory"] == ["11.00", "–", "1.250", "0.125", "61 s"]
    assert rows["with memory"] == ["12.00", "9.1 % higher", "2.250", "0.250", "62 s"]
    assert rows["rows at random"] == ["13.00", "18 % higher", "3.250", "0.375", "63 s"]
    assert rows["rows shuffled"] == ["14.00", "27 % higher", "4.250", "0.500", "64 s"]
    sentences = terminal_table(results).split("\n\n")[1].replace("\n", " ")
    assert re.findall(r"[\d.]*\d", sentences) == [
        *("9.1", "12.00", "11.00"),
        *("2.00", "95", "1.90", "2.10", "2", "1"),
        *("300", "150", "20", "15", "25", "13.20", "11.00"),
    ]


def test_results_that_lack_something_are_refused_by_name(tmp_path):
    results = made_results()
    del results["gates"], results["model"]
    with pytest.raises(ValueError, match="the results lack model, gates; sense_v2"):
        write_report(results, tmp_path / "report.html")
    results = made_results()
    results["runs"]["other"] = results["runs"].pop("plain")
    with pytest.raises(ValueError, match="allowed are plain, engram, random_rows, shuffled, and the first two must"):
        terminal_table(results)
    results = made_results()
    results["runs"]["engram"]["seconds"].pop()
    with pytest.raises(ValueError, match=r"'engram'.*'steps': 300, 'train_loss': 300, 'seconds': 299"):
        write_picture(results, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_the_results_alone_and_repeats_byte_for_byte(tmp_path):
    results = made_results()
    before = copy.deepcopy(results)
    assert written(results, tmp_path / "a") == written(results, tmp_path / "b")
    assert results == before


@pytest.mark.parametrize("make", SHAPES)
def test_picture(make, tmp_path):
    write_picture(make(), tmp_path / "new" / "picture.png")
    data = (tmp_path / "new" / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") == 1600
    assert int.from_bytes(data[20:24], "big") == 900
    with Image.open(tmp_path / "new" / "picture.png") as picture:
        for run in make()["runs"].values():
            label = wording.printable(run["label"])
            assert f"{label} {wording.perplexity(run['perplexity'])}" in picture.text["Description"]


def test_a_picture_ends_in_the_value_that_the_tables_have(tmp_path):
    results = made_results()
    results["runs"]["shuffled"]["evals"][-1]["perplexity"] += 0.1  # rows are dealt anew at each evaluation
    write_picture(results, tmp_path / "picture.png")
    label, perplexity = (results["runs"]["shuffled"][name] for name in ("label", "perplexity"))
    with Image.open(tmp_path / "picture.png") as picture:
        assert f"{label} {wording.perplexity(perplexity)}" in picture.text["Description"]
    assert f"{wording.perplexity(perplexity)} " in terminal_table(results)


def test_plots_end_in_each_runs_name_and_value(tmp_path):
    results = made_results()
    timed = {name: results["runs"][name] for name in ("plain", "engram")}
    for panel, runs in zip(plots.loss_panels(results)[:2], (results["runs"], timed), strict=True):
        texts = Page(str(panel["svg"])).text
        for measured in runs.values():
            assert f"{measured['label']}" in texts.replace("\n", " ")
            assert wording.decimals(measured["loss"]) in texts
    panels = plots.loss_panels(diverged())
    assert "not finite" in Page(str(panels[0]["svg"])).text


def test_smoothing_is_the_mean_of_the_last_values():
    values = np.random.default_rng(0).standard_normal(50)
    values[[7, 20, 21]] = [NAN, math.inf, NAN]
    smoothed = plots.smooth(values, 5)
    for i, value in enumerate(values):
        last = values[max(0, i - 4) : i + 1]
        expected = np.mean(last[np.isfinite(last)]) if np.isfinite(value) else NAN
        np.testing.assert_allclose(smoothed[i], expected, rtol=1e-12)


def test_labels_never_overlap():
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(1, 5))
        middles, heights = random.random(count).tolist(), (0.05 + 0.2 * random.random(count)).tolist()
        placed = sorted(zip(plots.spread(middles, heights), heights, strict=True))
        edges = [edge for middle, height in placed for edge in (middle - height / 2, middle + height / 2)]
        assert edges[0] >= -1e-5
        assert edges[-1] <= 1 + 1e-5
        assert all(a <= b + 1e-5 for a, b in itertools.pairwise(edges))


def test_colours_reach_the_contrast_that_text_needs():
    for colors in schemes().values():
        for ground in ("page", "panel"):
            for name in ("ink", "muted", "warning", "run-plain", "run-engram", "run-random_rows", "run-shuffled"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)


def test_plots_and_stylesheet_share_their_colours(tmp_path):
    light = schemes()["light"]
    assert {
        name: "#" + "".join(f"{round(255 * c):02x}" for c in light[name]) for name in plots.PALETTE
    } == plots.PALETTE
    for panel in plots.loss_panels(made_results()):
        assert "var(--run-engram)" in panel["svg"]
        assert not re.search("#[0-9a-f]{6}", panel["svg"])


@pytest.mark.parametrize("module", [wording, plots])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
