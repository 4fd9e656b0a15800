"""What training and the start of a model read of stored features: scaled batches, and the scale itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqad.store import FeatureStore


class ScaledFeatures:
    """A feature source for training: what ``assemble`` makes of the maps of some images."""

    def __init__(self, store: FeatureStore, assemble: Callable[[list[Tensor]], Any]):
        self.store, self.assemble = store, assemble

    def __len__(self) -> int:
        return len(self.store)

    def batch(self, indices: Sequence[int] | Tensor) -> Any:
        return self.assemble(self.store.batch(indices))

    def own_batch(self, indices: Sequence[int] | Tensor) -> Any:
        """Of images that this process has of those that several share."""
        return self.assemble(self.store.own_batch(indices))


class TrainingBatches:
    """Training batches as a collection that can be gone through again."""

    def __init__(self, source: ScaledFeatures, category: Tensor, rows: Tensor, batch_size: int):
        self.source, self.category, self.parts = source, category, torch.split(rows, batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        part = self.parts[i]
        return self.source.batch(part), self.category[part]


def channel_statistics(store: FeatureStore, rows: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation of every channel of every map over all cells of the images ``rows``, (C,) each."""
    totals = [torch.zeros(2, m.shape[1], dtype=torch.float64) for m in store.maps]
    for part in torch.split(torch.from_numpy(rows), 64):
        for total, m in zip(totals, store.batch(part)):
            m = m.double()  # the difference of squares below leaves few digits
            total += torch.stack([m.sum((0, 2, 3)), m.square().sum((0, 2, 3))])
    mean, scale = [], []
    for total, m in zip(totals, store.maps):
        first, second = total / (len(rows) * math.prod(m.shape[2:]))
        deviation = (second - first.square()).clamp(min=0).sqrt()
        # What a channel's values have of digits in the difference of squares; under it there is nothing to scale by.
        floor = 1e-6 * second.sqrt() + 1e-12
        # Not by 1 alone: of a channel of large values, what little they differ would outweigh all others.
        nothing = floor.clamp(min=1)
        mean.append(first.float())
        scale.append(torch.where(deviation > floor, deviation, nothing).float())
    return mean, scale
