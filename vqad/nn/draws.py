"""Random states per thread, for several trainings at the same time.

torch modules draw from one generator per process. Each training keeps its own state in its thread and swaps it in while
it draws, which takes short moments for which trainings in other threads wait.
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
    """Lock on torch's CPU generator, to be held while its state is not that of the process."""
    return _PLACE


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Make everything that this thread draws within `drawing` depend only on ``seed``."""
    before = getattr(_HERE, "state", None)
    _HERE.state = torch.Generator().manual_seed(seed).get_state()
    try:
        yield
    finally:
        _HERE.state = before


@contextmanager
def drawing() -> Iterator[None]:
    """Context for drawing from torch's CPU generator: within `own_draws`, from this thread's own state."""
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
    """The random state that this thread draws from."""
    with drawing():
        return torch.get_rng_state()


def set_random_state(state: Tensor) -> None:
    """Set the random state that this thread draws from."""
    with drawing():
        torch.set_rng_state(state)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that draws from this thread's own state."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        with drawing():
            return super().forward(x)


def _unlock() -> None:
    """Renew the lock in a forked process, where a lock held by another thread would never be released."""
    global _PLACE
    _PLACE = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)
