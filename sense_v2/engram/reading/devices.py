"""Rows on the CPU -> rows on an accelerator, through `torch.accelerator` alone.

Rows for an accelerator are gathered into pinned memory, from which the copy is asynchronous. PyTorch's own cache of
pinned memory hands a block out again only when the copies from it are done, so no buffer of ours could be filled too
early. Where an accelerator has no pinned memory, they go through ordinary memory; that is said once.

This is the only module that knows of accelerators. They were substituted in its tests.
"""

from __future__ import annotations

import functools
import warnings

import torch


def staging(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Pinned memory for rows that go to `device`; None where it has none, or is no accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or device.type != accelerator.type:
        return None
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except (RuntimeError, NotImplementedError) as error:
        _warn_once(f"{device.type}: no pinned memory ({error}); rows are copied to it from ordinary memory")
        return None


def move(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows on `device`; from pinned memory without waiting for the copy (the device's next work does)."""
    return rows.to(device, non_blocking=rows.is_pinned())


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)
