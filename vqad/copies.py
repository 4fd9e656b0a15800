"""Exact and near copies of images, which count as one piece wherever images are split."""

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

# Side in pixels of the small grey pictures that are compared.
SIDE = 16
# Size at which images are read for them if no backbone reads the images.
LOOK = (256, 256)
# Largest number of principal directions in which they are compared, and fewest images of a category for each.
DIRECTIONS, IMAGES_EACH = 16, 4
# Largest number of images from which the directions are computed.
MAX_IMAGES = 2000
# Largest probability that any two different images of a category are as near as copies by chance.
CHANCE = 1e-3
# Copies are also nearer than this share of the typical distance between two images. In seven sets of real products,
# images saved as JPEG of quality 60, or at half their size, are at most 0.034 away from the original, and images with
# grey levels randomly off by one 0.07; of 437 images a single pair is nearer than 0.057, at 0.027.
NEAREST = 0.035
# Directions with a smaller standard deviation, a quarter of a grey level in all pixels, are ignored as noise.
LEAST = 1e-3


def find_copies(X: Any, *, category: ArrayLike | None = None) -> np.ndarray:
    """Find images that are copies of others, exact or near: saved again, resized, or frames of a film.

    Detectors search for copies themselves wherever they hold images out. In your own splits, keep copies on one side:
    ``InlierKFold().split(X, y, groups=find_copies(X))``.

    Parameters
    ----------
    X : images
        Any of the forms that the detectors take.
    category : array-like of shape (n,), default=None
        Kind of object in each image. Near copies are detected within a category, relative to how much its images
        differ. If X has several categories and this is left out, fewer copies are found, or images of a category that
        hardly differ may be taken for copies.

    Returns
    -------
    groups : ndarray of shape (n,), int64
        Group of each image: copies of each other have the same number.

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
    """Number of the piece of each image, (n,): copies, exact or near, and images of a group belong to one piece.

    None if each image is a piece of its own.

    Parameters
    ----------
    images : Watched, or ready-made features
        Features are copies only if they are equal to the last bit.
    rows : ndarray of shape (n,)
        Images to compare.
    groups : ndarray of shape (n,) or None
    descriptor : ndarray of shape (n, D)
    index : ndarray of shape (n,)
        Category of each image; -1 for images to leave out.

    Warns
    -----
    UserWarning
        When there are copies.
    """
    exact, near = exact_copies(descriptor), []
    if isinstance(images, Watched):
        picture, known = images.small_pictures(rows)
        near = [(int(known[i]), int(known[j])) for i, j in near_copies(picture, index[known], seed)]
    alone, found = merged(None, exact, near), merged(groups, exact, near)
    n, n_different = len(rows), len(rows) if alone is None else len(np.unique(alone))
    if n_different < n:
        warn(
            f"Of {n} images {n - n_different} are exact or near copies of others. Copies count as one piece: they are "
            "held out together, and only one of them sets thresholds."
        )
    return found


def exact_copies(descriptor: np.ndarray) -> np.ndarray:
    """Number of the piece of each image, (n,): images with equal descriptors (n, D) are one piece.

    Features of an image do not depend on other images, so equal pixels have descriptors that are equal to the last bit.
    """
    rows = np.ascontiguousarray(descriptor)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    piece: np.ndarray = np.unique(whole, return_inverse=True)[1]
    return piece


class Watched(ImageSequence):
    """The same images; each image that is read leaves a small grey picture."""

    def __init__(self, images: ImageSequence) -> None:
        vars(self).update(vars(images))
        self._small: dict[int, np.ndarray] = {}

    def load(self, indices: Any, size: tuple[int, int]) -> Tensor:
        """As in `ImageSequence`."""
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
        """As in `ImageSequence`."""
        pixels = super().pixels(i)
        self._small[int(i)] = _small(torch.from_numpy(pixels).permute(2, 0, 1))
        return pixels

    @property
    def pictures(self) -> dict[int, np.ndarray]:
        """The small pictures, by the number of the image."""
        return self._small

    def join(self, pictures: Iterable[dict[int, np.ndarray]]) -> None:
        """Add the small pictures of other processes."""
        for some in pictures:
            self._small.update(some)

    def small_pictures(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (m, 256) of some images, and the positions of these images in ``rows``.

        Images that were not read because their features were cached are read now, unless they come from a caller's own
        collection.
        """
        if self.reads_in_threads:
            for i in rows.tolist():
                if i not in self._small:
                    self.load([i], (SIDE, SIDE))
        known = np.array([k for k, i in enumerate(rows.tolist()) if i in self._small], dtype=np.intp)
        return np.stack([self._small[i] for i in rows[known].tolist()] or [np.empty(0)]), known


def _small(image: Tensor) -> np.ndarray:
    """Small grey picture of an image (C, H, W), flattened."""
    grey = image.mean(0, keepdim=True)[None]
    return F.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True).flatten().numpy()


def near_copies(picture: np.ndarray, index: np.ndarray, seed: int = 0) -> list[tuple[int, int]]:
    r"""Pairs of near copies among the images of each category: saved again, resized, or frames of a film.

    Small pictures are projected on the k principal directions of their category and whitened. If they were independent
    and Gaussian, two of them would be at most r apart with probability :math:`P(\chi^2_k \le r^2/2)`. Pairs are copies
    if they are nearer than any of the n (n - 1) / 2 pairs would be in 999 of 1,000 such sets, and nearer than
    ``NEAREST`` times the typical distance. A k-d tree finds them in about n log n steps.

    Parameters
    ----------
    picture : ndarray of shape (n, D)
    index : ndarray of shape (n,)
        Category of each image; images with -1 are skipped.
    """
    pairs: list[tuple[int, int]] = []
    for c in np.unique(index[index >= 0]):
        rows = np.flatnonzero(index == c)
        same = exact_copies(picture[rows])
        pairs += [(int(rows[i]), int(rows[j])) for i, j in _chain(same)]
        # One of each: copies would bias the deviations.
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
    """Number of the piece of each image, (n,): connected components of groups, exact copies and pairs of near copies.

    None if each image is a piece of its own.
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
    """Pairs (m, 2) that connect all images with equal numbers."""
    order = np.argsort(number, kind="stable")
    same = number[order[1:]] == number[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]], 1)


def _whitened(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Rows projected on their k principal directions, each scaled to standard deviation 1."""
    some = x if len(x) <= MAX_IMAGES else x[np.random.RandomState(seed % 2**32).permutation(len(x))[:MAX_IMAGES]]
    mean = some.mean(0)
    _, values, directions = np.linalg.svd(some - mean, full_matrices=False)
    deviation = values[:k] / math.sqrt(len(some))
    kept = deviation > LEAST * math.sqrt(x.shape[1])
    white: np.ndarray = (x - mean) @ directions[:k][kept].T / deviation[kept]
    return white
