"""Dropout whose random numbers are cheap on a CPU, alone and together with what stands next to it in a transformer.

On a CPU random numbers and comparisons one element at a time cost more than the layer that they follow, and every
tensor that is kept for the backward pass costs as much as a pass over it. On other devices, and where nothing is
dropped, all of this is torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``.

    What ``torch.nn.functional.dropout`` does. On a CPU, ``p`` is rounded so that the scale is exact in the type of
    ``x`` (to 2e-3 of ``1 - p`` in bfloat16) and to a multiple of 2**-16: the expectation is that of ``x`` to 2**-16.
    Any two elements of a mask are independent of each other, and so are two masks.

    Parameters
    ----------
    x : Tensor
    p : float
        In [0, 1].
    training : bool, default=True
        When False, ``x`` is returned as it is.
    """
    if not training or p == 0:
        return x
    mask = _mask(x, p)
    return F.dropout(x, p) if mask is None else x * mask


def add_dropped(x: Tensor, branch: Tensor, p: float, training: bool = True) -> Tensor:
    """``x + dropout(branch, p, training)``."""
    mask = _mask(branch, p) if training and p else None
    return x + dropout(branch, p, training) if mask is None else torch.addcmul(x, branch, mask)


def relu_dropped(x: Tensor, p: float, training: bool = True) -> Tensor:
    """``dropout(x.relu(), p, training)``; may overwrite ``x``."""
    mask = _mask(x, p) if training and p else None
    if mask is None:
        return dropout(x.relu(), p, training)
    output: Tensor = _ReluMask.apply(x, mask, float(_scale(x.dtype, p)))
    return output


class _ReluMask(torch.autograd.Function):
    """The output says by itself where the gradient passes, so that nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.scale = scale
        output = torch.mul(x.relu(), mask, out=x)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, output, 0).mul_(ctx.scale), None, None


def _mask(x: Tensor, p: float) -> Tensor | None:
    """0 or ``1 / (1 - p)`` for every element of ``x``; None where torch's own dropout shall serve."""
    scale = _scale(x.dtype, p)
    threshold = round((1 - 1 / float(scale)) * 2**16)
    if x.device.type != "cpu" or not x.is_floating_point() or not 0 < threshold < 2**16:
        return None
    # Comparing in place stays in 16-bit integers, which is ten times faster than making booleans.
    keep = random_int16(x.numel()).ge_(threshold - 2**15).view(x.shape)
    if x.element_size() == 2:
        return keep.mul_(int(scale.view(torch.int16))).view(x.dtype)
    return keep.to(x.dtype).mul_(float(scale))


def _scale(dtype: torch.dtype, p: float) -> Tensor:
    return torch.tensor(1 / (1 - p) if p < 1 else math.inf).to(dtype)


def random_signs(n: int, p: float) -> Tensor:
    """(n,) bfloat16 numbers on the CPU, negative with probability ``p`` to a multiple of 2**-16, pairwise independent.

    Only their signs mean something.
    """
    negative = random_int16(n).lt_(round(rounded(p) * 2**16) - 2**15)
    return negative.neg_().view(torch.bfloat16)


def rounded(p: float) -> float:
    """The multiple of 2**-16 nearest to ``p``, but 1, at which nothing is left to scale."""
    return min(round(p * 2**16), 2**16 - 1) / 2**16


def random_int16(n: int) -> Tensor:
    """(n,) uniform 16-bit integers on the CPU, pairwise independent, from torch's default generator.

    One 64-bit draw gives four of them, and a large tensor uses each in eight blocks, every time in another place and
    with another random number added.
    """
    blocks = 8 if n >= 2**14 else 1
    length = -(-n // (4 * blocks)) * 4
    numbers = torch.empty(length // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    if blocks == 1:
        return numbers[:n]
    twice = numbers.repeat(2)
    start = torch.randint(length, (blocks,)).tolist()
    added = torch.randint(-(2**15), 2**15, (blocks,)).tolist()
    output = torch.empty(blocks, length, dtype=torch.int16)
    for block, i, shift in zip(output, start, added):
        torch.add(twice[i : i + length], shift, out=block)
    return output.view(-1)[:n]
