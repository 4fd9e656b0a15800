"""Fields of vectors from a backbone's maps, to be measured by `LocationGaussian`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CELLS = 48
"""Largest number of cells along a side of a field; finer maps are averaged."""
_FINEST_STRIDE = 8


def feature_fields(maps: Sequence[Tensor], strides: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Fields of vectors, (N, d, h, w) each.

    For several maps:

    - ``fine``: the map of stride 8, averaged over 3 x 3 cells;
    - ``middle``: the same and the maps between it and the last, averaged likewise, on the grid of the coarsest of them;
    - ``deep``: the last map;
    - ``whole``: the mean of the last map over its cells, a single cell.

    For a single map: ``features``, averaged over 3 x 3 cells, and ``whole`` if it has several cells.

    Parameters
    ----------
    maps : sequence of Tensor of shape (N, C_k, h_k, w_k)
    strides : sequence of int, optional
        Pixels per cell of each map; required for several maps.
    """
    if len(maps) == 1 or strides is None:
        (single,) = maps
        if single.shape[2:] == (1, 1):
            return {"features": single}
        return {"features": averaged(_limited(single)), "whole": single.mean((2, 3), keepdim=True)}
    *fine, deep = maps
    finest = max((k for k, stride in enumerate(strides[:-1]) if stride <= _FINEST_STRIDE), default=0)
    near = [averaged(_limited(m)) for m in fine[finest:]]
    fields = {"fine": near[0]} if len(near) > 1 else {}
    fields["middle"] = torch.cat([_on_grid(m, near[-1].shape[2:]) for m in near], 1)
    return {**fields, "deep": _limited(deep), "whole": deep.mean((2, 3), keepdim=True)}


def averaged(x: Tensor) -> Tensor:
    """Mean over 3 x 3 cells; at the border, over the existing ones."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _limited(x: Tensor) -> Tensor:
    """Average over blocks of cells if there are more than `MAX_CELLS` along a side."""
    block = math.ceil(max(x.shape[2:]) / MAX_CELLS)
    if block == 1:
        return x
    return F.avg_pool2d(x, block, ceil_mode=True, count_include_pad=False)


def _on_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    if x.shape[2] % grid[0] == 0 and x.shape[3] % grid[1] == 0:
        return F.avg_pool2d(x, (x.shape[2] // grid[0], x.shape[3] // grid[1]))
    return F.interpolate(x, tuple(grid), mode="bilinear", align_corners=False)


def merge_maps(maps: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Resize every stage's map to ``grid`` (bilinear, align_corners=True) and concatenate the channels."""
    return torch.cat(
        [m if m.shape[-2:] == grid else F.interpolate(m, grid, mode="bilinear", align_corners=True) for m in maps],
        dim=1,
    )
