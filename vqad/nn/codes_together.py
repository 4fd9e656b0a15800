"""A step of codebooks by what several processes have seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .groups import Groups
from .ranks import gathered, of_first, summed

if TYPE_CHECKING:
    from .quantize import VectorQuantizer


@torch.no_grad()
def step_together(quantizer: VectorQuantizer, x: Tensor, indices: Tensor, groups: Groups, revive: bool) -> None:
    """A step by what all processes that learn together have seen: their counts and sums are added up."""
    index = (indices + groups.of_image[:, None] * quantizer.n_codes).flatten()
    vectors = x.flatten(0, 1).to(quantizer.embed.dtype)
    vectors = torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1)
    seen = vectors.new_zeros(quantizer.n_groups * quantizer.n_codes, quantizer.dim + 1).index_add_(0, index, vectors)
    seen = summed(seen).view(quantizer.n_groups, quantizer.n_codes, -1)
    total, count = seen[..., :-1], seen[..., -1]
    if revive:
        groups = Groups.of(gathered(groups.host), quantizer.n_groups, x.device)
        x, indices = gathered(x), gathered(indices)
    code = quantizer._of_index(indices, groups) if revive else None
    is_here, gain = (count.sum(1) > 0)[:, None], 1 - quantizer.decay
    size = torch.where(is_here, quantizer.cluster_size * quantizer.decay + gain * count, quantizer.cluster_size)
    mean = torch.where(is_here[..., None], quantizer.embed_avg * quantizer.decay + gain * total, quantizer.embed_avg)
    quantizer.embed.copy_(
        torch.where(is_here[..., None], mean / quantizer._smoothed(size).unsqueeze(-1), quantizer.embed)
    )
    quantizer.cluster_size.copy_(size)
    quantizer.embed_avg.copy_(mean)
    if code is not None:
        quantizer._revive(x, code, groups)
        for buffer in (quantizer.embed, quantizer.cluster_size, quantizer.embed_avg):  # by the draws of one of them
            of_first(buffer)
