"""Tiles of large images: their positions, their pixels, and stitching their maps to a map of the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from vqad._ignore import Ignored
from vqad.images import ImageSequence

# Default overlap, as a share of the side of a tile.
OVERLAP = 1 / 8
# Smallest weight of a cell at the border of a tile, as a share of the largest.
LEAST_WEIGHT = 0.01


class Box(NamedTuple):
    """Position and size of a tile in pixels of the image."""

    top: int
    left: int
    height: int
    width: int


class Tiling(NamedTuple):
    """How images are cut: into square tiles of ``size`` pixels a side that overlap by at least ``overlap``.

    Tiles are evenly spaced from border to border. If a side of the image is shorter than a tile, tiles cover all of it.
    """

    size: int
    overlap: int

    @classmethod
    def of(cls, tiles: Any) -> Tiling:
        """Create it from the parameter ``tiles``: a size, or size and overlap.

        Raises
        ------
        ValueError
            When the size is less than 32 pixels, or the overlap more than half of it.
        """
        given = (tiles, round(OVERLAP * tiles)) if isinstance(tiles, Integral) else tuple(tiles)
        is_two = len(given) == 2 and all(isinstance(v, Integral) for v in given)
        if not is_two or given[0] < 32 or not 0 <= given[1] <= given[0] / 2:
            raise ValueError(
                "tiles must be a size in pixels of at least 32, or (size, overlap) with an overlap of at most half the "
                f"size; got {tiles!r}."
            )
        return cls(int(given[0]), int(given[1]))

    def boxes(self, size: tuple[int, int]) -> list[Box]:
        """The tiles of an image of this height and width, row by row."""
        (tops, height), (lefts, width) = (self._along(side) for side in size)
        return [Box(top, left, height, width) for top in tops for left in lefts]

    def _along(self, side: int) -> tuple[list[int], int]:
        length = min(self.size, side)
        n = 1 if side <= self.size else math.ceil((side - self.overlap) / (self.size - self.overlap))
        return [round(k * (side - length) / max(1, n - 1)) for k in range(n)], length


class Tiles(ImageSequence):
    """Tiles of one image, which is decoded once and held in memory.

    Parameters
    ----------
    images : ImageSequence
    i : int
        Position of the image.
    boxes : sequence of Box
    """

    def __init__(self, images: ImageSequence, i: int, boxes: Sequence[Box]) -> None:
        pixels, mask = images.stored(i), images.mask(i)
        cut = [np.s_[top : top + height, left : left + width] for top, left, height, width in boxes]
        ignored = None if mask is None else Ignored(each=[mask[box] if mask[box].any() else None for box in cut])
        super().__init__([pixels[box] for box in cut], np.arange(len(boxes)), images._said, ignored)
        self.boxes, self._of = list(boxes), images.name(i)

    def name(self, i: int) -> str:
        """Name of the image, and the position of the tile in it."""
        box = self.boxes[int(self._indices[i])]
        return f"{self._of}, tile of {box.height} x {box.width} pixels at row {box.top}, column {box.left}"


class Stitched:
    """The map of an image, stitched from the maps of its tiles, which are blended where they overlap.

    Parameters
    ----------
    size : (height, width)
        Size of the image.
    boxes : sequence of Box
        Its tiles, all of one size.
    tiling : Tiling
    """

    def __init__(self, size: tuple[int, int], boxes: Sequence[Box], tiling: Tiling) -> None:
        self.size, self.boxes, self.tiling = size, boxes, tiling
        self.total: np.ndarray | None = None

    def add(self, tile: int, heat: np.ndarray) -> None:
        """Add the map (h, w) of a tile."""
        box = self.boxes[tile]
        if self.total is None:
            grid = [max(1, round(n * side / own)) for n, side, own in zip(heat.shape, self.size, box[2:])]
            self.total, self.weight = np.zeros(grid), np.zeros(grid)
        spans = zip(box[:2], box[2:], self.size, self.total.shape, heat.shape)
        (rows, down, fade_down), (columns, across, fade_across) = (self._along(*span) for span in spans)
        weight = np.outer(fade_down, fade_across)
        self.total[rows, columns] += weight * (down @ heat @ across.T)
        self.weight[rows, columns] += weight

    def map(self) -> np.ndarray:
        """The map of the image, float32; 0 where there is no tile."""
        if self.total is None:
            return np.zeros((1, 1), np.float32)
        made: np.ndarray = np.divide(self.total, self.weight, out=np.zeros_like(self.total), where=self.weight > 0)
        return made.astype(np.float32)

    def _along(self, start: int, length: int, side: int, n: int, cells: int) -> tuple[slice, np.ndarray, np.ndarray]:
        """Cells of the image whose centres lie in a tile, their interpolation from its cells, and their weights."""
        middle = (np.arange(n) + 0.5) * side / n - start
        inside = np.flatnonzero((middle >= 0) & (middle <= length))
        middle = middle[inside]
        place = np.clip(middle * cells / length - 0.5, 0, cells - 1)
        between = np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0, None)
        reach = max(1, self.tiling.overlap)
        fade = np.clip(np.minimum(middle, length - middle) / reach, LEAST_WEIGHT, 1)
        return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0), between, fade
