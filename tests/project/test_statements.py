"""What the docs say of figures, defaults and models agrees between pages, and with the code.

A figure that was measured stands in one place, and the others repeat it: the demo's table in README.md.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sense_v2.core.config import TrainConfig
from sense_v2.engram.ranks.collectives import start_ranks
from sense_v2.hf.training.callback import EngramCallback
from sense_v2.hf.training.run import default_config
from sense_v2.hf.training.trainer import EngramTrainer

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "sense_v2").rglob("*.py")))


def demo_table(page: str) -> str:
    (table,) = re.findall(r"^run +perplexity.*?(?=^```)", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return table


def demo() -> dict[str, float]:
    """Run -> perplexity, of README's table."""
    rows = re.findall(r"^(\w+ \w+) +([\d.]+) ", demo_table("README.md"), flags=re.MULTILINE)
    return {name: float(perplexity) for name, perplexity in rows}


def test_the_demos_figures_are_the_same_on_all_pages() -> None:
    assert demo_table("benchmarks.md") == demo_table("README.md")
    plain, engram = demo()["without memory"], demo()["with memory"]
    lower = f"{1 - engram / plain:.0%}".replace("%", " %")
    for page in ("README.md", "index.md", "limits.md", "tutorial.md"):
        assert lower in PAGES[page], f"{page} doesn't have the demo's {lower}"
        others = re.findall(r"(?<![\d.])(\d+ %) lower", PAGES[page])
        assert set(others) <= {lower}
    assert all(f"{perplexity:.4g}" in PAGES["tutorial.md"] for perplexity in (plain, engram))


def test_the_pictures_show_the_figures_of_the_pages() -> None:
    """A picture carries the values that were drawn, in its PNG's `Description`."""
    with Image.open(ROOT / "docs" / "demo.png") as picture:
        drawn = dict(re.findall(r"(\w+ \w+) ([\d.]+)", picture.text["Description"].partition(": ")[2]))
    assert {name: float(perplexity) for name, perplexity in drawn.items()} == demo()
    with Image.open(ROOT / "docs" / "retrofit.png") as picture:
        memory, lora = re.findall(r"(?:memory|LoRA) ([\d.]+)", picture.text["Description"])[:2]
    assert f"({memory} and {lora} nats" in PAGES["retrofit.md"]


def test_the_disk_that_setting_up_takes_is_the_same_on_all_pages() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    said = {
        tuple(re.findall(r"Python 3\.10 or newer.*?(\d+) GB of disk", text))
        for text in (contributing, PAGES["tutorial.md"])
    }
    assert len(said) == 1
    (installed,) = re.findall(r"takes a few minutes and ([\d.]+) GB of disk", PAGES["README.md"])
    assert float(installed) + 1 <= float(said.pop()[0])  # and the demo's tables


def written(name: str) -> str:
    """A model's name as the docs write it, in letters and digits alone: "Falcon-H1", "falcon_h1" -> "falconh1"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def test_the_models_that_are_named_as_tested_are_tested() -> None:
    tested = (ROOT / "tests" / "tiny.py").read_text(encoding="utf-8") + "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "hf").glob("*.py")
    )
    known = {written(name) for name in CONFIG_MAPPING_NAMES}
    for page in ("README.md", "huggingface.md"):
        (row,) = re.findall(r"^\| models(?: tested)? \| (.*) \|$", PAGES[page], flags=re.MULTILINE)
        row = re.sub(r"\([^)]*\)|`[^`]*`|with|hybrids:|state spaces:", "", row).replace(" and ", ", ")
        names = {written(name) for name in re.split(r"[,;]", row) if written(name)}
        assert len(names) >= 11
        assert names <= known
        assert all(re.search(rf'"{name}"', tested.replace("_", "")) for name in names)


def test_no_page_says_that_a_tested_model_is_not_supported() -> None:
    models = ["Llama", "Qwen3", "Mistral", "Gemma", "GPT-2", "LFM2", "Falcon-H1", "Mamba", "BERT"]
    denied = re.compile(rf"({'|'.join(models)})[^.\n]*(n't|not) (supported|tested)", re.IGNORECASE)
    assert {name: found[0] for name, text in PAGES.items() if (found := denied.search(text))} == {}


def default(function: object, name: str) -> object:
    return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("page", "said", "values"),
    [
        (
            "corpus.md",
            r"`--row-learning-rate` is ([\d.]+) by default. That is (\d+) times .*? fresh backbone \(([\d.e-]+)\)",
            lambda: (
                TrainConfig().row_learning_rate,
                round(TrainConfig().row_learning_rate / TrainConfig().learning_rate),
                TrainConfig().learning_rate,
            ),
        ),
        ("corpus.md", r"reads up to (\d+) MiB of text into memory", lambda: (resident_mib(),)),
        ("training.md", r"text larger than (\d+) MiB", lambda: (resident_mib(),)),
        ("training.md", r"every `commit_every` steps \((\d+)\)", lambda: (TrainConfig().commit_every,)),
        ("training.md", r"`row_rate` \|.*?: (\d+) by default", lambda: (default(EngramCallback, "row_rate"),)),
        (
            "training.md",
            r"`fusion_rate` \(([\d.]+)\).*`value_rate` \(([\d.]+)\)",
            lambda: (default(EngramTrainer, "fusion_rate"), default(EngramTrainer, "value_rate")),
        ),
        (
            "distributed.md",
            r"waits `timeout_seconds` \((\d+);.*every `beat_seconds` \((\d+)\)",
            lambda: (default(start_ranks, "timeout_seconds"), default(start_ranks, "beat_seconds")),
        ),
    ],
)
def test_a_default_that_is_said_is_the_codes(page, said, values) -> None:
    match = re.search(said, PAGES[page], flags=re.DOTALL)
    assert match is not None, f"docs/{page} doesn't say {said!r}"
    assert tuple(float(group) for group in match.groups()) == values()


def resident_mib() -> int:
    """How much text is read into memory, by the one line of the code that says so."""
    (mib,) = re.findall(r"^MAX_RESIDENT_BYTES = (\d+) \* 2\*\*20$", SOURCE, flags=re.MULTILINE)
    return int(mib)


def test_the_rates_with_a_model_are_those_that_are_said() -> None:
    said = re.search(
        r"With `--model` it is ([\d.]+), which is ([\d,]+) times that of a model that you bring .* \(([\d.e-]+)\)",
        PAGES["corpus.md"],
    )
    assert said is not None
    rates = default_config("some/model").train
    assert (float(said[1]), float(said[3])) == (rates.row_learning_rate, rates.learning_rate)
    assert float(said[2].replace(",", "")) == round(rates.row_learning_rate / rates.learning_rate)
