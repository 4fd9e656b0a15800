r"""The condition's part of the flows' convolutions, computed once for all blocks, and by look-up for codes.

The input of the first convolution of each subnet of the flows is [passive half ; condition]. The convolution is linear,
so it is the sum of a convolution of the passive half and one of the condition, and the latter does not depend on the
flow's state. :class:`ConditionProjection` computes it for all blocks of a stage at once. If the condition consists of
codes, the same numbers are sums of table rows, without a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Condition:
    """The condition of one stage.

    Attributes
    ----------
    pattern : Tensor of shape (N, D, h, w)
        The code of each cell, with straight-through gradients to the encoder; D = d_position + d_concept.
    index : Tensor of shape (N, h, w), int64
        Index of the code in ``codes``.
    encoded : Tensor of shape (N, D, h, w)
        Output of the encoder, without gradient.
    codes : Tensor of shape (K, D)
        Concatenated codebooks of the groups that are present: code ``i`` is code ``i % n_patterns`` of the group at
        position ``i // n_patterns``.
    position : Tensor of shape (d_position, h, w)
    concept : Tensor of shape (N, d_concept)
        ŷ, with straight-through gradients.
    """

    pattern: Tensor
    index: Tensor
    encoded: Tensor
    codes: Tensor
    position: Tensor
    concept: Tensor

    @property
    def distance(self) -> Tensor:
        """Mean squared difference between the encoded cell and its code, (N, h, w)."""
        return (self.pattern.detach() - self.encoded).square().mean(1)

    def of_group(self, place: int, n_groups: int, images: Tensor) -> Condition:
        """The condition of the images (n,) of one group, given by its position among those present."""
        own = {name: getattr(self, name)[images] for name in ("pattern", "index", "encoded", "concept")}
        n_codes = len(self.codes) // n_groups
        first = place * n_codes
        return replace(self, **{**own, "index": own["index"] - first}, codes=self.codes[first : first + n_codes])

    def dense(self) -> Tensor:
        """[pattern + base ; ŷ] with base = [position ; ŷ], (N, D + d_concept, h, w)."""
        n, _, h, w = self.pattern.shape
        repeated = self.concept[:, :, None, None].expand(-1, -1, h, w)
        base = torch.cat([self.position.expand(n, -1, -1, -1), repeated], 1)
        return torch.cat([base + self.pattern, repeated], 1)


def border_class(h: int, w: int, device: torch.device) -> Tensor:
    """Which taps of a zero-padded 3×3 window lie inside the map, as one of 16 classes for every cell, (h, w).

    The class is ``4·r + c``; ``r`` has bit 1 set in the first row, bit 0 in the last; ``c`` likewise for
    columns.
    """
    row, column = torch.arange(h, device=device), torch.arange(w, device=device)
    r = 2 * (row == 0).long() + (row == h - 1).long()
    c = 2 * (column == 0).long() + (column == w - 1).long()
    return 4 * r[:, None] + c


def _taps_inside(device: torch.device, dtype: torch.dtype) -> Tensor:
    """For each of the 16 border classes, 1 for the taps inside the map and 0 for the others: (16, 9)."""
    classes = torch.arange(4, device=device)
    first, last = classes >= 2, classes % 2 == 1
    inside = torch.stack([~first, torch.ones_like(first), ~last], 1).to(dtype)  # (4, 3): before, at, after
    return torch.einsum("ra,cb->rcab", inside, inside).reshape(16, 9)


def code_table(weight: Tensor, bias: Tensor, codes: Tensor, position: Tensor, concept: Tensor) -> Tensor:
    r"""Table of everything that a condition made of codes can add to a convolution.

    The condition is :math:`[e_k + (p, \hat y) ; \hat y]`: a code, plus the position, plus the concept over
    the remaining channels, and the concept again. Its convolution is the sum over the nine taps of
    :math:`W_t e_{k(t)}`, of a map that depends on the position alone, and of a term that depends on the
    concept and on which taps the border cuts off.

    Parameters
    ----------
    weight : Tensor of shape (H, D + d, 3, 3)
    bias : Tensor of shape (H,)
    codes : Tensor of shape (K, D)
    position : Tensor of shape (D - d, h, w)
    concept : Tensor of shape (M, d)

    Returns
    -------
    Tensor of shape (9·K + 1 + h·w + 16·M, H)
        For code and tap; zeros, for neighbours outside the map; for cell; for concept and border class.
    """
    d_pattern, d_position, width = codes.shape[1], position.shape[0], weight.shape[0]
    of_code = codes @ weight[:, :d_pattern].permute(1, 2, 3, 0).reshape(d_pattern, -1)
    of_cell = F.conv2d(position[None], weight[:, :d_position], bias, padding=1)[0].flatten(1).mT
    on_concept = weight[:, d_position:d_pattern] + weight[:, d_pattern:]
    of_tap = (concept @ on_concept.permute(1, 2, 3, 0).reshape(concept.shape[1], -1)).view(-1, 9, width)
    of_concept = _taps_inside(weight.device, of_tap.dtype) @ of_tap
    rows = [of_code.view(-1, width), of_code.new_zeros(1, width), of_cell, of_concept.flatten(0, 1)]
    return torch.cat(rows)


def look_up(table: Tensor, n_codes: int, index: Tensor, concept_row: Tensor) -> Tensor:
    """Sum, for every cell, the eleven rows of a :func:`code_table` that concern it.

    Parameters
    ----------
    table : Tensor of shape (9·K + 1 + h·w + 16·M, H)
    n_codes : int
        K.
    index : Tensor of shape (N, h, w), int64
        Code of every cell.
    concept_row : Tensor of shape (N,), int64
        Which of the M concepts every image has.

    Returns
    -------
    Tensor of shape (N, H, h, w), stored channels last
    """
    n, h, w = index.shape
    outside = 9 * n_codes
    tap = torch.arange(9, device=index.device).view(3, 3)
    # A neighbour beyond the border gets a code whose row is clamped to the row of zeros.
    neighbour = F.pad(index, (1, 1, 1, 1), value=n_codes).unfold(1, 3, 1).unfold(2, 3, 1)
    of_code = (9 * neighbour + tap).clamp(max=outside).reshape(n, h * w, 9)
    of_cell = (outside + 1 + torch.arange(h * w, device=index.device)).view(1, h * w, 1).expand(n, -1, -1)
    border = border_class(h, w, index.device).view(1, h * w, 1)
    of_concept = outside + 1 + h * w + 16 * concept_row.view(n, 1, 1) + border
    rows = torch.cat([of_code, of_cell, of_concept], -1).view(n * h * w, 11)
    return F.embedding_bag(rows, table, mode="sum").view(n, h, w, -1).permute(0, 3, 1, 2)


class _ConvolutionGradient(torch.autograd.Function):
    """Return a value unchanged, and give ``x`` the gradient that it would have from ``conv2d(x, weight)``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        # The transpose of a padded 3×3 convolution is the convolution with the mirrored weight.
        mirrored = weight.flip(2, 3).transpose(0, 1).to(gradients[0].dtype)
        return gradients[0], F.conv2d(gradients[0], mirrored, padding=1).to(ctx.dtype), None


class ConditionProjection(nn.Module):
    """The condition's part of several 3×3 convolutions of [passive ; condition], as one convolution.

    Parameters
    ----------
    condition_channels : int
    passive_channels, widths : sequence of int
        Input channels of the other part of each convolution, and output channels of each.
    """

    def __init__(self, condition_channels: int, passive_channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = list(widths)
        self.weight = nn.Parameter(torch.empty(sum(widths), condition_channels, 3, 3))
        self.bias = nn.Parameter(torch.empty(sum(widths)))
        with torch.no_grad():
            parts = zip(*(torch.split(p, self.widths) for p in (self.weight, self.bias)), passive_channels)
            for weight, bias, passive in parts:
                init_as_part(weight, passive + condition_channels)
                init_as_part(bias, passive + condition_channels)

    def forward(self, condition: Tensor) -> list[Tensor]:
        """What a condition (N, C, h, w) adds to each convolution, including biases: (N, H_b, h, w) each."""
        return self._split(F.conv2d(condition, self.weight, self.bias, padding=1))

    def from_codes(self, condition: Condition) -> list[Tensor]:
        """The same as ``forward(condition.dense())``, gradients included, by look-up of the codes."""
        image = torch.arange(len(condition.index), device=condition.index.device)
        table = self.table(condition.codes, condition.position, condition.concept)
        projection = look_up(table, len(condition.codes), condition.index, image)
        if condition.pattern.requires_grad:
            of_pattern = self.weight[:, : condition.codes.shape[1]].detach()
            projection = _ConvolutionGradient.apply(projection, condition.pattern, of_pattern)
        return self._split(projection)

    def from_table(self, table: Tensor, condition: Condition, concept_index: Tensor) -> list[Tensor]:
        """The same from a :meth:`table` of the whole codebooks."""
        return self._split(look_up(table, len(condition.codes), condition.index, concept_index))

    def table(self, codes: Tensor, position: Tensor, concept: Tensor) -> Tensor:
        """See :func:`code_table`; in full precision."""
        with torch.autocast(codes.device.type, enabled=False):
            concept, position = concept.to(codes.dtype), position.to(codes.dtype)
            return code_table(self.weight, self.bias, codes, position, concept)

    def _split(self, projection: Tensor) -> list[Tensor]:
        return list(torch.split(projection, self.widths, 1))


def init_as_part(parameter: Tensor, fan_in: int) -> None:
    """Initialise a part of a 3×3 convolution like torch's initialisation of all its ``fan_in`` input channels."""
    bound = (9 * fan_in) ** -0.5
    nn.init.uniform_(parameter, -bound, bound)
