"""`sense-engram demo`: what it prints and writes; the experiments are library code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sense_v2.cli.output import progress_to
from sense_v2.cli.progress import TrainingProgress
from sense_v2.core.config import Config, TrainConfig
from sense_v2.hf.data.corpus import Corpus
from sense_v2.hf.experiments.from_scratch import Watcher, demo_config, run_experiment
from sense_v2.hf.experiments.pretrained import run_pretrained
from sense_v2.report import pretrained, wording
from sense_v2.report.training import terminal_table, write_picture, write_report


def run_demo(
    corpus: str | Path | None = None,
    output: str | Path = "runs/demo",
    *,
    quick: bool = False,
    text_column: str = "text",
    config: Config | None = None,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Run the experiment, `quick` without its controls, and write its report; returns the results."""
    output = Path(output)
    results = run_experiment(
        None if corpus is None else [corpus],
        output,
        config=demo_config(output) if config is None else config,
        controls=not quick,
        watcher=_PrintingWatcher(echo),
        text_column=text_column,
    )
    write_report(results, output / "report.html")
    write_picture(results, output / "perplexity.png")
    _tell(output, metrics(results), terminal_table(results), echo)
    return results


def run_pretrained_demo(
    model: str,
    corpus: str | Path | None = None,
    output: str | Path = "runs/demo-pretrained",
    *,
    quick: bool = False,
    text_column: str = "text",
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Compare memory with a LoRA on a pretrained model, `quick` without both together and without the control, and
    write the report; returns the results."""
    output = Path(output)
    results = run_pretrained(
        model,
        None if corpus is None else [corpus],
        output,
        controls=not quick,
        watcher=_PrintingWatcher(echo),
        text_column=text_column,
    )
    pretrained.write_report(results, output / "report.html")
    pretrained.write_picture(results, output / "learned-and-lost.png")
    _tell(output, pretrained_metrics(results), pretrained.terminal_table(results), echo)
    return results


def _tell(output: Path, numbers: dict[str, Any], table: str, echo: Callable[[str], Any]) -> None:
    (output / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    for line in ("", *table.splitlines(), ""):
        echo(line)
    echo(f"report: {output / 'report.html'}   numbers: {output / 'metrics.json'}   model: {output / 'model'}")


def pretrained_metrics(results: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that a script wants."""
    names = ("loss", "perplexity", "bits_per_byte", "damage", "steps", "trained")
    return {
        "runs": {way: {name: run[name] for name in names} for way, run in results["runs"].items()},
        "changes": results["changes"],
        "random_rows_keep": results["random_rows_keep"],
        "step_times": results["step_times"],
        "seconds": results["seconds"],
    }


def metrics(results: dict[str, Any]) -> dict[str, Any]:
    """The few numbers that a script wants."""
    runs = results["runs"]
    return {
        "perplexity": {name: run["perplexity"] for name, run in runs.items()},
        "bits_per_byte": {name: runs[name]["bits_per_byte"] for name in ("plain", "engram")},
        "step_times": results["step_times"],
        "equal_time": results["equal_time"],
        "gain_kept_by_controls": results["controls"],
        "compression": {name: results["compression"][name] for name in ("tokens", "ids")},
        "tokens": results["trained_tokens"],
        "reading": results["reading"],
        "seconds": results["seconds"],
    }


class _PrintingWatcher(Watcher):
    def __init__(self, echo: Callable[[str], Any]) -> None:
        self.echo, self.progress = echo, progress_to(echo)

    def compressing(self) -> None:
        self.echo("DeepSeek's tokenizer: which of its tokens read the same")

    def compressed(self, found: dict[str, Any]) -> None:
        saved = 1 - found["ids"] / found["tokens"]
        self.echo(
            f"  {found['tokenizer']}: {found['tokens']:,} tokens become {found['ids']:,} ids, "
            f"{wording.percent(saved)} fewer"
        )

    def corpus_opened(self, corpus: Corpus) -> None:
        self.echo(f"corpus: {corpus.line()}")

    @contextmanager
    def training(self, label: str, settings: TrainConfig) -> Iterator[Callable[[Any], Any]]:
        with TrainingProgress(label, settings, echo=self.echo) as progress:
            yield progress

    def timing(self) -> None:
        self.echo("step times: both models take turns")
