"""Many facts at once -> rows of their subjects, until questions in other words are answered as well

    facts = read_facts("facts.jsonl", wordings="born.txt", hold_out="asked.txt")
    taught = teach_facts(model, tokenizer, facts)
    taught.report["success"]["held_out"]["after"]
    taught.undo()

Only rows of the subjects' own n-grams change (wordings.py says why), in an overlay: backbone, fusion layers and table
are the same bits afterwards, and so is everything that the model says of texts without these n-grams. A row that
neutral texts look up as well, as those of common words, moves less: its steps are divided by one more than the texts'
uses of it.

The rate is found by trying a few on the first batches. Training ends when a sample of the held-out questions is
answered and the loss is low, or after `steps`. If anything stops it earlier (Ctrl-C, a loss that isn't finite), the
rows are what they were.

U rows, D row width, B batch, K places of answers, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sense_v2.core.errors import with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.delta.kept_facts import KeptFact, keep_facts, known_facts
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.optim import row_adam
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.engram.variants import VARIANTS
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import device_of, saved_tokenizer
from sense_v2.hf.data.token_texts import Words
from sense_v2.hf.facts.facts_file import Fact, checked, read_facts
from sense_v2.hf.facts.notes import kept_fact, notes_on
from sense_v2.hf.facts.outcome import (
    NO_LABEL,
    answer_logits,
    answered,
    damage,
    neutral_texts,
    sampled_texts,
    success,
    texts_with_rows,
)
from sense_v2.hf.facts.wordings import Question, questions_of, subject_rows
from sense_v2.hf.insight.damage import log_probabilities
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.overlays import add_overlay, overlay_of, remove_overlay, tables_of
from sense_v2.hf.serving.offload import OffloadedTables, has_ngram_tables, load_with_tables_on_disk
from sense_v2.hf.training.teaching import Taught, moved, refuse_unheard, rows_alone

RATES = (0.03, 0.1, 0.3)
TRIAL_STEPS = 5
WARMUP_STEPS = 5
POOLED_BATCHES = 4
"""Drawn together and sorted by length."""
EPOCHS = 6
FEWEST_STEPS = 60
ASKED_AT_ONCE = 64
"""Questions that decide whether to go on."""
KL_TEXTS, KL_TOKENS = 32, 64


@dataclass
class FactsTaught:
    """What one call of `teach_facts` has changed."""

    taught: Taught
    report: dict[str, Any]
    """What JSON can hold; `sense_v2.report.facts` says what."""
    kept: list[KeptFact]
    """The facts with the rows that each has, of those that moved."""

    def commit(self) -> None:
        """Write the overlay to its file, and in it which rows are of which fact. Raises as its `commit`."""
        keep_facts(self.taught.overlay, self.kept)

    def undo(self) -> None:
        """Puts the rows back as they were, bit for bit. Raises `ValueError` where they were changed since."""
        self.taught.undo()

    @property
    def not_learned(self) -> list[dict[str, Any]]:
        """Facts that aren't answered in all the wordings they were taught in."""
        return [fact for fact in self.report["success"]["by_fact"] if not fact["learned"]]


def teach_facts(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    neutral: Sequence[list[int]] | None = None,
    steps: int | None = None,
    batch_size: int = 16,
    lr: float | None = None,
    stop_below: float = 0.05,
    kl_weight: float = 0.0,
    max_rows: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    tell: Callable[[str], Any] = lambda line: None,
) -> FactsTaught:
    """Teach a model facts, all together, in the rows of their subjects' n-grams.

    A model without an overlay gets one in memory (`add_overlay(model, path)` before makes it a file). Nothing is
    committed: the result's `commit` does it.

    Args:
        model: With memory attached, or Qwen4-Exp with its tables on disk.
        tokenizer: The model's.
        facts: What `read_facts` reads, or made here.
        neutral: Texts as token ids, for the damage; without them the model writes some.
        steps: At most so many batches; by default six times through all questions.
        batch_size: Questions of a batch.
        lr: Adam's, in units of a row's values; by default the best of three on the first batches.
        stop_below: The mean loss, in nats a token, below which it may end earlier.
        kl_weight: Of KL(before ‖ now) on those neutral texts that look up the rows, added to the loss.
        max_rows: At most so many rows are learned.
        seed: Of the order of questions, and of the texts that the model writes.
        progress: Told how far it is.
        tell: Called with what a person should know before the training: facts that share rows, rows left out.

    Raises:
        ValueError: A fact can't be taught, facts contradict each other, the tokenizer is another one than the
            memory's, or the memory can't be heard (W_v is zero).
        FloatingPointError: The loss isn't finite; the rows are what they were.
    """
    started = time.perf_counter()
    facts = checked(facts)
    memory = tables_of(model)
    refuse_unheard(memory)
    if attached_memory(model) is not None:  # Qwen4-Exp's tables don't say which tokenizer they are for
        refuse_other_tokenizer(memory_of(model), tokenizer)
    questions = questions_of(facts, tokenizer)
    overlay = overlay_of(model) or add_overlay(model)  # by whose ids rows go: it may join tables
    rows = subject_rows(memory, questions, max_rows=max_rows)
    for line in notes_on(facts, rows, known_facts(overlay)):
        tell(line)
    sampled = neutral is None
    texts = sampled_texts(model, seed=seed) if neutral is None else [list(ids) for ids in neutral]
    with progress("asking before", len(questions), unit="questions") as advance:
        before = answered(model, questions, advance)
    lessons = [one for one in questions if not one.held_out]
    num_steps = steps or max(FEWEST_STEPS, math.ceil(EPOCHS * len(lessons) / batch_size))
    spared_U = _spared(memory, texts, rows.row_ids_U)
    descent = Descent(model, overlay, rows.row_ids_U, spared_U)
    if kl_weight:
        descent.keep_neutral([texts[at] for at in texts_with_rows(model, texts, rows.row_ids_U)], kl_weight)
    held_out = _sample([one for one in questions if one.held_out] or lessons, seed)
    with descent:
        batches = shuffled(lessons, batch_size, seed)
        rate = descent.find_rate([next(batches) for _ in range(TRIAL_STEPS)]) if lr is None else lr
        stopped = "all steps"
        with progress("teaching", num_steps, unit="steps") as advance:
            for step in range(1, num_steps + 1):
                descent.step(next(batches), rate * schedule(step, num_steps))
                advance(1)
                is_low = step % max(10, num_steps // 10) == 0 and np.mean(descent.losses[-10:]) < stop_below
                if is_low and all(map(all, answered(model, held_out))):
                    stopped = "answered"
                    break
    try:
        if not torch.isfinite(descent.rows_UD).all():
            raise with_way_out(FloatingPointError("a row isn't finite after the last step"), "lower lr")
        with progress("asking after", len(questions), unit="questions") as advance:
            after = answered(model, questions, advance)
        words = Words(tokenizer)
        harm = damage(model, texts, words.text, rows, facts, descent.as_before)
        taught = moved(overlay, rows.row_ids_U, descent.before_UD, descent.were_changed_U, descent.losses)
    except BaseException:
        descent.put(True)
        raise
    report = {
        "facts": len(facts),
        "lessons": len(lessons),
        "questions": len(questions),
        "layers": [layer_id for layer_id, _ in memory.head_orders],
        "steps": len(descent.losses),
        "stopped": stopped,
        "lr": rate,
        "kl_weight": kl_weight,
        "loss": [descent.losses[0], float(np.mean(descent.losses[-10:]))],
        "losses": descent.losses,
        "rows": len(taught.row_ids_U),
        "rows_left_out": rows.left_out,
        "row_bytes": len(taught.row_ids_U) * overlay.embedding_dim * overlay.dtype.itemsize,
        "sharing": [
            {"facts": [facts[place].name() for place in group], "rows": count} for group, count in rows.shared()
        ],
        "success": success(facts, questions, before, after),
        "damage": {**harm, "sampled": sampled},
        "seconds": time.perf_counter() - started,
    }
    own: dict[int, list[int]] = {}
    for row_id in taught.row_ids_U.tolist():
        for place in rows.facts[row_id]:
            own.setdefault(place, []).append(row_id)
    kept = [kept_fact(fact, own.get(place, ())) for place, fact in enumerate(facts)]
    return FactsTaught(taught, report, kept)


def teach_facts_delta(
    folder: str | Path,
    facts_file: str | Path,
    output: Path,
    *,
    wordings: str | Path | None = None,
    hold_out: str | Path | None = None,
    neutral: Path | None = None,
    on: Sequence[str | Path] = (),
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Teach a saved model the facts of a file; what changes is kept in a delta, and nothing in its folder changes.

    The delta is written once, at the end: whatever ends the call earlier leaves it as it was.

    Args:
        folder: The model's.
        facts_file: As `read_facts` reads it.
        output: The delta, which may have facts already.
        wordings: A file of templates for facts without their own.
        hold_out: A file of templates that are asked and never taught.
        neutral: A file of texts that nothing is taught about, one a line.
        on: Deltas that this one lies on top of, which are only read.
        device: Where the model runs, as `device_of` takes it.
        **options: Those of `teach_facts`.

    Returns:
        The report of `teach_facts`, with "model", "delta", "rows_in_all", "bytes", "created" and "not_learned".

    Raises:
        ValueError: As `read_facts`, `from_pretrained` and `teach_facts`.
    """
    facts = read_facts(facts_file, wordings=wordings, hold_out=hold_out)  # before a model is loaded
    place = device_of(device)
    if has_ngram_tables(folder):
        model = load_with_tables_on_disk(folder).eval()
        add_overlay(model, [*on, output])
    else:
        model = from_pretrained(folder, overlay=[*on, output], mode="r+")
    try:
        model.to(place)
        tokenizer = saved_tokenizer(Path(folder))
        texts = None if neutral is None else neutral_texts(neutral, tokenizer)
        done = teach_facts(model, tokenizer, facts, neutral=texts, **options)
        overlay = done.taught.overlay
        done.commit()
        return {
            "model": str(folder),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **done.report,
            "not_learned": done.not_learned,
            "delta": str(output),
            "rows_in_all": len(overlay.own_ids),
            "bytes": output.stat().st_size,
        }
    finally:
        remove_overlay(model)  # without what isn't committed, which detaching would commit
        if attached_memory(model) is not None:
            detach_engram(model)


def refuse_other_tokenizer(memory: EngramMemory, tokenizer: Any) -> None:
    """Raises `ValueError` where the memory's rows are of another tokenizer than this one."""
    theirs = EngramTokenizerBuilder(tokenizer, normalization=memory.config.normalization).description().sha256
    if VARIANTS[memory.config.variant].compresses and memory.tokenizer.sha256 != theirs:
        raise with_way_out(
            ValueError(
                f"this tokenizer isn't the memory's: its map has SHA-256 {theirs[:12]}…, and the memory's "
                f"({memory.tokenizer.tokenizer_name}) {memory.tokenizer.sha256[:12]}…"
            ),
            "Pass the model's own tokenizer",
        )


def shuffled(lessons: Sequence[Question], batch_size: int, seed: int) -> Iterator[list[Question]]:
    """Batches without end, each lesson once before any comes again.

    Those of a batch are of like length, so that little of it is padding.
    """
    draw = np.random.default_rng(seed)
    lengths = np.array([len(one.prompt_ids) + len(one.answer_ids) for one in lessons])
    while True:
        order = draw.permutation(len(lessons))
        for pool in np.array_split(order, math.ceil(len(order) / (POOLED_BATCHES * batch_size))):
            by_length = pool[np.argsort(lengths[pool], kind="stable")]
            batches = np.array_split(by_length, math.ceil(len(pool) / batch_size))
            for at in draw.permutation(len(batches)):
                yield [lessons[place] for place in batches[at]]


def schedule(step: int, num_steps: int) -> float:
    """The share of the rate at a step, counted from 1: up at first, then down to a tenth."""
    return min(1.0, step / WARMUP_STEPS) * (1 - 0.9 * (step - 1) / num_steps)


class Descent:
    """Adam on chosen rows of an overlay, and on weights that are trained with them (`fusion_lr`), batch by batch.

    A context: rows are what they were at its end if an error ends it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        overlay: OverlayStorage,
        row_ids_U: torch.Tensor,
        spared_U: torch.Tensor | None = None,
        *,
        weights: Sequence[torch.nn.Parameter] = (),
        fusion_lr: float = 1e-3,
    ) -> None:
        self.model, self.overlay, self.row_ids_U = model, overlay, row_ids_U
        self.losses: list[float] = []
        self.before_UD = overlay(row_ids_U).detach()
        self.were_changed_U = torch.isin(row_ids_U, overlay.own_ids)
        # Kept in float32 between the steps, so that a step too small for the table's type still counts.
        self.rows_UD = self.before_UD.to(torch.float32, copy=True)
        self._shares_U1 = torch.ones(len(row_ids_U), 1) if spared_U is None else spared_U[:, None]
        self._weights = list(weights)
        self._optimizer = torch.optim.AdamW(self._weights, lr=fusion_lr, weight_decay=0.0) if weights else None
        self._fusion_lr = fusion_lr
        self._alone = rows_alone(model, overlay, self._weights)
        self._neutral: list[tuple[list[int], torch.Tensor]] = []
        self._kl_weight = 0.0
        self._begin()

    def _begin(self) -> None:
        self._moments = torch.zeros_like(self.rows_UD), torch.zeros_like(self.rows_UD)
        self._steps = 0

    def keep_neutral(self, texts: Sequence[list[int]], kl_weight: float) -> None:
        """Add KL(now's model ‖ the later one) on these texts to the loss, in turns."""
        self._kl_weight = kl_weight
        with evaluating(self.model):
            for ids in texts[:KL_TEXTS]:
                self._neutral.append((ids[:KL_TOKENS], self._expected(ids[:KL_TOKENS]).half()))

    def __enter__(self) -> Descent:
        self._alone.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.put(True)
        self._alone.__exit__(None, None, None)

    def put(self, as_before: bool) -> None:
        """Put the rows as they were, or as they were learned."""
        if as_before:
            self.overlay.write(self.row_ids_U, self.before_UD)
            self.overlay.forget(self.row_ids_U[~self.were_changed_U])
        else:
            self.overlay.write(self.row_ids_U, self.rows_UD)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within it, the rows are as they were before the lesson."""
        self.put(True)
        try:
            yield
        finally:
            self.put(False)

    def find_rate(self, batches: Sequence[list[Question]]) -> float:
        """Try rates on these batches, each from the same start, and return the one that ends best."""
        best, found = math.inf, RATES[0]
        for rate in RATES:
            try:
                for step, batch in enumerate(batches, start=1):
                    self.step(batch, rate * min(1.0, step / WARMUP_STEPS))
                with torch.no_grad():
                    reached = float(np.mean([float(self._loss(batch)) for batch in batches[:2]]))
            except FloatingPointError:
                reached = math.inf
            finally:
                self.rows_UD.copy_(self.before_UD)
                self.put(True)
                self._begin()
                self.losses.clear()
                self.overlay.clear_gradients()
            if reached < best:
                best, found = reached, rate
        return found

    def step(self, batch: Sequence[Question], rate: float, share: float = 1.0) -> None:
        """Learn from one batch, the weights at this share of their rate.

        Raises `FloatingPointError` where its loss isn't finite.
        """
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise with_way_out(FloatingPointError(f"the loss of step {self._steps + 1} is {loss.item()}"), "lower lr")
        self.losses.append(loss.item())
        if self._neutral:
            loss = loss + self._kl_weight * self._kl()
        loss.backward()
        self._steps += 1
        self._move(rate)
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._fusion_lr * share
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _move(self, rate: float) -> None:
        """The rows that the batch met, of those that are learned."""
        gradients = self.overlay.gradients()
        self.overlay.clear_gradients()
        if gradients is None or not len(self.row_ids_U):
            return
        ids, grads = gradients
        places = torch.searchsorted(self.row_ids_U, ids).clamp_max(len(self.row_ids_U) - 1)
        is_ours = self.row_ids_U[places] == ids
        places, grads = places[is_ours], grads[is_ours]
        rows, moments = self.rows_UD[places], [one[places] for one in self._moments]
        row_adam(rows, grads, *moments, step=self._steps, lr=rate, betas=(0.9, 0.999), eps=1e-8)
        self.rows_UD[places] = torch.lerp(self.rows_UD[places], rows, self._shares_U1[places])
        for kept, one in zip(self._moments, moments, strict=True):
            kept[places] = one
        self.overlay.write(self.row_ids_U[places], self.rows_UD[places])

    def _loss(self, batch: Sequence[Question]) -> torch.Tensor:
        logits_BKV, labels_BK = answer_logits(self.model, batch)
        return F.cross_entropy(logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=NO_LABEL)

    def _kl(self) -> torch.Tensor:
        ids, before_TV = self._neutral[self._steps % len(self._neutral)]
        return F.kl_div(self._expected(ids), before_TV.float(), log_target=True, reduction="sum") / len(ids)

    def _expected(self, ids: list[int]) -> torch.Tensor:
        return log_probabilities(self.model, torch.tensor([ids], device=self.model.device))[0]


def _spared(
    memory: EngramMemory | OffloadedTables, texts: Sequence[list[int]], row_ids_U: torch.Tensor
) -> torch.Tensor:
    """The share of each step that a row takes: 1 for one that no text uses, 1/2 for one that they use once, …"""
    uses_U = torch.zeros(len(row_ids_U))
    for ids in texts:
        met = memory.hash_tokens(torch.tensor([ids], device=memory.device))[1].flatten().cpu()
        places = torch.searchsorted(row_ids_U, met).clamp_max(max(0, len(row_ids_U) - 1))
        is_ours = row_ids_U[places] == met
        uses_U += torch.bincount(places[is_ours], minlength=len(row_ids_U))
    return 1 / (1 + uses_U)


def _sample(questions: Sequence[Question], seed: int) -> list[Question]:
    chosen = np.random.default_rng(seed).permutation(len(questions))[:ASKED_AT_ONCE]
    return [questions[at] for at in chosen]
