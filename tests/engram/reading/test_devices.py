"""Rows to an accelerator, with substitutes for one: PyTorch's `meta` device, and a pinned memory that is only asked
for. None of it ran on a real one."""

import warnings

import pytest
import torch

from sense_v2.engram.reading import devices

META = torch.device("meta")


@pytest.fixture
def accelerator(monkeypatch):
    """`meta` as the machine's accelerator; what was asked for in pinned memory."""
    pinned = []
    empty = torch.empty

    def substitute(shape, *, dtype, pin_memory=False):
        pinned.append((tuple(shape), dtype, pin_memory))
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    monkeypatch.setattr(devices.torch, "empty", substitute)
    devices._warn_once.cache_clear()
    return pinned


def test_pinned_memory_where_there_is_an_accelerator(accelerator):
    rows = devices.staging((2, 3), torch.bfloat16, META)
    assert rows.shape == (2, 3)
    assert accelerator == [((2, 3), torch.bfloat16, True)]


def test_none_for_the_cpu_or_another_device(accelerator):
    assert devices.staging((2, 3), torch.float32, torch.device("cpu")) is None
    assert accelerator == []


def test_none_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert devices.staging((2, 3), torch.float32, META) is None


def test_an_accelerator_without_pinned_memory_is_said_once(accelerator, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Cannot access accelerator device when none is available")

    monkeypatch.setattr(devices.torch, "empty", refuse)
    with pytest.warns(UserWarning, match="meta: no pinned memory"):
        assert devices.staging((2, 3), torch.float32, META) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.staging((2, 3), torch.float32, META) is None


@pytest.mark.parametrize("is_pinned", [False, True])
def test_only_from_pinned_memory_is_the_copy_not_waited_for(is_pinned):
    class Rows:
        def is_pinned(self):
            return is_pinned

        def to(self, device, *, non_blocking):
            return device, non_blocking

    assert devices.move(Rows(), META) == (META, is_pinned)
