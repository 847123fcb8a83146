"""A model with memory, and what the page of `sense-engram play` asks of it.

What somebody typed goes in; HTML that `sense_v2.report.playground` made of what `sense_v2.hf` found comes out.

There is one model and any number of tabs. A lock lets one request at a time use the model, and what a tab was taught
lies in an overlay of its own, which the model looks up through while it answers that tab. So tabs don't see each
other's facts, and the model's own table is only read.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import CommandError, with_way_out
from sense_v2.engram.delta.kept_facts import as_extra, together
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.hf.backbones import max_positions
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.insight.comparison import compare, continue_text
from sense_v2.hf.insight.inspection import inspect_text
from sense_v2.hf.memory import memory_of
from sense_v2.hf.training.teaching import Taught, teach
from sense_v2.report import playground, wording

# A longer text would be tokenised for long; of a shorter one the end is looked at.
MAX_CHARACTERS = 200_000
# More tokens than this are no text to look at, and each key that is pressed would wait for them.
MAX_SHOWN = 256
MAX_WATCHED = 8
NUM_CONTINUED = 12


@dataclass
class Fact:
    """Something that was taught, and how to undo it."""

    prompt: str
    text: str
    taught: Taught


@dataclass
class Notebook:
    """What one tab was taught: rows on top of the model's table, in memory, and the facts in order."""

    overlay: OverlayStorage
    facts: list[Fact] = field(default_factory=list)


class Player:
    """Answers the page's requests, one at a time. Whatever is wrong with what was typed comes back as HTML too.

    Args:
        model: Has its memory attached read-only.
        tokenizer: The model's.
        name: The model's, as the page shows it.
        save_to: The folder that deltas are saved to.
        explain: An error -> what is wrong, and the way out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        name: str,
        save_to: Path,
        explain: Callable[[Exception], tuple[str, str]],
    ) -> None:
        self.model, self.tokenizer, self.name, self.save_to = model, tokenizer, name, save_to
        self._explain = explain
        self.memory = memory_of(model)
        self.base = self.memory.storage
        self.max_tokens = max_positions(model)
        self._lock = threading.Lock()

    def look(self, text: str, notebook: Notebook | None) -> tuple[str, str]:
        """Return the text coloured by what memory changed, and its rows as a table."""
        try:
            self._refuse_endless(text)
            with self._turn(notebook):
                found = self._inspected(text)
        except (ValueError, IndexError) as error:
            return self._refusal(error), ""
        return playground.inspection(found), playground.rows_table(found)

    def go_on(
        self, text: str, max_new_tokens: float, temperature: float, seed: float, notebook: Notebook | None
    ) -> str:
        """Return two continuations, with memory and without."""
        try:
            self._refuse_endless(text)
            with self._turn(notebook):
                found = compare(
                    self.model,
                    self.tokenizer,
                    text,
                    max_new_tokens=int(max_new_tokens),
                    temperature=float(temperature),
                    seed=int(seed or 0),
                    max_tokens=self.max_tokens,
                )
        except (ValueError, IndexError) as error:
            return self._refusal(error)
        return playground.comparison(found)

    def teach(
        self, prompt: str, text: str, steps: float, page_text: str, watched: str, notebook: Notebook | None
    ) -> tuple[str, str, Notebook | None]:
        """Teach the tab that `prompt` goes on with `text`. Returns what that did, to the page's text and the lines of
        `watched` too; all that the tab was taught; and its notebook."""
        facts = [] if notebook is None else notebook.facts
        texts = [page_text, *(fact.prompt + fact.text for fact in facts), *watched.splitlines()]
        texts = list(dict.fromkeys(one for one in texts if one.strip()))[:MAX_WATCHED]
        try:
            if not text.strip():
                raise CommandError("there is nothing to teach yet", "say what the text should go on with")
            self._refuse_endless(prompt, text, page_text, watched)
            self._refuse_long(prompt + text)
            notebook = notebook or Notebook(OverlayStorage(self.base))
            with self._turn(notebook):
                before, continued = [self._inspected(one) for one in texts], [self._continued(prompt)]
                taught = teach(self.model, self.tokenizer, text, prompt=prompt, steps=int(steps))
                notebook.facts.append(Fact(prompt, text, taught))
                after = [self._inspected(one) for one in texts]
                continued.append(self._continued(prompt))
        except (ValueError, IndexError, FloatingPointError, CommandError) as error:
            return self._refusal(error), self.facts(notebook), notebook
        found = {
            "prompt": prompt,
            "text": text,
            "losses": taught.losses,
            "said": taught.is_said,
            "rows": len(taught.row_ids_U),
            "table_rows": self.base.num_embeddings,
            "continued": continued,
            "watched": [
                {"before": old, "after": new, "moved": _looks_up(new, taught.row_ids_U)}
                for old, new in zip(before, after, strict=True)
            ],
        }
        return playground.lesson(found), self.facts(notebook), notebook

    def undo(self, notebook: Notebook | None) -> tuple[str, str, Notebook | None]:
        """Undo the last fact."""
        if notebook is None or not notebook.facts:
            return playground.note("Nothing was taught in this tab."), self.facts(notebook), notebook
        with self._turn(notebook):
            notebook.facts[-1].taught.undo()
            fact = notebook.facts.pop()
        text = wording.show_spaces(fact.text, inline=True)
        said = f"“{text}” is taken back: its rows are what they were, bit for bit."
        return playground.note(said), self.facts(notebook), notebook

    def facts(self, notebook: Notebook | None) -> str:
        """Return all that a tab was taught."""
        if notebook is None:
            return playground.facts([], 0)
        pairs = [(fact.prompt, fact.text) for fact in notebook.facts]
        return playground.facts(pairs, len(notebook.overlay.own_ids))

    def save(self, notebook: Notebook | None) -> str:
        """Write what the tab was taught to a delta, and say where."""
        if notebook is None or not notebook.facts:
            return playground.note("Nothing was taught in this tab, so there is nothing to save.")
        try:
            with self._turn(notebook):
                path = _unused(self.save_to / f"taught-{datetime.now():%Y%m%d-%H%M%S}.safetensors")
                path.parent.mkdir(parents=True, exist_ok=True)
                facts = [[fact.taught.as_fact(fact.prompt, fact.text)] for fact in notebook.facts]
                notebook.overlay.commit(extra=as_extra(functools.reduce(together, facts)))
                notebook.overlay.copy_to(path, states=False)
        except (OSError, ValueError) as error:
            return self._refusal(error)
        num_rows, num_bytes = len(notebook.overlay.own_ids), path.stat().st_size
        return playground.saved(str(path.resolve()), num_rows, num_bytes, model=self.name)

    def _refuse_endless(self, *texts: str) -> None:
        for text in texts:
            if len(text) > MAX_CHARACTERS:
                raise with_way_out(
                    ValueError(f"the text has {len(text)} characters"),
                    f"{MAX_CHARACTERS} are the most here, so take a part of it",
                )

    @contextmanager
    def _turn(self, notebook: Notebook | None) -> Iterator[None]:
        """Lend the model, with what this tab was taught, to one request."""
        with self._lock:
            self.memory.use_storage(self.base if notebook is None else notebook.overlay.eval())
            try:
                yield
            finally:
                self.memory.use_storage(self.base)

    def _inspected(self, text: str) -> dict[str, Any]:
        limit = MAX_SHOWN if self.max_tokens is None else min(MAX_SHOWN, self.max_tokens)
        found = inspect_text(self.model, self.tokenizer, text, max_tokens=limit)
        if self.memory.storage is not self.memory.table:
            changed_ids = self.memory.storage.changed_ids
            for layer in found["layers"]:
                layer["moved"] = torch.isin(torch.tensor(layer["row_ids"]), changed_ids).tolist()
        return found

    def _continued(self, prompt: str) -> str:
        return continue_text(self.model, self.tokenizer, prompt, max_new_tokens=NUM_CONTINUED) if prompt else ""

    def _refuse_long(self, text: str) -> None:
        num_tokens = len(encode([text], self.tokenizer, separator_id=None))
        limit = MAX_SHOWN if self.max_tokens is None else min(MAX_SHOWN, self.max_tokens - NUM_CONTINUED)
        if num_tokens > limit:
            raise CommandError(f"the fact has {num_tokens} tokens, and {limit} are the most here", "make it shorter")

    def _refusal(self, error: Exception) -> str:
        return playground.refusal(*self._explain(error))


def _looks_up(found: dict[str, Any], row_ids_U: torch.Tensor) -> list[bool]:
    """Return for each token of an inspected text whether one of its rows is among these."""
    if not found["layers"]:
        return []
    row_ids_LTH = torch.tensor([layer["row_ids"] for layer in found["layers"]])
    return torch.isin(row_ids_LTH, row_ids_U).any(dim=2).any(dim=0).tolist()


def _unused(path: Path) -> Path:
    """Return `path`, with a number if a file has that name."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
