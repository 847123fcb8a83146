"""How a library call tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """Announces a piece of work; what its context gives is called with how much more is done."""

    def __call__(
        self, label: str, total: int, *, unit: str = "B"
    ) -> AbstractContextManager[Callable[[int], Any]]: ...


def no_progress(label: str, total: int, *, unit: str = "B") -> AbstractContextManager[Callable[[int], Any]]:
    """Tell nobody: the default of every call that takes a `Progress`."""
    return nullcontext(lambda count: None)
