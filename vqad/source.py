"""MapSource: feature maps of images, or given features, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vqad import collective
from vqad.copies import Watched
from vqad.engine import Engine, side_by_side
from vqad.features import BackboneFeatures, transformer_maps
from vqad.images import ImageSequence
from vqad.nn.draws import drawing
from vqad.routing import describe
from vqad.store import FeatureArray, FeatureStore
from vqad.tiling import Box, Tiles, Tiling


class MapSource:
    """Feature maps of images or of given features.

    Parameters
    ----------
    data : ImageSequence or FeatureArray
    features : BackboneFeatures, transformer or None
        Fitted backbone; None for given features.
    engine : Engine
    map_shape : (1, h, w, C), optional
        Expected output of a caller's own transformer for one image.
    ignore : ndarray of shape (h, w), bool, optional
        Mask of what to ignore in all images.
    tiles : (int, int), optional
        Size and overlap of tiles. `chunks` and `extract` then give maps of a small view of each whole image, from which
        its category is inferred, and `tile_chunks` those of its tiles.
    memory, n_jobs : optional
        As the parameters of these names.
    **override
        ``device`` and ``precision`` of the backbone instead of its own.
    """

    def __init__(
        self,
        data: ImageSequence | FeatureArray,
        features: Any,
        engine: Engine,
        *,
        map_shape: tuple[int, ...] | None = None,
        ignore: np.ndarray | None = None,
        tiles: tuple[int, int] | None = None,
        memory: Any = None,
        n_jobs: int | None = None,
        **override: Any,
    ) -> None:
        self.data, self.features, self.engine = data, features, engine
        self.map_shape, self.ignore = map_shape, ignore
        if ignore is not None and isinstance(data, ImageSequence):
            self.data = data.ignoring(ignore)
        self.tiling = None if tiles is None else Tiling(*tiles)
        self.memory, self.n_jobs, self.override = memory, n_jobs, override

    def __len__(self) -> int:
        return len(self.data)

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Pixels per cell of each map, if a timm backbone gives several; else None."""
        features = self.features
        return features.strides_ if isinstance(features, BackboneFeatures) and not features.merge else None

    @property
    def has_deep_view(self) -> bool:
        """Whether the last map comes from a smaller view of the image."""
        return isinstance(self.features, BackboneFeatures) and self.features.deep_size_ is not None

    @property
    def ignores(self) -> bool:
        """Whether parts of images are ignored; then an extra first map has the share of each cell that is not."""
        return isinstance(self.data, ImageSequence) and self.data.ignored is not None

    def mask(self, i: int) -> np.ndarray | None:
        """Mask of what to ignore in image ``i``, at its own size; None for nothing."""
        return self.data.mask(i) if isinstance(self.data, ImageSequence) else None

    def of_backbone(self, maps: Sequence[Any]) -> Sequence[Any]:
        """The maps from the backbone, without the extra first one."""
        return maps[int(self.ignores) :]

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Yield rows and maps (n, C_k, h_k, w_k) of each chunk, on the device."""
        yield from self._chunks(self.data, rows)

    def boxes(self, i: int) -> list[Box]:
        """The tiles of image ``i`` that are not ignored completely."""
        images, mask = cast(ImageSequence, self.data), self.mask(i)
        boxes = cast(Tiling, self.tiling).boxes(images.size(i))
        return boxes if mask is None else [b for b in boxes if not mask[b[0] : b[0] + b[2], b[1] : b[1] + b[3]].all()]

    def tile_chunks(self, i: int, boxes: list[Box]) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """Yield numbers and maps of each chunk of tiles of image ``i``, on the device."""
        tiles = Tiles(cast(ImageSequence, self.data), i, boxes)
        for part, maps in self._chunks(tiles, np.arange(len(boxes))):
            if self.ignores and tiles.ignored is None:  # only other images have masks
                shape = (len(part), 1, *maps[0].shape[2:])
                maps = [torch.ones(shape, device=maps[0].device), *maps]
            yield part, maps

    def _chunks(
        self, data: ImageSequence | FeatureArray, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        for part, maps in self._maps(data, rows):
            if isinstance(data, ImageSequence) and data.ignored is not None:
                grid = (maps[0].shape[2], maps[0].shape[3])
                seen = torch.stack([data.seen(i, grid) for i in part.tolist()])
                maps = [seen.to(maps[0].device), *maps]
            yield part, maps

    def _maps(self, data: ImageSequence | FeatureArray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        device, how = self.engine.device, {"memory": self.memory, "n_jobs": self.n_jobs}
        if isinstance(data, FeatureArray):
            yield from data.chunks(rows, device)
        elif isinstance(self.features, BackboneFeatures):
            yield from self.features.iter_maps(data, rows, **how, **self.override)
        else:
            for part, maps in transformer_maps(self.features, data, rows, device, self.map_shape, **how):
                if self.map_shape is None:
                    self.map_shape = (1, *maps[0].shape[2:], maps[0].shape[1])
                yield part, maps

    def side_by_side(self, work: Callable[[np.ndarray], Any], rows: np.ndarray) -> Iterator[Any]:
        """``work`` on parts of ``rows``, in threads unless the caller's own code reads images or computes maps."""
        is_ready = isinstance(self.data, FeatureArray)
        own = not is_ready and not isinstance(self.features, BackboneFeatures)
        device = self.engine.device
        chunk = self.data.chunk_size(device) if isinstance(self.data, FeatureArray) else 1
        yield from side_by_side(work, rows, device, wanted=self.data.reads_in_threads and not own, chunk=chunk)

    def drawing(self) -> AbstractContextManager[None]:
        """Context for computing maps: a caller's own transformer may draw random numbers."""
        own = self.features is not None and not isinstance(self.features, BackboneFeatures)
        return drawing() if own else nullcontext()

    def watch(self) -> None:
        """Keep small pictures of images when they are read, to detect copies."""
        if isinstance(self.data, ImageSequence) and not isinstance(self.data, Watched):
            self.data = Watched(self.data)

    def extract(self, rows: np.ndarray, verbose: int = 0) -> tuple[FeatureStore, np.ndarray]:
        """Features and descriptors of the images ``rows``; each image passes through the backbone once.

        If several processes learn together, each holds the features of its share, and all get all descriptors.
        """
        crew = collective.crew()
        if crew is None:
            return self._extract(rows, verbose)
        if len(rows) < crew.size:
            raise ValueError(f"{crew.size} processes need at least {crew.size} images; got {len(rows)}.")
        own, descriptor = self._extract(rows[crew.rank :: crew.size], verbose if crew.rank == 0 else 0)
        whole = np.empty((len(rows), *descriptor.shape[1:]), descriptor.dtype)
        for rank, part in enumerate(collective.of_all(descriptor)):
            whole[rank :: crew.size] = part
        if isinstance(self.data, Watched):
            self.data.join(collective.of_all(self.data.pictures))
        self.map_shape = collective.agreed(self.map_shape)
        return collective.SharedStore(own, len(rows), crew), whole

    def _extract(self, rows: np.ndarray, verbose: int) -> tuple[FeatureStore, np.ndarray]:
        # In float32 even if the model computes in bfloat16: Gaussians use directions of little variance.
        store = FeatureStore(len(rows))
        self.watch()
        bar = tqdm(total=len(rows), desc="features", unit="image", disable=not verbose)

        def keep(places: np.ndarray) -> list[np.ndarray]:
            descriptor, done = [], 0
            for part, maps in self.chunks(rows[places]):
                store.write(places[done : done + len(part)], maps)
                descriptor.append(describe(self.of_backbone(maps)).cpu().numpy())
                done += len(part)
                bar.update(len(part))
            return descriptor

        with bar:
            descriptors = list(self.side_by_side(keep, np.arange(len(rows))))
        return store, np.concatenate(descriptors)
