"""Linear maps for scoring on a CPU, whose weights are laid out for the processor's matrix unit once, not at every call.

With one image at a time this layout takes a third of the time of the product itself. The operators are those that
torch's own compiler calls, and give the same bits as ``torch.nn.functional.linear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch has the operators, and they take this weight."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    if weight.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """``x @ weight.T + bias``, and its ReLU if wanted, of inputs cast to the type of the weight; for inference.

    Parameters
    ----------
    weight, bias : Tensor of shape (D, E), (D,)
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
