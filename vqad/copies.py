"""Copies of images, exact and near ones, which count as one piece wherever images are split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.stats import chi2
from torch import Tensor

from vqad._checks import check_category
from vqad._warn import warn
from vqad.images import ImageSequence, check_images

# Side of the small grey pictures that near copies are known by, in pixels.
SIDE = 16
# What those are made of where no backbone sees the images.
LOOK = (256, 256)
# Directions in which they are compared; and how many images of a category there are for each, at least.
DIRECTIONS, IMAGES_EACH = 16, 4
# Images that the directions come from at most.
MAX_IMAGES = 2000
# How likely it may be that any two images of a category lie so near to each other by chance.
CHANCE = 1e-3
# And at most this share of how far two images typically are apart. Of seven sets of real products, images saved as JPEG
# of quality 60, or at half their size, lie at 0.034 from themselves at most, with grey levels one off by chance at
# 0.07; of 437 images one pair of two lies nearer than 0.057, at 0.027.
NEAREST = 0.035
# Deviations of a picture that are less than this, a quarter of a grey level in all its pixels, say nothing.
LEAST = 1e-3


def find_copies(X: Any, *, category: ArrayLike | None = None) -> np.ndarray:
    """Which images are copies of others, exactly or nearly: saved again, made smaller, frames of a film.

    Detectors look for them themselves, in all that they hold out. In splits of one's own they belong on one side:
    ``InlierKFold().split(X, y, groups=find_copies(X))``.

    Parameters
    ----------
    X : images
        Any of the forms that the detectors take.
    category : array-like of shape (n,), default=None
        The kind of object on each image. Near copies are told within a kind, by what is usual there: where several
        come without it, fewer are found, or images of a kind that hardly differ may be taken for copies.

    Returns
    -------
    groups : ndarray of shape (n,), int64
        One number for all that shows one thing.

    Examples
    --------
    >>> import numpy as np
    >>> from vqad.copies import find_copies
    >>> X = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    >>> find_copies(X[[0, 1, 0, 2]]).tolist()
    [0, 1, 0, 2]
    """
    images = check_images(X)
    rows, given = np.arange(len(images)), check_category(category, len(images))
    kind = np.zeros(len(rows), int) if given is None else np.unique(given, return_inverse=True)[1]
    same = np.unique([images.digest(i) for i in rows.tolist()], return_inverse=True)[1]
    found = merged(None, same, near_copies(np.stack([_small(images.load([i], LOOK)[0]) for i in rows.tolist()]), kind))
    return rows.astype(np.int64) if found is None else found


def pieces(
    images: Any, rows: np.ndarray, groups: np.ndarray | None, descriptor: np.ndarray, index: np.ndarray, seed: int
) -> np.ndarray | None:
    """Number of the piece of each image, (n,): copies of each other, exact or near, and images of a group, are one.

    None where every image is a piece of its own.

    Parameters
    ----------
    images : Watched, or ready-made features
        Of features those that are equal to the last bit alone are copies.
    rows : ndarray of shape (n,)
        Which of them.
    groups : ndarray of shape (n,) or None
    descriptor : ndarray of shape (n, D)
    index : ndarray of shape (n,)
        Category of each; -1 for those to be left out.

    Warns
    -----
    UserWarning
        Of copies, with their number.
    """
    exact, near = exact_copies(descriptor), []
    if isinstance(images, Watched):
        picture, known = images.small_pictures(rows)
        near = [(int(known[i]), int(known[j])) for i, j in near_copies(picture, index[known], seed)]
    alone, found = merged(None, exact, near), merged(groups, exact, near)
    n, n_different = len(rows), len(rows) if alone is None else len(np.unique(alone))
    if n_different < n:
        warn(
            f"Of {n} images {n - n_different} are copies of others, exactly or nearly. What shows one thing counts as "
            "one piece: such images are held out together, and thresholds rest on one of each."
        )
    return found


def exact_copies(descriptor: np.ndarray) -> np.ndarray:
    """Number of the piece of each of n images, (n,): those of one descriptor (n, D), to the last bit, are one.

    What a backbone makes of an image does not depend on the others, and of other pixels it is another.
    """
    rows = np.ascontiguousarray(descriptor)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    piece: np.ndarray = np.unique(whole, return_inverse=True)[1]
    return piece


class Watched(ImageSequence):
    """The same images, of which small grey pictures are kept of those that are read."""

    def __init__(self, images: ImageSequence) -> None:
        vars(self).update(vars(images))
        self._small: dict[int, np.ndarray] = {}

    def load(self, indices: Any, size: tuple[int, int]) -> Tensor:
        """As of any `ImageSequence`."""
        batch = super().load(indices, size)
        for i, image in zip(np.asarray(indices, dtype=np.intp).tolist(), batch):
            self._small[i] = _small(image)
        return batch

    def views(self, i: int, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """As of any `ImageSequence`."""
        views = super().views(i, sizes)
        self._small[int(i)] = _small(views[0][0])
        return views

    def pixels(self, i: int) -> np.ndarray:
        """As of any `ImageSequence`."""
        pixels = super().pixels(i)
        self._small[int(i)] = _small(torch.from_numpy(pixels).permute(2, 0, 1))
        return pixels

    @property
    def pictures(self) -> dict[int, np.ndarray]:
        """Those that are kept, by the number of the image."""
        return self._small

    def join(self, pictures: Iterable[dict[int, np.ndarray]]) -> None:
        """Keep those too that other processes have made."""
        for some in pictures:
            self._small.update(some)

    def small_pictures(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (m, 256) of some images, and which of them these are of.

        Those that were not read, as their features were found elsewhere, are read now, but for a caller's own
        collection.
        """
        if self.reads_in_threads:
            for i in rows.tolist():
                if i not in self._small:
                    self.load([i], (SIDE, SIDE))
        known = np.array([k for k, i in enumerate(rows.tolist()) if i in self._small], dtype=np.intp)
        return np.stack([self._small[i] for i in rows[known].tolist()] or [np.empty(0)]), known


def _small(image: Tensor) -> np.ndarray:
    """Of an image (C, H, W) a grey one, flattened."""
    grey = image.mean(0, keepdim=True)[None]
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True).flatten().numpy()


def near_copies(picture: np.ndarray, index: np.ndarray, seed: int = 0) -> list[tuple[int, int]]:
    r"""Pairs of images of one category that show one thing: saved again, made smaller, frames of a film.

    In the main directions in which small pictures of a category differ, each in units of its deviation, two of n images
    that are independent and normal lie r apart or less with a probability of :math:`P(\chi^2_k \le r^2/2)`. Nearer
    than any of the n (n - 1) / 2 pairs would be but once in a thousand such sets, and than a thirtieth of the typical
    distance, are copies. A tree finds them in n log n steps, where they are few.

    Parameters
    ----------
    picture : ndarray of shape (n, D)
    index : ndarray of shape (n,)
        Category of each; of those with -1 none is looked at.
    """
    pairs: list[tuple[int, int]] = []
    for c in np.unique(index[index >= 0]):
        rows = np.flatnonzero(index == c)
        same = exact_copies(picture[rows])
        pairs += [(int(rows[i]), int(rows[j])) for i, j in _chain(same)]
        # One of each: copies would make the deviations smaller.
        rows = rows[np.sort(np.unique(same, return_index=True)[1])]
        k = min(DIRECTIONS, picture.shape[1], len(rows) // IMAGES_EACH)
        if k < 2:
            continue
        white = _whitened(picture[rows].astype(np.float64), k, seed)
        if not white.shape[1]:
            continue
        expected = CHANCE / (len(rows) * (len(rows) - 1) / 2)
        typical = math.sqrt(2 * white.shape[1])
        reach = min(math.sqrt(2 * chi2.ppf(expected, white.shape[1])), NEAREST * typical)
        found = cKDTree(white).query_pairs(reach, output_type="ndarray")
        pairs += [(int(rows[i]), int(rows[j])) for i, j in found]
    return pairs


def merged(groups: np.ndarray | None, copies: np.ndarray, pairs: Iterable[tuple[int, int]] = ()) -> np.ndarray | None:
    """Number of the piece of each image, (n,), where what is a copy of one of a group belongs to it.

    None where every image is a piece of its own.
    """
    n = len(copies)
    links = [_chain(copies), np.array(list(pairs), dtype=np.int64).reshape(-1, 2)]
    if groups is not None:
        links.append(_chain(groups))
    left, right = np.concatenate(links).T
    if not len(left):
        return None
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(n, n))
    piece: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    return piece


def _chain(number: np.ndarray) -> np.ndarray:
    """Pairs (m, 2) that join all images with one number."""
    order = np.argsort(number, kind="stable")
    same = number[order[1:]] == number[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]], 1)


def _whitened(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The k main directions of what differs in rows, each of deviation 1."""
    some = x if len(x) <= MAX_IMAGES else x[np.random.RandomState(seed % 2**32).permutation(len(x))[:MAX_IMAGES]]
    mean = some.mean(0)
    _, values, directions = np.linalg.svd(some - mean, full_matrices=False)
    deviation = values[:k] / math.sqrt(len(some))
    kept = deviation > LEAST * math.sqrt(x.shape[1])
    white: np.ndarray = (x - mean) @ directions[:k][kept].T / deviation[kept]
    return white
