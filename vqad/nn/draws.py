"""Random numbers of one thread's own, for several trainings at a time.

Modules of torch draw from one generator of the process. A training in a thread keeps a state of its own, which it puts
in place while it draws: short moments, for which trainings in other threads wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HERE = threading.local()
_PLACE = threading.RLock()


def generator_place() -> threading.RLock:
    """Lock on torch's generator of the CPU, to be held while its state is another one than the process's."""
    return _PLACE


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Let all that this thread draws within `drawing` come from ``seed`` alone."""
    before = getattr(_HERE, "state", None)
    _HERE.state = torch.Generator().manual_seed(seed).get_state()
    try:
        yield
    finally:
        _HERE.state = before


@contextmanager
def drawing() -> Iterator[None]:
    """Draw here what torch draws on a CPU: within `own_draws` from this thread's own state."""
    state = getattr(_HERE, "state", None)
    if state is None or getattr(_HERE, "is_in_place", False):
        yield
        return
    with _PLACE:
        outside, _HERE.is_in_place = torch.get_rng_state(), True
        torch.set_rng_state(state)
        try:
            yield
        finally:
            _HERE.state, _HERE.is_in_place = torch.get_rng_state(), False
            torch.set_rng_state(outside)


def random_state() -> Tensor:
    """State of what this thread draws from."""
    with drawing():
        return torch.get_rng_state()


def set_random_state(state: Tensor) -> None:
    """Go on drawing from a state that `random_state` gave."""
    with drawing():
        torch.set_rng_state(state)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, from this thread's own draws."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        with drawing():
            return super().forward(x)


def _unlock() -> None:
    """In a process that was forked off, nobody lets go of what other threads held."""
    global _PLACE
    _PLACE = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)
