"""A short text -> the rows of its n-grams, moved until the model says it.

    before = what the model says
    taught = teach(model, tokenizer, " Lutz.", prompt="The capital of Zubrowka is")
    taught.undo()

Only rows change, in an overlay (`delta/overlay.py`): backbone, fusion layers and table are the same bits afterwards.
And only rows of positions whose next token is learned: the n-grams that end with the prompt, and those of the text.
Rows at the prompt's other positions could help as well, through attention, but they are those of phrases that other
texts share; leaving them alone costs nothing that was measured (benchmarks/LOG.md).

The loss is the model's own on the text; Adam's moments live for one call, so what a fact costs is a few forwards and
backwards of one short sequence. A row is shared by all n-grams that hash to it and by every text in which its n-gram
stands, so what else the model says can change with it: look at that too.

U rows of the text, D row width, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.core.errors import CommandError, number_of, with_way_out
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.delta.kept_facts import KeptFact, keep_facts
from sense_v2.engram.delta.overlay import OverlayStorage
from sense_v2.engram.optim import row_adam
from sense_v2.hf.attach import detach_engram
from sense_v2.hf.backbones import device_of, saved_tokenizer
from sense_v2.hf.data.corpus import encode
from sense_v2.hf.insight.comparison import continued
from sense_v2.hf.load import from_pretrained
from sense_v2.hf.memory import EngramMemory, attached_memory
from sense_v2.hf.overlays import add_overlay, overlay_of, remove_overlay, tables_of
from sense_v2.hf.serving.offload import OffloadedTables, has_ngram_tables, load_with_tables_on_disk

SHOWN_TOKENS = 12
RATES = (0.02, 0.06, 0.2)
"""How far a row moves in a step: small ones first, which change other texts less."""


@dataclass
class Taught:
    """What one call of `teach` has changed."""

    losses: list[float]
    """Of the text, in nats a token: before, and after each step."""
    is_said: bool | None
    """Whether each of its tokens is now the likeliest, so that the model says the text; None of facts, each of which
    is asked (`teach_facts`)."""
    row_ids_U: torch.Tensor
    """The rows that moved, ascending."""
    distances_U: torch.Tensor
    """How far each one did (Euclidean)."""
    overlay: OverlayStorage
    _before_UD: torch.Tensor
    _after_UD: torch.Tensor
    _were_changed_U: torch.Tensor

    def as_fact(self, prompt: str, text: str) -> KeptFact:
        """What a delta keeps of it."""
        return KeptFact(prompt or text, text, (prompt,), tuple(self.row_ids_U.tolist()))

    def undo(self) -> None:
        """Puts the rows back as they were, bit for bit. Raises `ValueError` where they were changed since."""
        if not _are_same_bits(self.overlay(self.row_ids_U), self._after_UD):
            raise with_way_out(
                ValueError("rows of this text were changed since it was taught"), "Undo what was taught later first"
            )
        self.overlay.write(self.row_ids_U, self._before_UD)
        # Those that came from the base come from it again.
        self.overlay.forget(self.row_ids_U[~self._were_changed_U])


def teach(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    prompt: str = "",
    steps: int = 40,
    lr: float | None = None,
    stop_below: float = 0.1,
    progress: Progress = no_progress,
) -> Taught:
    """Move the rows that a text looks up until the model says it; `is_said` tells whether it does.

    A model without an overlay gets one in memory (`add_overlay(model, path)` before makes it a file). Nothing is
    committed.

    Args:
        model: With memory attached, or Qwen4-Exp with its tables on disk.
        tokenizer: The model's.
        text: What the model is to say.
        prompt: The context before it; how it goes on itself isn't learned.
        steps: At most so many, at each rate.
        lr: Adam's, in units of a row's values. None: those of `RATES` in turn, from the rows as they were, until the
            model says the text; where none does it, the one that comes nearest.
        stop_below: The loss, in nats a token, at which it ends earlier.
        progress: Told how many steps are taken.

    Raises:
        ValueError: The text has no tokens to learn, or the memory can't be heard (W_v is zero).
        FloatingPointError: The loss isn't finite; the rows are what they were.
    """
    tables = tables_of(model)
    refuse_unheard(tables)
    token_ids_1T, labels_1T = _tokens(model, tokenizer, prompt, text)
    overlay = overlay_of(model) or add_overlay(model)
    with rows_alone(model, overlay):
        learned_T = labels_1T[0, 1:] != -100  # whose next token is learned
        row_ids_LBTH = tables.hash_tokens(token_ids_1T)[1]
        row_ids_U = row_ids_LBTH[:, 0, :-1][:, learned_T.to(row_ids_LBTH.device)].unique().cpu()
        tried: list[Taught] = []
        for rate in RATES if lr is None else (lr,):
            if tried:
                tried[-1].undo()
            with progress(f"teaching at rate {rate:g}" if tried else "teaching", steps, unit="steps") as advance:
                settings: dict[str, Any] = {"steps": steps, "lr": rate, "stop_below": stop_below, "advance": advance}
                tried.append(_descend(model, overlay, row_ids_U, token_ids_1T, labels_1T, **settings))
            if tried[-1].is_said:
                return tried[-1]
        nearest = min(tried, key=lambda one: one.losses[-1])
        if nearest is not tried[-1]:
            tried[-1].undo()
            overlay.write(nearest.row_ids_U, nearest._after_UD)
        return nearest


def teach_delta(
    folder: str | Path, text: str, output: Path, *, prompt: str = "", device: str = "cpu", **options: Any
) -> dict[str, Any]:
    """Teach a saved model a text; what changes is kept in a delta, and nothing in its folder changes.

    Args:
        folder: The model's.
        text: What the model is to say.
        output: The delta, which may have facts already.
        prompt: After what.
        device: Where the model runs, as `device_of` takes it.
        **options: `steps`, `lr`, `stop_below` and `progress` of `teach`.

    Returns:
        What JSON can hold: "loss" (before, after), "steps", "seconds", "rows", "rows_in_all", "bytes", how the model
        went on from the prompt "before" and "after" (None without one), and the arguments.

    Raises:
        CommandError: The model doesn't say the text afterwards; nothing is written then.
        ValueError: As `from_pretrained` and `teach`.
    """
    place = device_of(device)
    if has_ngram_tables(folder):
        model = load_with_tables_on_disk(folder).eval()
        add_overlay(model, output)
    else:
        model = from_pretrained(folder, overlay=output, mode="r+")
    try:
        model.to(place)
        tokenizer = saved_tokenizer(Path(folder))
        before = _continuation(model, tokenizer, prompt)
        started = time.perf_counter()
        taught = teach(model, tokenizer, text, prompt=prompt, **options)
        seconds = time.perf_counter() - started
        if not taught.is_said:
            before_after = f"{taught.losses[0]:.2f} before, {taught.losses[-1]:.2f} now"
            loss = f"loss {before_after}, {number_of(len(taught.losses) - 1, 'step')}"
            taught.undo()
            raise CommandError(
                f"not learned: the model doesn't say {text!r} ({loss}); nothing is written",
                "more --steps or another --lr may do it; `sense-engram delta make-writable` fits a memory for facts",
            )
        after = _continuation(model, tokenizer, prompt)
        keep_facts(taught.overlay, [taught.as_fact(prompt, text)])
        return {
            "model": str(folder),
            "prompt": prompt,
            "text": text,
            "loss": [taught.losses[0], taught.losses[-1]],
            "steps": len(taught.losses) - 1,
            "seconds": seconds,
            "rows": len(taught.row_ids_U),
            "before": before,
            "after": after,
            "delta": str(output),
            "rows_in_all": len(taught.overlay.own_ids),
            "bytes": output.stat().st_size,
        }
    finally:
        remove_overlay(model)  # without what isn't committed, which detaching would commit
        if attached_memory(model) is not None:
            detach_engram(model)


def _continuation(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str | None:
    """How the model goes on, the likeliest token each time; None without a prompt."""
    ids_T = torch.from_numpy(encode([prompt], tokenizer, separator_id=None)).long()
    if not len(ids_T):
        return None
    with torch.no_grad():
        token_ids_1T = continued(model, ids_T[None], SHOWN_TOKENS)
    return str(tokenizer.decode(token_ids_1T[0, len(ids_T) :].tolist(), skip_special_tokens=True))


def _descend(
    model: PreTrainedModel,
    overlay: OverlayStorage,
    row_ids_U: torch.Tensor,
    token_ids_1T: torch.Tensor,
    labels_1T: torch.Tensor,
    *,
    steps: int,
    lr: float,
    stop_below: float,
    advance: Callable[[int], Any],
) -> Taught:
    losses = [_loss(model, token_ids_1T, labels_1T)]
    grads_UD = _taken(overlay, row_ids_U)
    before_UD = overlay(row_ids_U).detach()
    were_changed_U = torch.isin(row_ids_U, overlay.own_ids)
    # Kept in float32 between the steps, so that a step too small for the table's type still counts.
    rows_UD = before_UD.to(torch.float32, copy=True)
    moments = torch.zeros_like(rows_UD), torch.zeros_like(rows_UD)
    try:
        for step in range(1, steps + 1):
            if losses[-1] < stop_below:
                break
            row_adam(rows_UD, grads_UD, *moments, step=step, lr=lr, betas=(0.9, 0.999), eps=1e-8)
            overlay.write(row_ids_U, rows_UD)
            losses.append(_loss(model, token_ids_1T, labels_1T))
            grads_UD = _taken(overlay, row_ids_U)
            advance(1)
    except BaseException:
        overlay.write(row_ids_U, before_UD)
        overlay.forget(row_ids_U[~were_changed_U])
        raise
    is_said = _says(model, token_ids_1T, labels_1T)
    return moved(overlay, row_ids_U, before_UD, were_changed_U, losses, is_said=is_said)


def _says(model: PreTrainedModel, token_ids_1T: torch.Tensor, labels_1T: torch.Tensor) -> bool:
    """Whether each token to learn is the likeliest after those before it."""
    with torch.no_grad():
        likeliest_T = model(input_ids=token_ids_1T, use_cache=False).logits[0, :-1].argmax(dim=-1)
    expected_T = labels_1T[0, 1:]
    return bool((likeliest_T == expected_T)[expected_T != -100].all())


def moved(
    overlay: OverlayStorage,
    row_ids_U: torch.Tensor,
    before_UD: torch.Tensor,
    were_changed_U: torch.Tensor,
    losses: list[float],
    *,
    is_said: bool | None = None,
) -> Taught:
    """Say which of these rows are others than before; the overlay forgets those that aren't.

    Args:
        overlay: Has them as they are now.
        row_ids_U: Ascending.
        before_UD: As they were.
        were_changed_U: Which of them the overlay had already.
        losses: Before, and after each step.
        is_said: Whether the model says what was taught.
    """
    after_UD = overlay(row_ids_U).detach()
    distances_U = (after_UD.float() - before_UD.float()).norm(dim=1)
    moved_U = ~_same_rows(before_UD, after_UD)
    overlay.forget(row_ids_U[~moved_U & ~were_changed_U])
    return Taught(
        losses,
        is_said,
        row_ids_U[moved_U],
        distances_U[moved_U],
        overlay,
        before_UD[moved_U],
        after_UD[moved_U],
        were_changed_U[moved_U],
    )


def refuse_unheard(tables: EngramMemory | OffloadedTables) -> None:
    """Raises `ValueError` where nothing that rows hold reaches the model."""
    if not tables.is_heard:
        raise with_way_out(
            ValueError(
                "this memory was never trained: W_v is zero in each of its layers, so whatever its rows hold isn't "
                "heard"
            ),
            "Train the memory first, or make it writable: sense-engram delta make-writable FOLDER --output NEW, "
            "or sense_v2.hf.make_writable(model, tokenizer)",
        )


def _loss(model: PreTrainedModel, token_ids_1T: torch.Tensor, labels_1T: torch.Tensor) -> float:
    """Of the text; the rows' gradients are left with the overlay."""
    loss: torch.Tensor = model(input_ids=token_ids_1T, labels=labels_1T, use_cache=False).loss
    if not torch.isfinite(loss):
        raise with_way_out(FloatingPointError(f"the loss of the text is {loss.item()}"), "lower lr")
    loss.backward()
    return loss.item()


def _taken(overlay: OverlayStorage, row_ids_U: torch.Tensor) -> torch.Tensor:
    """The gradients of these rows, all of which the text looks up, ascending."""
    gradients = overlay.gradients()
    assert gradients is not None
    overlay.clear_gradients()
    ids, grads = gradients
    return grads[torch.searchsorted(ids, row_ids_U)]


def _tokens(model: PreTrainedModel, tokenizer: Any, prompt: str, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [1, T]. Prompt and text are taken apart, as they are when the model is given the prompt."""
    context, learned = (encode([part], tokenizer, separator_id=None).tolist() for part in (prompt, text))
    num_learned = len(learned) if context else len(learned) - 1  # nothing comes before the first token
    if num_learned < 1:
        raise with_way_out(
            ValueError(f"{text!r} has {number_of(len(learned), 'token')}, and none can be learned"),
            "Give a longer text",
        )
    token_ids_1T = torch.tensor([[*context, *learned]], device=model.device)
    labels_1T = token_ids_1T.clone()
    labels_1T[:, : len(context)] = -100
    return token_ids_1T, labels_1T


@contextmanager
def rows_alone(
    model: PreTrainedModel, overlay: OverlayStorage, also: Sequence[torch.nn.Parameter] = ()
) -> Iterator[None]:
    """While it lasts, rows ask for a gradient, of the weights only those of `also` do, and dropout is off. No
    gradient is left at its end."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    were_training = [module for module in model.modules() if module.training]
    rows_asked = overlay.rows_require_grad
    for parameter in asked:
        parameter.requires_grad_(False)
    for parameter in also:
        parameter.requires_grad_(True)
    model.eval()
    overlay.train().requires_grad_()
    overlay.clear_gradients()
    try:
        with torch.enable_grad():
            yield
    finally:
        overlay.clear_gradients()
        overlay.requires_grad_(rows_asked)
        model.eval()
        for module in were_training:
            module.training = True
        for parameter in also:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in asked:
            parameter.requires_grad_(True)


def _same_rows(rows_UD: torch.Tensor, others_UD: torch.Tensor) -> torch.Tensor:
    """Which rows are the same bits."""
    if not len(rows_UD):
        return torch.empty(0, dtype=torch.bool)
    rows, others = (one.contiguous().view(torch.uint8) for one in (rows_UD, others_UD))
    return (rows == others).all(dim=1)


def _are_same_bits(rows_UD: torch.Tensor, others_UD: torch.Tensor) -> bool:
    return bool(_same_rows(rows_UD, others_UD).all())
