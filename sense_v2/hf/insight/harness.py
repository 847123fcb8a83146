"""A model with memory -> lm-evaluation-harness, through its `HFLM` interface: the numbers that others report.

    tasks (names, or YAML files) ──▶ requests ──HFLM──▶ model ──▶ metrics with standard errors

HFLM takes the model as an object, so its memory stays attached; it pads batches on the right where it scores and on
the left where it generates, and either way the memory sees what it sees of a text alone (test_harness.py holds
the scores against the model's own forward). What the harness leaves to its caller is decided here: a tokenizer
without a padding token pads with its end of text, since the token that the harness would add has no embedding.

Needs the extra: `pip install "sense-v2[eval]"`. A task of the harness's own is a name, and its data comes from the
hub or from what the machine has cached; one in a file needs no network if its data is local too.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sense_v2.core.errors import MissingPackageError, with_way_out
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.insight.comparison import WITH_MEMORY, WITHOUT_MEMORY
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.training.fresh_model import END_OF_TEXT

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

BATCH_SIZE = 8
BOOTSTRAP_ITERATIONS = 1_000
"""For the standard errors of metrics that aren't means; the harness's own default takes a hundred times as long."""


def harness_model(model: PreTrainedModel, tokenizer: Any, *, batch_size: int = BATCH_SIZE) -> HFLM:
    """The model as the harness takes it; `tokenizer` is of transformers or a `tokenizers.Tokenizer`, and isn't
    changed. Raises `MissingPackageError` without lm_eval, `ValueError` where no token ends a text."""
    lm_eval = _lm_eval()
    with _quiet():
        return lm_eval.HFLM(
            pretrained=model, tokenizer=_with_padding(tokenizer), backend="causal", batch_size=batch_size
        )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """The metrics of each task, [{"task", "metric", "filter", "value", "stderr", "samples", "higher_is_better"}].

    A task is a name (of the harness, or of a YAML file below `include_path`) or a YAML file. `limit` takes only the
    first samples of each. Raises `ValueError` for a task that isn't there, and what loading its data raises.
    """
    lm_eval = _lm_eval()
    names = [str(task) for task in tasks]
    with _quiet(), evaluating(model):
        manager = lm_eval.TaskManager(include_path=include_path, include_defaults=False)
        # Reading the harness's fourteen thousand files takes seconds, and only names of its own need it.
        if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
            manager = lm_eval.TaskManager(include_path=include_path)
        unknown = [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]
        if unknown:
            raise with_way_out(
                ValueError(f"{unknown[0]}: no task of lm_eval has that name, and no file"),
                "Name a task, a YAML file, or the folder it is in with --include-path",
            )
        found = lm_eval.simple_evaluate(
            model=harness_model(model, tokenizer, batch_size=batch_size),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    return _metrics(found)


def compare_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    without_memory: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run tasks with the memory, and with it taken off.

    Args:
        model: Loses its memory, if that is taken off.
        tokenizer: The model's.
        tasks: As `run_tasks` takes them.
        include_path: Where tasks of one's own are found by name.
        limit: Take only so many samples of each task.
        without_memory: True to take the memory off as well.

    Returns:
        The metrics of `run_tasks`, in place of "value" and "stderr" both of them under the names of the sides; and
        these names.

    Raises:
        MissingPackageError: lm_eval isn't installed.
        ValueError: There is no such task.
    """
    has_memory = attached_memory(model) is not None
    sides = [WITH_MEMORY] * has_memory + [WITHOUT_MEMORY] * (without_memory or not has_memory)
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for side in sides:
        if side == WITHOUT_MEMORY and has_memory:
            detach_engram(model)
        for one in run_tasks(model, tokenizer, tasks, include_path=include_path, limit=limit):
            key = one["task"], one["metric"], one["filter"]
            values = {"value": one.pop("value"), "stderr": one.pop("stderr")}
            found.setdefault(key, one)[side] = values
    return list(found.values()), sides


def _metrics(found: dict[str, Any]) -> list[dict[str, Any]]:
    metrics = []
    for task, values in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            name, comma, filter_name = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr,{filter_name}")
            metrics.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": filter_name,
                    "value": value,
                    "stderr": stderr if isinstance(stderr, float) else None,
                    "samples": samples,
                    "higher_is_better": found.get("higher_is_better", {}).get(task, {}).get(name),
                }
            )
    return metrics


def _with_padding(tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, Tokenizer):
        end = END_OF_TEXT if tokenizer.token_to_id(END_OF_TEXT) is not None else None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    else:
        tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.eos_token_id is None:
        raise with_way_out(
            ValueError("the tokenizer names no token that ends a text, which the harness begins and ends texts with"),
            "Set tokenizer.eos_token",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padded: PreTrainedTokenizerBase = tokenizer
    return padded


class _lm_eval:
    """What is used of lm_eval, which takes seconds to import and may not be there."""

    def __init__(self) -> None:
        try:
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingPackageError(
                f"tasks are run by lm-evaluation-harness, which can't be imported ({error})",
                'pip install "sense-v2[eval]" installs it',
            ) from error
        self.simple_evaluate, self.HFLM, self.TaskManager = simple_evaluate, HFLM, TaskManager


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's advice (a model passed as an object, padding that was set), and where no terminal shows
    them move, without its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(_WithoutBars(sys.stderr)):
            yield
    finally:
        logger.setLevel(level)


class _WithoutBars(io.TextIOBase):
    """Passes on what is written, but for lines that a bar draws over each other."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_bar = False

    def write(self, text: str) -> int:
        if not (text.startswith("\r") or (self._in_bar and not text.strip())):
            self._stream.write(text)
            self._in_bar = False
        else:
            self._in_bar = text.startswith("\r")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
