"""Dropout for a CPU: cheap random numbers, and arithmetic on the bits of what they drop.

There random numbers and comparisons one element at a time cost more than the layer that they follow. What is here uses
every random number several times, and 16-bit integers in place of booleans, which take several times as long.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def add_dropped(x: Tensor, branch: Tensor, p: float, training: bool = True) -> Tensor:
    """``x + dropout(branch, p, training)``.

    On a CPU ``p`` is rounded so that ``1 / (1 - p)`` is exact in the type of ``branch`` (to 2e-3 of ``1 - p`` in
    bfloat16) and to a multiple of 2**-16: the expectation is right to 2**-17 of ``1 / (1 - p)``. Any two elements of a
    mask are independent of each other, and so are two masks.

    Parameters
    ----------
    x, branch : Tensor
        Of one shape.
    p : float
        In [0, 1].
    training : bool, default=True
    """
    if not training or p == 0:
        return x + branch
    scale = torch.tensor(1 / (1 - p) if p < 1 else math.inf, dtype=branch.dtype)
    dropped = round((1 - 1 / float(scale)) * 2**16)
    if branch.device.type != "cpu" or not 0 < dropped < 2**16:
        return x + F.dropout(branch, p)
    return torch.addcmul(x, branch, _mask(branch, scale, dropped))


def _mask(x: Tensor, scale: Tensor, dropped: int) -> Tensor:
    """0 for ``dropped`` of 2**16 elements of ``x``, and ``scale`` for the others."""
    keep, numbers = random_int16(x.numel()).ge_(dropped - 2**15).view(x.shape), bits(scale)
    return keep.to(numbers.dtype).mul_(int(numbers)).view(x.dtype)


def zero_at_random_(x: Tensor, p: float) -> None:
    """Make each of the numbers ``x``, contiguous and on the CPU, zero with probability :func:`rounded` ``p``.

    Pairwise independently.
    """
    keep = random_int16(x.numel()).ge_(round(rounded(p) * 2**16) - 2**15)
    bits(x).mul_(keep.view(x.shape))


def negate_at_random_(x: Tensor, p: float) -> None:
    """Make each of the positive numbers ``x``, contiguous and on the CPU, negative with that probability.

    Pairwise independently.
    """
    numbers, chosen = bits(x), random_int16(x.numel()).lt_(round(rounded(p) * 2**16) - 2**15)
    numbers.add_(chosen.view(x.shape), alpha=torch.iinfo(numbers.dtype).min)


def rounded(p: float) -> float:
    """The multiple of 2**-16 nearest to ``p``, but 1, at which nothing is left to scale."""
    return min(round(p * 2**16), 2**16 - 1) / 2**16


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, which have the sign of the number; those of 0.0 are 0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def random_int16(n: int) -> Tensor:
    """(n,) uniform 16-bit integers on the CPU, pairwise independent, from torch's default generator.

    One 64-bit draw gives four of them, and of many each is used in 32 blocks, as a rule every time in another place,
    and with another random number added.
    """
    blocks = 32 if n >= 2**16 else 1
    length = -(-n // (4 * blocks)) * 4
    numbers = torch.empty(length // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    if blocks == 1:
        return numbers[:n]
    step = int(torch.randint(length // blocks, ()))
    added = torch.randint(-(2**15), 2**15, (blocks, 1), dtype=torch.int16)
    output = torch.empty(blocks, length, dtype=torch.int16)
    torch.add(numbers.repeat(2).as_strided((blocks, length), (step, 1)), added, out=output)
    return output.view(-1)[:n]
