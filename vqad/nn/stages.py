"""The four stages of a backbone as VQ-Flow sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_stages(features: Sequence[Tensor] | Tensor, channels: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Four stages (N, C_k, h_k, w_k) with these channels; the first three are averaged over 3×3 cells with stride 2.

    That brings the third to the grid of the fourth. If all have one grid, none is averaged. A single map is used as the
    finest stage, and each coarser stage is the average of the one before.
    """
    single = isinstance(features, Tensor)
    features = _pyramid(features) if isinstance(features, Tensor) else features
    one_grid = not single and len({f.shape[2:] for f in features}) == 1
    got = [tuple(f.shape) for f in features]
    if len(got) != 4 or any(len(shape) != 4 for shape in got) or [s[1] for s in got] != [*channels]:
        raise ValueError(
            f"expected the backbone's four stages with {channels} channels, each (N, C, h, w); "
            f"got shapes {got}. Build the module with the channels of its features."
        )
    maps = [f.to(dtype).contiguous(memory_format=torch.channels_last) for f in features]
    return maps if one_grid else [F.avg_pool2d(f, 3, 2, 1) for f in maps[:3]] + maps[3:]


def _pyramid(finest: Tensor) -> list[Tensor]:
    """Four stages from one map, each with half the grid of the one before."""
    stages = [finest]
    for _ in range(3):
        stages.append(F.avg_pool2d(stages[-1], 3, 2, 1, count_include_pad=False))
    return stages
