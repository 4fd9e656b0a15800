"""Pixel counts of masks and maps, from which all pixel metrics are computed.

All curves (ROC, precision-recall, per-region overlap) bend only at the scores of defect pixels, of which there are
few. Normal pixels, of which there are many, are only counted: how many are below each distinct score of a defect pixel
and how many are equal to it. They are counted chunk by chunk: a chunk is sorted, and the sorted distinct defect scores
are looked up in it. (Sorting float32 runs at 7e7 pixels per second with numpy >= 2; looking up the pixels among the
defect scores is five times slower.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

CHUNK_PIXELS = 2**24

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_END = object()


@dataclass(frozen=True)
class PixelCounts:
    """Pixels of a set of images, counted at every distinct score of a defect pixel.

    Attributes
    ----------
    score : ndarray of shape (k,), float32 or float64
        Distinct scores of defect pixels, ascending.
    defect : ndarray of shape (k,), int64
        Defect pixels with exactly that score.
    normal_below, normal_tied : ndarray of shape (k,), int64
        Normal pixels with a lower score and with exactly that score.
    n_normal : int
        Normal pixels of the set.
    overlap : ndarray of shape (k,), float64, or None
        Mean over the defect regions of the share of their pixels with exactly that score. Sums to 1.
    """

    score: NDArray[Any]
    defect: NDArray[np.int64]
    normal_below: NDArray[np.int64]
    normal_tied: NDArray[np.int64]
    n_normal: int
    overlap: NDArray[np.float64] | None


def count_pixels(
    masks: Iterable[Any],
    maps: Iterable[Any],
    *,
    regions: bool = False,
    groups: NDArray[np.intp] | None = None,
    normal: NDArray[np.bool_] | None = None,
) -> list[PixelCounts]:
    """Count the pixels of each group of images.

    Masks and maps that can be iterated twice are read twice and not held in memory. If either is an iterator, both are
    read once, and the scores of the normal pixels are held.

    Parameters
    ----------
    masks, maps : iterable of (H_i, W_i) arrays
        A mask of None leaves its image out.
    regions : bool
        Also find the connected regions of the masks.
    groups : ndarray of shape (n_images,), or None
        Group of each image, 0, 1, ...; None is one group.
    normal : ndarray of shape (n_images,), or None
        Images known to be normal: their mask may be None, and must not mark a defect pixel.
    """
    n_groups = 1 if groups is None else int(groups.max()) + 1
    defects = [_DefectPixels(regions) for _ in range(n_groups)]
    once = isinstance(masks, Iterator) or isinstance(maps, Iterator)
    held: list[tuple[int, NDArray[Any]]] = []
    for i, mask, scores in read_pairs(masks, maps, normal):
        group = _group(groups, i)
        if mask is not None:
            defects[group].add(mask, scores)
        if once:
            held.append((group, _normal_pixels(mask, scores, copy=True)))
    # A flush looks up every distinct score, so a chunk has at least as many pixels.
    distinct = [d.distinct() for d in defects]
    counters = [_NormalCounter(scores, max(CHUNK_PIXELS // n_groups, scores.size)) for scores in distinct]
    if once:
        held.reverse()
        while held:
            group, values = held.pop()
            counters[group].add(values)
    else:
        for i, mask, scores in read_pairs(masks, maps, normal):
            counters[_group(groups, i)].add(_normal_pixels(mask, scores))
    return [defect.counts(counter) for defect, counter in zip(defects, counters)]


class _DefectPixels:
    """Collects the defect pixels of one group, and their weight in the per-region overlap."""

    def __init__(self, regions: bool) -> None:
        self._scores: list[NDArray[Any]] = []
        self._weights: list[NDArray[np.float64]] | None = [] if regions else None

    def add(self, mask: NDArray[np.bool_], scores: NDArray[Any]) -> None:
        self._scores.append(scores[mask])
        if self._weights is not None:
            region = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)[0][mask]
            self._weights.append(1.0 / np.bincount(region)[region])

    def distinct(self) -> NDArray[Any]:
        scores = np.concatenate(self._scores) if self._scores else np.empty(0, np.float32)
        self._scores = []
        if self._weights is None:
            scores.sort()
        else:
            order = np.argsort(scores)
            scores = scores[order]
        starts = np.flatnonzero(np.concatenate([scores[:1] == scores[:1], scores[1:] != scores[:-1]]))
        self.score = scores[starts]
        self.defect = np.diff(starts, append=scores.size)
        self.overlap = None
        if self._weights is not None:
            weights = np.concatenate(self._weights)[order] if self._weights else np.empty(0)
            self._weights = []
            self.overlap = np.add.reduceat(weights, starts) if starts.size else weights
            self.overlap /= self.overlap.sum()
        return self.score

    def counts(self, normal: _NormalCounter) -> PixelCounts:
        normal.flush()
        return PixelCounts(self.score, self.defect, normal.below, normal.tied, normal.total, self.overlap)


class _NormalCounter:
    """Counts normal pixels below and at each of the given ascending scores, a chunk at a time."""

    def __init__(self, score: NDArray[Any], chunk_pixels: int) -> None:
        self._score = score
        self._chunk_pixels = max(chunk_pixels, 1)
        self._buffer = np.empty(0, np.float32)
        self._filled = 0
        self.below = np.zeros(score.size, np.int64)
        self.tied = np.zeros(score.size, np.int64)
        self.total = 0

    def add(self, values: NDArray[Any]) -> None:
        self.total += values.size
        if values.dtype != self._buffer.dtype or not self._buffer.size:
            self.flush()
            self._buffer = np.empty(self._chunk_pixels, values.dtype)
        done = 0
        while done < values.size:
            piece = values[done : done + self._chunk_pixels - self._filled]
            self._buffer[self._filled : self._filled + piece.size] = piece
            self._filled += piece.size
            done += piece.size
            if self._filled == self._chunk_pixels:
                self.flush()

    def flush(self) -> None:
        chunk = self._buffer[: self._filled]
        self._filled = 0
        if not chunk.size or not self._score.size:
            return
        chunk.sort()
        below = np.searchsorted(chunk, self._score)
        self.below += below
        tied = np.flatnonzero(chunk[np.minimum(below, chunk.size - 1)] == self._score)
        self.tied[tied] += np.searchsorted(chunk, self._score[tied], side="right") - below[tied]


def _normal_pixels(mask: NDArray[np.bool_] | None, scores: NDArray[Any], copy: bool = False) -> NDArray[Any]:
    if mask is not None:
        return scores[~mask]
    return scores.flatten() if copy else scores.ravel()


def _group(groups: NDArray[np.intp] | None, i: int) -> int:
    return 0 if groups is None else int(groups[i])


def read_pairs(
    masks: Iterable[Any], maps: Iterable[Any], normal: NDArray[np.bool_] | None = None
) -> Iterator[tuple[int, NDArray[np.bool_] | None, NDArray[Any]]]:
    """Yield index, mask and scores of every image whose pixels are known; the mask of no defects is None."""
    read = 0
    for i, (mask, scores) in enumerate(zip_longest(each(masks), each(maps), fillvalue=_END)):
        if mask is _END or scores is _END:
            short, long = ("masks", "maps") if mask is _END else ("maps", "masks")
            raise ValueError(f"masks and maps must have the same length, but there are {i} {short} and more {long}")
        if normal is not None and i >= normal.size:
            raise ValueError(f"y_true has {normal.size} images, but masks and maps have more")
        read = i + 1
        is_normal = normal is not None and bool(normal[i])
        if mask is None and not is_normal:
            continue
        scores = _check_map(i, scores)
        if mask is not None:
            mask = _check_mask(i, mask, scores)
            if not mask.any():
                mask = None
            elif is_normal:
                raise ValueError(
                    f"image {i} is labelled normal (+1), but its mask marks {np.count_nonzero(mask)} defect pixels"
                )
        yield i, mask, scores
    if normal is not None and read != normal.size:
        raise ValueError(f"y_true has {normal.size} images, but masks and maps have {read}")


def each(images: Any) -> Iterator[Any]:
    """Iterate over images; a lazy collection may have only a length and indexing."""
    if hasattr(images, "__iter__") or not hasattr(images, "__len__"):
        return iter(images)
    item: Callable[[int], Any] = images.__getitem__
    return (item(i) for i in range(len(images)))


def _check_map(i: int, image: Any) -> NDArray[Any]:
    scores: NDArray[Any] = np.asarray(image)
    if scores.ndim != 2:
        raise ValueError(f"map {i} must have shape (H, W), got {scores.shape}; for one image pass a list of one map")
    if scores.dtype.kind not in "fiu" or scores.dtype.itemsize > 8:
        raise ValueError(f"map {i} must hold real numbers of at most 64 bits, got dtype {scores.dtype}")
    if scores.dtype.kind != "f":
        return scores.astype(np.float64)
    bad = scores.size - np.count_nonzero(np.isfinite(scores))
    if bad:
        raise ValueError(f"map {i} must be finite, but {bad} of its {scores.size} pixels are NaN or infinite")
    return scores.astype(np.float64 if scores.dtype.itemsize == 8 else np.float32, copy=False)


def _check_mask(i: int, image: Any, scores: NDArray[Any]) -> NDArray[np.bool_]:
    mask: NDArray[Any] = np.asarray(image)
    if mask.shape != scores.shape:
        raise ValueError(f"mask {i} has shape {mask.shape} but map {i} has shape {scores.shape}")
    if mask.dtype == bool:
        return mask
    marked: NDArray[np.bool_] = mask != 0
    if mask.dtype.kind not in "iu" or not (np.all(mask[marked] == 1) or np.all(mask[marked] == 255)):
        raise ValueError(
            f"mask {i} must be boolean, True on defect pixels (integers 0/1 or 0/255 are accepted too), but has "
            f"dtype {mask.dtype} and values from {mask.min()} to {mask.max()}; if every nonzero value marks "
            "a defect, pass mask != 0"
        )
    return marked
