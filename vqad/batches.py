"""Batches of stored features for training and initialisation, and the scale of the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqad.engine import Engine, on_device, pinned
from vqad.store import FeatureStore

KEPT_AT_ONCE = 64
"""Number of images that are assembled at a time when a device keeps all of them."""


class ScaledFeatures:
    """A feature source for training, which applies ``assemble`` to the maps of the images asked for.

    Parameters
    ----------
    store : FeatureStore
    assemble : callable
        Takes float32 maps on the host; returns a tensor or a list of tensors for the same images.
    engine : Engine
        Where training runs. On a device other than a CPU, all images are assembled once and kept there, in the type
        that it computes in, if they fit into half of its free memory.
    """

    def __init__(self, store: FeatureStore, assemble: Callable[[list[Tensor]], Any], engine: Engine):
        self.store, self.assemble, self.engine = store, assemble, engine
        self._kept: list[Tensor] | None = None
        self._is_single = False
        if engine.device.type != "cpu" and len(store) and not store.is_shared:
            self._keep()

    def __len__(self) -> int:
        return len(self.store)

    def batch(self, indices: Sequence[int] | Tensor) -> Any:
        """Features of the given images, on the device if they are kept there, else on the host."""
        if self._kept is None:
            return self.assemble(self.store.batch(indices))
        rows = on_device(pinned(torch.as_tensor(indices), self.engine.device), self.engine.device)
        features = [kept.index_select(0, rows).float() for kept in self._kept]
        return features[0] if self._is_single else features

    def _keep(self) -> None:
        first = self.assemble(self.store.batch([0]))
        self._is_single = isinstance(first, Tensor)
        shapes = [m.shape[1:] for m in ([first] if isinstance(first, Tensor) else first)]
        device, dtype = self.engine.device, self.engine.dtype
        if len(self) * sum(map(math.prod, shapes)) * dtype.itemsize > self.engine.free_memory() // 2:
            return
        kept = [torch.empty((len(self), *shape), dtype=dtype, device=device) for shape in shapes]
        for part in torch.split(torch.arange(len(self)), KEPT_AT_ONCE):
            features = self.assemble(self.store.batch(part))
            for room, m in zip(kept, [features] if isinstance(features, Tensor) else features):
                room[int(part[0]) : int(part[-1]) + 1].copy_(m)
        self._kept = kept

    def own_batch(self, indices: Sequence[int] | Tensor) -> Any:
        """Features of images that this process holds, if several processes share the images."""
        return self.assemble(self.store.own_batch(indices))


class TrainingBatches:
    """Training batches on the device, as a collection that can be iterated repeatedly."""

    def __init__(self, source: ScaledFeatures, category: Tensor, rows: Tensor, batch_size: int):
        self.source, self.category, self.parts = source, category, torch.split(rows, batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> tuple[Any, Tensor]:
        part = self.parts[i]
        return on_device(self.source.batch(part), self.source.engine.device), self.category[part]


def channel_statistics(store: FeatureStore, rows: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation of each channel of each map over all cells of the images ``rows``, (C,) each."""
    totals = [torch.zeros(2, m.shape[1], dtype=torch.float64) for m in store.maps]
    for part in torch.split(torch.from_numpy(rows), 64):
        for total, m in zip(totals, store.batch(part)):
            m = m.double()  # the difference of squares below loses digits
            total += torch.stack([m.sum((0, 2, 3)), m.square().sum((0, 2, 3))])
    mean, scale = [], []
    for total, m in zip(totals, store.maps):
        first, second = total / (len(rows) * math.prod(m.shape[2:]))
        deviation = (second - first.square()).clamp(min=0).sqrt()
        # Rounding error of the difference of squares: a deviation below it is taken as 0.
        floor = 1e-6 * second.sqrt() + 1e-12
        # A constant channel is divided by more than 1 if its values are large: else rounding would outweigh the others.
        fallback = floor.clamp(min=1)
        mean.append(first.float())
        scale.append(torch.where(deviation > floor, deviation, fallback).float())
    return mean, scale
