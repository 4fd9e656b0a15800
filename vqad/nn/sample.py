"""Subsamples and principal directions of vectors that come in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PROJECTION_NUMBERS = 2**27
"""Largest number of values from which principal directions are computed."""


def principal_directions(batches: Iterable[Tensor], n_batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), ascending variances (D,) and principal directions (D, D) of vectors (V, D) in batches, in float64.

    If there are many long vectors, a random subset is used.
    """
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for vectors in batches:
        limit = -(-PROJECTION_NUMBERS // (vectors.shape[1] * n_batches))
        if len(vectors) > limit:
            vectors = vectors[torch.randperm(len(vectors))[:limit].to(vectors.device)]
        vectors = vectors.cpu().double()
        count += len(vectors)
        first, second = first + vectors.sum(0), second + vectors.mT @ vectors
    mean = first / count
    values, directions = torch.linalg.eigh(second / count - mean[:, None] * mean)
    return mean, values, directions


class CellSample:
    """A uniform sample of the cells of each category from a stream of batches.

    Each cell draws a random key, and the cells with the smallest keys are kept.
    """

    def __init__(self, limit: int, generator: torch.Generator | None) -> None:
        self.limit = limit
        self.generator = generator
        self.kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.bound: dict[int, float] = {}
        self.count: dict[int, int] = {}

    def add(self, vectors: Tensor, category: Tensor) -> None:
        """Add the cells (N, L, D) of a batch to the stream."""
        for c in torch.unique(category).tolist():
            offered = vectors[category == c].flatten(0, 1)
            key = torch.rand(len(offered), generator=self.generator)
            chosen = (key < self.bound.get(c, 1.0)).nonzero().squeeze(1)
            self.kept.setdefault(c, []).append((key[chosen], offered[chosen.to(offered.device)]))
            self.count[c] = self.count.get(c, 0) + len(chosen)
            if self.count[c] > 2 * self.limit:
                self._thin(c)

    def _thin(self, c: int) -> None:
        keys, vectors = (torch.cat(parts) for parts in zip(*self.kept[c]))
        smallest, chosen = keys.topk(min(self.limit, len(keys)), largest=False)
        self.kept[c] = [(smallest, vectors[chosen.to(vectors.device)])]
        self.count[c] = len(smallest)
        self.bound[c] = float(smallest[-1])

    def drawn(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each category (1,) with its sampled cells (1, V, D)."""
        for c in sorted(self.kept):
            self._thin(c)
            ((_, vectors),) = self.kept.pop(c)
            yield torch.tensor([c], device=vectors.device), vectors.unsqueeze(0)
