"""k-means with k-means++ seeding, to initialise codes from data and to revive dead codes."""

from __future__ import annotations

import torch
from torch import Tensor


def device_of(x: Tensor, generator: torch.Generator | None) -> torch.device:
    return x.device if generator is None else generator.device


def _sums(vectors: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Count and sum of the vectors (V, D) of each index: (n,) and (n, D)."""
    count = torch.bincount(index, minlength=n).to(vectors.dtype)
    total = vectors.new_zeros(n, vectors.shape[1]).index_add_(0, index, vectors)
    return count, total


def _assign(vectors: Tensor, codes: Tensor) -> Tensor:
    """Nearest code of each vector, (V, D) and (K, D) to (V,)."""
    return torch.addmm(codes.square().sum(-1), vectors, codes.T, alpha=-2).argmin(-1)


def k_means(vectors: Tensor, n_codes: int, n_iter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Codes (K, D) of the vectors (V, D), and the number of vectors of each code (K,), at least one."""
    if len(vectors) <= n_codes:
        extra = _draw(vectors.new_ones(len(vectors)), n_codes - len(vectors), True, generator)
        copies = vectors[extra]
        # Equal codes would never separate, because the first one is assigned all vectors.
        noise = torch.randn(copies.shape, generator=generator, device=device_of(vectors, generator))
        spread = vectors.std(0, correction=0).mean()
        codes = torch.cat([vectors, copies + 0.01 * spread * noise.to(copies)])
        return codes, codes.new_ones(n_codes)
    centre = vectors.mean(0)
    vectors = vectors - centre
    codes = _seed(vectors, n_codes, generator)
    count = codes.new_ones(n_codes)
    for _ in range(n_iter):
        count, total = _sums(vectors, _assign(vectors, codes), n_codes)
        codes = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], codes)
    return codes + centre, count.clamp_min(1)


def _seed(vectors: Tensor, n_codes: int, generator: torch.Generator | None) -> Tensor:
    """k-means++ seeds (K, D) out of the vectors (V, D)."""
    first = _draw(vectors.new_ones(len(vectors)), 1, False, generator)
    distance = (vectors - vectors[first]).square().sum(-1)
    others = draw_far_apart(vectors, distance, n_codes - 1, generator)
    return vectors[torch.cat([first, others])]


def draw_far_apart(vectors: Tensor, distance: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` of the vectors (V, D) as in k-means++.

    Probabilities are proportional to the squared distance to the nearest code, initially ``distance`` (V,); vectors
    that were drawn count as codes from the next round. Each round draws an eighth of the number drawn so far.
    """
    distance, norm = distance.clone(), vectors.square().sum(-1)
    # If only copies of codes are left, they are drawn with equal probabilities.
    least = 1e-12 * float(norm.mean()) + 1e-30
    drawn = torch.zeros(0, dtype=torch.long, device=vectors.device)
    while len(drawn) < n:
        weight = distance.clamp_min(least)
        weight[drawn] = 0
        chosen = _draw(weight, min(n - len(drawn), max(1, len(drawn) // 8)), False, generator)
        new = vectors[chosen]
        squared = torch.addmm(new.square().sum(-1), vectors, new.T, alpha=-2).amin(-1) + norm
        distance = torch.minimum(distance, squared.clamp_min_(0))
        drawn = torch.cat([drawn, chosen])
    return drawn


def _draw(weight: Tensor, n: int, replacement: bool, generator: torch.Generator | None) -> Tensor:
    """``n`` indices drawn with probabilities proportional to ``weight``."""
    if not n:
        return torch.zeros(0, dtype=torch.long, device=weight.device)
    here = weight.to(device_of(weight, generator))
    return torch.multinomial(here, n, replacement, generator=generator).to(weight.device)
