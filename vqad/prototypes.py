"""Prototypes: for each code of a detector, the nearest patch of the normal images, with a thumbnail."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqad._warn import warn
from vqad.explain import Explanation, known
from vqad.features import BackboneFeatures
from vqad.images import ImageSequence, check_images
from vqad.sampling import Sample
from vqad.scoring import Scorer, codes, stored_images
from vqad.source import MapSource
from vqad.store import FeatureArray
from vqad.streaming import read_ahead, readers
from vqad.tiling import Box, Tiles

__all__ = ["Prototype", "Prototypes"]

# Height and width of a thumbnail in pixels, and the largest number that a fit keeps: 8 MiB.
THUMBNAIL = 32
MAX_THUMBNAILS = 8 * 2**20 // (3 * THUMBNAIL**2)
# Thumbnails that each codebook of a category added later may always have.
THUMBNAILS_ADDED = 32
# A patch shows two cells along each side, or this share of the image's side if that is more.
PATCH_CELLS, PATCH_SHARE = 2, 1 / 7
# Images whose codes are in memory at a time.
_PART = 512


class Prototype(NamedTuple):
    """The patch of a normal image that is nearest to a code.

    Attributes
    ----------
    image : int
        Number of the image, in the order of `fit`.
    cell : (int, int)
        Row and column on the codebook's grid.
    distance : float
        Euclidean distance of that cell to the code.
    usage : int
        Number of cells of all normal images with this code.
    thumbnail : ndarray of shape (32, 32, 3), uint8, or None
        The cell and its surroundings; None if no thumbnail was kept.
    tile : vqad.tiling.Box or None
        For an image in tiles, the tile of the cell.
    """

    image: int
    cell: tuple[int, int]
    distance: float
    usage: int
    thumbnail: np.ndarray | None
    tile: Box | None = None


class Prototypes:
    """For each code, the nearest patch of the normal images, and the number of patches that it stands for.

    This is ``prototypes_`` of a fitted detector. Each codebook (see `Explanation` for their names) has K codes in each
    of G groups. In `HVQTransDetector` a group is a category, in the order of ``categories_``. In `VQFlowDetector` all
    categories of ``fit`` share the first group, and each category added by ``partial_fit`` has its own.

    Images are numbered in the order of ``fit``, including those that y left out; images of ``partial_fit`` continue the
    numbering. All normal images are used, including held-out ones. ``partial_fit`` adds the prototypes of new groups
    and keeps the existing ones.

    Thumbnails are 32 x 32 pixels of the image as the backbone sees it. A fit keeps at most 2,730 of them, 8 MiB, for
    the most used codes of each codebook and group. Groups added later get what is left of that, or 32 per codebook if
    that is more. Thumbnails are parts of training images, and `vqad.save` writes them: call `forget_thumbnails` first
    if you share the file but not the images.

    Attributes
    ----------
    n_images : int
        Number of images seen so far, including those left out.
    grid : dict of str to (int, int)
        Rows and columns of each codebook's grid of cells.
    image : dict of str to ndarray of shape (G, K), int64
        Number of the image with the nearest patch; -1 for unused codes.
    cell : dict of str to ndarray of shape (G, K, 2), int64
        Row and column of the nearest patch; -1 for unused codes.
    distance : dict of str to ndarray of shape (G, K), float32
        Euclidean distance of the nearest patch to the code; infinite for unused codes.
    usage : dict of str to ndarray of shape (G, K), int64
        Number of cells of all normal images with the code.
    slot : dict of str to ndarray of shape (G, K), int64
        Index of its thumbnail; -1 for none.
    tile : dict of str to ndarray of shape (G, K, 4), int64
        For images in tiles, top, left, height and width in pixels of the tile with the nearest patch; -1 for unused
        codes. Empty if images are not cut.
    thumbnails : ndarray of shape (n_thumbnails, 32, 32, 3), uint8

    See Also
    --------
    vqad.display.CodebookDisplay : Pictures of the most used codes.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.datasets import make_textured_parts
    >>> parts = make_textured_parts(n_normal=20, n_anomalous=1, categories=["tile"], image_size=64, random_state=0)
    >>> detector = HVQTransDetector(image_size=64, d_model=16, n_codes=8, max_iter=1, false_alarm_rate=0.2)
    >>> detector = detector.fit(parts.images[:20])
    >>> explanation = detector.explain(parts.images[20:])[0]
    >>> prototype = detector.prototypes_.of(explanation, "level_0")  # what the worst cell was turned into
    >>> prototype.thumbnail.shape
    (32, 32, 3)
    """

    def __init__(self) -> None:
        self.n_images = 0
        self.grid: dict[str, tuple[int, int]] = {}
        self.image: dict[str, np.ndarray] = {}
        self.cell: dict[str, np.ndarray] = {}
        self.distance: dict[str, np.ndarray] = {}
        self.usage: dict[str, np.ndarray] = {}
        self.slot: dict[str, np.ndarray] = {}
        self.tile: dict[str, np.ndarray] = {}
        self.thumbnails = np.empty((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} ({(u > 0).sum()} of {u.size} codes used)" for name, u in self.usage.items())
        return f"<{type(self).__name__} of {sizes}; {len(self.thumbnails)} thumbnails>"

    @property
    def codebooks(self) -> tuple[str, ...]:
        """Names of the codebooks."""
        return tuple(self.usage)

    @property
    def n_groups(self) -> int:
        """Number of groups of codes in each codebook."""
        return max(map(len, self.usage.values()), default=0)

    def get(self, codebook: str, code: int, group: int = 0) -> Prototype | None:
        """The prototype of a code.

        Parameters
        ----------
        codebook : str
        code : int
        group : int, default=0

        Returns
        -------
        Prototype or None
            None if no normal image has the code.

        Raises
        ------
        ValueError
            When there is no such codebook, group or code.
        """
        n_groups, n_codes = known(self.usage, codebook).shape
        if not (0 <= group < n_groups and 0 <= code < n_codes):
            raise ValueError(
                f"codebook {codebook!r} has codes 0..{n_codes - 1} in groups 0..{n_groups - 1}; got code={code!r}, "
                f"group={group!r}."
            )
        if self.image[codebook][group, code] < 0:
            return None
        slot, (row, col) = self.slot[codebook][group, code], self.cell[codebook][group, code].tolist()
        return Prototype(
            int(self.image[codebook][group, code]),
            (row, col),
            float(self.distance[codebook][group, code]),
            int(self.usage[codebook][group, code]),
            None if slot < 0 else self.thumbnails[slot],
            Box(*self.tile[codebook][group, code].tolist()) if codebook in self.tile else None,
        )

    def of(self, explanation: Explanation, codebook: str, cell: tuple[int, int] | None = None) -> Prototype | None:
        """The prototype of the code that was assigned to a cell of an image.

        Parameters
        ----------
        explanation : Explanation
        codebook : str
        cell : (int, int), default=None
            Row and column on the map; None: ``explanation.worst_cell``.

        Returns
        -------
        Prototype or None
            None if no normal image has the code.
        """
        at = explanation.cell_of(codebook, cell)
        return self.get(codebook, int(explanation.codes[codebook][at]), explanation.group)

    def most_used(self, codebook: str, group: int = 0) -> np.ndarray:
        """Codes in use by normal images, the most used first.

        Parameters
        ----------
        codebook : str
        group : int, default=0

        Returns
        -------
        code : ndarray of shape (n_used,), int64
        """
        usage = known(self.usage, codebook)[group]
        return np.argsort(-usage, kind="stable")[: int((usage > 0).sum())]

    def box(self, codebook: str, cell: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The part of an image that a thumbnail shows: a cell and its surroundings.

        Parameters
        ----------
        codebook : str
        cell : (int, int)
            Row and column on the codebook's grid, as returned by `Explanation.cell_of`.
        shape : (H, W) or (H, W, C)
            Shape of the image.

        Returns
        -------
        top, left, height, width : int
            In pixels.
        """
        grid = known(self.grid, codebook)
        if not all(0 <= k < n for k, n in zip(cell, grid)):
            raise ValueError(f"cell must be a row and a column on the grid of {grid[0]} x {grid[1]}; got {cell!r}.")
        (top, height), (left, width) = (_extent(*along) for along in zip(cell, grid, shape[:2]))
        return top, left, height, width

    def patch(self, image: Any, codebook: str, cell: tuple[int, int]) -> np.ndarray:
        """The same crop of another image, to compare with a thumbnail.

        Parameters
        ----------
        image : array of shape (H, W) or (H, W, C), PIL image or path
            In any form that detectors take.
        codebook, cell
            As for `box`.

        Returns
        -------
        patch : ndarray of shape (32, 32, 3), uint8
        """
        pixels = check_images([image]).pixels(0)
        return _cut(torch.from_numpy(pixels).permute(2, 0, 1), self.box(codebook, cell, pixels.shape))

    def forget_thumbnails(self) -> None:
        """Delete all thumbnails. The positions of the prototypes in the images are kept."""
        self.thumbnails = self.thumbnails[:0].copy()
        self.slot = {name: np.full_like(slot, -1) for name, slot in self.slot.items()}


# ---- finding prototypes --------------------------------------------------------------------------


def add_prototypes(before: Prototypes, scorer: Scorer, sample: Sample, source: MapSource) -> Prototypes:
    """Add prototypes of new groups of codes, from a sample of the images of ``source`` or of their tiles."""
    index = sample.index
    first, model = before.n_groups, scorer.model
    searches = {name: _Search(q.n_groups - first, q.n_codes) for name, q in model.codebooks().items()}
    group = np.where(index >= 0, model.group_of(np.maximum(index, 0)), -1)
    places = np.flatnonzero(group >= first)
    places = places[np.argsort(index[places], kind="stable")]
    grid = dict(before.grid)
    for part in np.split(places, range(_PART, len(places), _PART)):
        if not len(part):
            continue
        found = stored_images(scorer, sample.store, part, index[part], source.engine, codes)
        for name, search in searches.items():
            code, distance = found[f"code {name}"], found[f"distance {name}"]
            grid[name] = code.shape[1:]
            search.add(part, group[part] - first, code, distance)
    made = Prototypes()
    made.n_images, made.grid = before.n_images + len(source), grid
    slot, thumbnails = _keep_thumbnails(sample, source, grid, searches, len(before.thumbnails))
    for name, search in searches.items():
        place, is_found = search.image.copy(), search.image >= 0
        search.image[is_found] = before.n_images + sample.image[place[is_found]]
        if sample.boxes is not None:
            tile = np.full((*place.shape, 4), -1, np.int64)
            tile[is_found] = np.array(sample.boxes)[place[is_found]]
            _append(made.tile, before.tile, name, tile)
        for attribute in ("image", "cell", "distance", "usage"):
            _append(getattr(made, attribute), getattr(before, attribute), name, getattr(search, attribute))
        _append(made.slot, before.slot, name, slot[name])
    made.thumbnails = np.concatenate([before.thumbnails, thumbnails])
    return made


def _append(made: dict, before: dict, name: str, new: np.ndarray) -> None:
    made[name] = np.concatenate([before[name], new]) if name in before else new


class _Search:
    """The nearest cell to each code (G, K), and its number of cells, over images that come in parts."""

    def __init__(self, n_groups: int, n_codes: int):
        shape = (n_groups, n_codes)
        self.image = np.full(shape, -1, np.int64)
        self.cell = np.full((*shape, 2), -1, np.int64)
        self.distance = np.full(shape, np.inf, np.float32)
        self.usage = np.zeros(shape, np.int64)

    def add(self, image: np.ndarray, group: np.ndarray, code: np.ndarray, distance: np.ndarray) -> None:
        """Process cells (n, h, w); of equally near ones the first is kept."""
        n_groups, n_codes = self.usage.shape
        flat = (group[:, None, None] * n_codes + code).ravel()
        self.usage += np.bincount(flat, minlength=n_groups * n_codes).reshape(self.usage.shape)
        order = np.lexsort((distance.ravel(), flat))
        found, first = np.unique(flat[order], return_index=True)
        place = order[first]
        at = np.divmod(found, n_codes)
        nearer = distance.ravel()[place] < self.distance[at]
        place, at = place[nearer], (at[0][nearer], at[1][nearer])
        which, row, col = np.unravel_index(place, code.shape)
        self.distance[at] = distance.ravel()[place]
        self.image[at] = image[which]
        self.cell[at] = np.stack([row, col], 1)


# ---- thumbnails ----------------------------------------------------------------------------------


def _keep_thumbnails(
    sample: Sample, source: MapSource, grid: dict[str, tuple[int, int]], new: dict[str, _Search], n_before: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Indices of the thumbnails of each codebook (G, K), and the thumbnails.

    Images are read a second time, because only now is it known which patches to keep.
    """
    slot = {name: np.full_like(search.image, -1) for name, search in new.items()}
    empty = np.empty((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)
    if isinstance(source.data, FeatureArray):
        return slot, empty
    chosen = _choose({name: search.usage for name, search in new.items()}, n_before)
    of_image: dict[int, list[tuple[str, int, int]]] = {}
    for name, group, code in chosen:
        of_image.setdefault(int(new[name].image[group, code]), []).append((name, group, code))
    kept = []
    for i, pixels in _read(sample, source, source.data, sorted(of_image)):
        for name, group, code in of_image[i]:
            slot[name][group, code] = n_before + len(kept)
            cell = zip(new[name].cell[group, code].tolist(), grid[name], pixels.shape[1:])
            (top, height), (left, width) = (_extent(*along) for along in cell)
            kept.append(_cut(pixels, (top, left, height, width)))
    return slot, np.stack(kept) if kept else empty


def _choose(usage: dict[str, np.ndarray], n_before: int) -> list[tuple[str, int, int]]:
    """Codebook, group and code of each thumbnail: the most used code of each, then the second, and so on."""
    n_groups = sum(len(u) for u in usage.values())
    room = max(MAX_THUMBNAILS - n_before, THUMBNAILS_ADDED * n_groups) if n_before else MAX_THUMBNAILS
    ranked = []
    for name, counts in usage.items():
        for group, count in enumerate(counts):
            used = np.argsort(-count, kind="stable")[: int((count > 0).sum())]
            ranked.extend((rank, name, group, code) for rank, code in enumerate(used.tolist()))
    ranked.sort(key=lambda choice: choice[0])
    return [(name, group, code) for _, name, group, code in ranked[:room]]


def _read(sample: Sample, source: MapSource, data: ImageSequence, numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Rows of the sample with pixels (3, H, W) of these images, or tiles, as the backbone sees them."""
    seen = source.features.size_ if isinstance(source.features, BackboneFeatures) else None

    boxes_of: dict[int, list[int]] = {}
    for i in numbers:
        boxes_of.setdefault(int(sample.image[i]), []).append(i)

    @lru_cache(1)  # those of one image come one after the other
    def tiles(k: int) -> Tiles:
        return Tiles(data, k, [sample.boxes[i] for i in boxes_of[k]])

    def read(i: int) -> tuple[int, Tensor | Exception]:
        try:
            images, k = data, int(sample.image[i])
            if sample.boxes is not None:
                images, k = tiles(k), boxes_of[k].index(i)
            if seen is not None:
                return i, images.load([k], seen)[0]
            return i, torch.from_numpy(images.pixels(k)).permute(2, 0, 1)
        except Exception as error:  # a caller's own collection may raise anything; do not lose the finished fit
            return i, error

    n_threads = readers(source.n_jobs) if data.reads_in_threads and sample.boxes is None else 0
    failed = []
    for i, pixels in read_ahead(read, numbers, n_threads, n_threads):
        if isinstance(pixels, Tensor):
            yield i, pixels
        else:
            failed.append(pixels)
    if failed:
        warn(
            f"{len(failed)} images could not be read a second time, so their prototypes have no thumbnails. "
            f"The first error: {failed[0]!r}"
        )


def _extent(cell: int, n_cells: int, side: int) -> tuple[int, int]:
    """Start and length in pixels of a patch around a cell, inside the image."""
    length = round(side * min(1.0, max(PATCH_CELLS / n_cells, PATCH_SHARE)))
    length = max(1, length)
    start = round((cell + 0.5) * side / n_cells - length / 2)
    return min(max(start, 0), side - length), length


def _cut(pixels: Tensor, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, height, width = box
    patch = pixels[:, top : top + height, left : left + width]
    if patch.shape[1:] != (THUMBNAIL, THUMBNAIL):
        size = (THUMBNAIL, THUMBNAIL)
        patch = F.interpolate(patch[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    return (patch.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
