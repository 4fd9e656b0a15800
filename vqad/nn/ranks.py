"""Sums over the processes of one training; without effect in a training with one process.

This module has the tensor operations of `torch.distributed`; `vqad.collective` manages the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_group: Any = None


@contextmanager
def summing_over(group: Any) -> Iterator[None]:
    """Make `summed` sum over the processes of a group."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def is_shared() -> bool:
    """Whether several processes learn one model together."""
    return _group is not None


def summed(x: Tensor) -> Tensor:
    """Sum ``x`` over all processes, in place; all must call this with tensors of one shape."""
    if _group is not None:
        torch.distributed.all_reduce(x, group=_group)
    return x


def of_first(x: Tensor) -> Tensor:
    """Replace ``x`` by that of the first process, in place."""
    if _group is not None:
        torch.distributed.broadcast(x, src=0, group=_group)
    return x


def gathered(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes in order of rank; their numbers may differ."""
    if _group is None:
        return x
    import torch.distributed as dist

    n = torch.zeros(dist.get_world_size(_group), dtype=torch.long, device=x.device)
    n[dist.get_rank(_group)] = len(x)
    counts = summed(n).tolist()
    # Pad to one length, as not all backends support different ones.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


class _Summed(torch.autograd.Function):
    """`summed`, whose gradient is that of the sum of the losses of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return summed(gradients[0].clone())


class BatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the statistics of a batch over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_shared() or not (self.training or not self.track_running_stats):
            return super().forward(x)
        own = x.double()  # a difference of squares loses digits
        total = torch.cat([own.sum(0), own.square().sum(0), own.new_full((1,), float(len(x)))])
        total = _Summed.apply(total)
        n, (first, second) = total[-1].detach(), total[:-1].view(2, -1)
        mean = first / n
        variance = (second / n - mean.square()).clamp_min(0)
        if self.training and self.track_running_stats:
            self._move(mean.detach(), variance.detach() * n / (n - 1))
        scaled: Tensor = (own - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return scaled.to(x.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            if running is not None and self.momentum is not None:
                running.lerp_(value.to(running.dtype), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
