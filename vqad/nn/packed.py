"""Linear maps on a CPU by the operators of torch's own compiler.

Of contiguous inputs they have the bits of ``torch.nn.functional.linear``; a ReLU in the same operator makes NaN zero.

For scoring, weights are laid out for the processor's matrix unit once, not at every call: with one image at a time this
takes a third of the time of the product itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operators, and they take numbers of this type there."""
    return device.type == "cpu" and dtype == torch.bfloat16 and _has_operators()


@cache
def _has_operators() -> bool:
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in names) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_type(x: Tensor) -> torch.dtype:
    """What a product of ``x`` is computed in: what autocast says, which leaves float64 alone, or the type of ``x``."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias`` where no gradient is asked for; all of one type.

    In bfloat16 on a CPU the bias needs no pass over memory of its own.
    """
    if not can_pack(weight.device, weight.dtype):
        return F.linear(x, weight, bias)
    product: Any = torch.ops.mkldnn._linear_pointwise
    output: Tensor = product(x, weight, bias, "none", [], "")
    return output


class PackedLinear(nn.Module):
    """``x @ weight.T + bias``, and its ReLU if wanted, of inputs cast to the type of the weight; for inference.

    Parameters
    ----------
    weight : Tensor of shape (D, E)
    bias : Tensor of shape (D,)
    rows : int
        Rows of an input (vectors), for which the layout is chosen; other numbers give the same.
    relu : bool, default=False
    """

    def __init__(self, weight: Tensor, bias: Tensor, rows: int, relu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self.bias = bias.detach()
        self.dtype = weight.dtype
        self.after = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        output: Tensor = product(x.to(self.dtype), self.weight, self.bias, self.after, [], "")
        return output
