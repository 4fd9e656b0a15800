"""The baseline of the demonstration: a Gaussian at each location of an image, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from vqad._checks import check_category, known_index
from vqad.features import BackboneFeatures
from vqad.images import ImageSequence, check_images

MOST_IMAGES = 400
"""Largest number of training images of a category that are used; of more, a random sample."""
N_FOLDS = 3
RIDGE = 0.01
"""Added to the shared covariance, in units of its mean eigenvalue."""
# Images that are scored together.
_AT_ONCE = 16


class GaussianYardstick:
    """Baseline: Mahalanobis distance of each cell from the normal images of its category.

    It uses features of the frozen default backbone at 224 pixels, on the grid of stride 16, in two views: the fine one
    has strides 8 and 16, averaged over 3 x 3 cells; the deep one has stride 16 and both widths of stride 32. In each
    view every cell has its own Gaussian, as in PaDiM [1]_; its covariance is half the cell's own and half shared by all
    cells. A cell's distances are standardised by those of training images that its Gaussian was not fitted on. An
    image's score is its largest standardised distance, averaged over both views.

    It is told the category of every image, and fits in seconds. A category takes about 130 MB for 200 images.

    Parameters
    ----------
    device : str, default="auto"
        Device of the backbone.

    References
    ----------
    .. [1] Defard, Setkov, Loesch, Audigier: PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
       Localization, ICPR workshops 2021. arXiv:2011.08785.
    """

    def __init__(self, device: str = "auto"):
        self.features = BackboneFeatures(stages=(2, 3, 4), merge=False, device=device)

    def fit(self, images: Any, category: ArrayLike) -> GaussianYardstick:
        """Learn normal images.

        Parameters
        ----------
        images : images
            In any of the forms that the detectors take.
        category : array-like of shape (n,), str or int

        Raises
        ------
        ValueError
            If a category has a single image.
        """
        data, labels = _checked(images, category)
        self.categories, index = np.unique(labels, return_inverse=True)
        counts = np.bincount(index)
        if counts.min() < 2:
            alone = self.categories[counts.argmin()].item()
            raise ValueError(f"category {alone!r} has 1 image; the baseline needs at least 2 per category, better 20.")
        self.features.fit()
        _give_both_widths(self.features.network_)
        rng = np.random.RandomState(0)
        self.views: list[list[_View]] = []
        for kind in range(len(self.categories)):
            rows = np.sort(rng.permutation(np.flatnonzero(index == kind))[:MOST_IMAGES])
            maps = self._maps(data, rows)
            self.views.append([_View(cells, maps) for cells in (_fine_cells, _deep_cells)])
        return self

    def anomaly_score(self, images: Any, category: ArrayLike) -> NDArray[np.float64]:
        """How anomalous each image is within its category.

        Parameters
        ----------
        images : images
        category : array-like of shape (n,), str or int
            Categories seen in `fit`.

        Returns
        -------
        score : ndarray of shape (n,), float64
            Higher is more anomalous; 0 is a typical training image.

        Raises
        ------
        ValueError
            If a category was not learned.
        """
        data, labels = _checked(images, category)
        index = known_index(labels, self.categories)
        if (index < 0).any():
            unknown = labels[index < 0][0].item()
            raise ValueError(f"category {unknown!r} was not learned; known are {self.categories.tolist()}.")
        score = np.empty(len(data))
        for kind in np.unique(index):
            rows = np.flatnonzero(index == kind)
            for part in np.split(rows, range(_AT_ONCE, len(rows), _AT_ONCE)):
                maps = self._maps(data, part)
                score[part] = np.mean([view.score(maps) for view in self.views[kind]], axis=0)
        return score

    def _maps(self, data: ImageSequence, rows: NDArray[np.intp]) -> list[Tensor]:
        """Strides 8, 16 and 32, and the narrower width of stride 32: (n, C, h, w) each."""
        chunks = [[m.float().cpu() for m in maps] for _, maps in self.features.iter_maps(data, rows)]
        return [torch.cat(stage) for stage in zip(*chunks)]


def _checked(images: Any, category: ArrayLike) -> tuple[ImageSequence, NDArray[Any]]:
    data = check_images(images)
    labels = check_category(category, len(data))
    if labels is None:
        raise ValueError("category is None: the baseline needs the category of every image.")
    return data, labels


def _give_both_widths(network: nn.Module) -> None:
    """Make the backbone also return the map before its last group of blocks: the same stride, fewer channels."""
    before: list[Tensor] = []

    def remember(block: nn.Module, inputs: Any, output: Tensor) -> None:
        before[:] = [output]

    def add(whole: nn.Module, inputs: Any, maps: list[Tensor]) -> list[Tensor]:
        return [*maps, *before]

    network.blocks[-2].register_forward_hook(remember)
    network.register_forward_hook(add)


def _fine_cells(maps: list[Tensor]) -> Tensor:
    """Strides 8 and 16, smoothed, on the grid of stride 16: (n, h, w, C)."""
    fine, middle, _, _ = (F.avg_pool2d(m, 3, stride=1, padding=1, count_include_pad=False) for m in maps)
    return torch.cat([F.adaptive_avg_pool2d(fine, middle.shape[-2:]), middle], 1).permute(0, 2, 3, 1)


def _deep_cells(maps: list[Tensor]) -> Tensor:
    """Stride 16 and both widths of stride 32, on the grid of stride 16: (n, h, w, C)."""
    _, middle, wide, narrow = maps
    deep = F.interpolate(torch.cat([narrow, wide], 1), middle.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([middle, deep], 1).permute(0, 2, 3, 1)


class _View:
    """Gaussians of one category in one view, and the scale of their distances.

    Parameters
    ----------
    cells : callable
        Maps the backbone's maps to cells (n, h, w, C).
    maps : list of Tensor
        Maps of the training images.
    """

    def __init__(self, cells: Callable[[list[Tensor]], Tensor], maps: list[Tensor]):
        self.cells = cells
        x = cells(maps)
        height, width = x.shape[1:3]
        x = x.flatten(1, 2)
        distance = _distances_to_others(x)
        self.mean, self.scale = (
            F.avg_pool2d(v.view(1, height, width), 3, stride=1, padding=1, count_include_pad=False).flatten()
            for v in (distance.mean(0), distance.std(0))
        )
        self.scale.clamp_min_(1e-6)
        self.gaussians = _Gaussians(x)
        largest = self._largest(distance)
        self.typical, self.spread = largest.median(), largest.std().clamp_min(1e-6)

    def score(self, maps: list[Tensor]) -> NDArray[np.float64]:
        """Largest standardised distance of each image, standardised over the training images: (n,)."""
        largest = self._largest(self.gaussians.distance(self.cells(maps).flatten(1, 2)))
        return ((largest - self.typical) / self.spread).double().numpy()

    def _largest(self, distance: Tensor) -> Tensor:
        return ((distance - self.mean) / self.scale).amax(1)


def _distances_to_others(x: Tensor) -> Tensor:
    """Cross-fitted distances (n, L): each image's cells against Gaussians fitted on the other folds."""
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)) % N_FOLDS
    distance = x.new_empty(x.shape[:2])
    for k in fold.unique():
        distance[fold == k] = _Gaussians(x[fold != k]).distance(x[fold == k])
    return distance


class _Gaussians:
    r"""A Gaussian at each of L cells; the covariance is half the cell's own, half shared by all cells.

    After whitening by the shared covariance, :math:`S = (I + R^T R / n) / 2`, where the n rows of R are the training
    images' differences from the cell's mean. By Woodbury's identity, :math:`q^T S^{-1} q = 2 (|q|^2 - |A q|^2)` with
    :math:`A = K^{-1} R` and :math:`K K^T = n I + R R^T`, which needs less memory and time than S because there are
    fewer images than features.

    Parameters
    ----------
    x : Tensor of shape (n, L, d)
    """

    def __init__(self, x: Tensor):
        self.mean = x.mean(0)
        self.whitener = _whitener(x, self.mean)
        n, n_cells, d = x.shape
        self.factor = x.new_empty(n_cells, n, d)
        for cell in range(n_cells):
            r = (x[:, cell] - self.mean[cell]) @ self.whitener
            k = torch.linalg.cholesky(n * torch.eye(n) + r @ r.T)
            self.factor[cell] = torch.linalg.solve_triangular(k, r, upper=False)

    def distance(self, x: Tensor) -> Tensor:
        """Mahalanobis distance of cells (m, L, d) from the mean of their location: (m, L)."""
        q = ((x - self.mean) @ self.whitener).transpose(0, 1)
        squares = q.square().sum(2) - torch.bmm(q, self.factor.mT).square().sum(2)
        return (2 * squares).clamp_min(0).sqrt().T


def _whitener(x: Tensor, mean: Tensor) -> Tensor:
    """Whitening matrix (d, d) of all cells' differences from their means, with a ridge."""
    covariance = torch.zeros(x.shape[2], x.shape[2], dtype=torch.float64)
    for part in x.split(_AT_ONCE):
        rows = (part - mean).flatten(0, 1)
        covariance += rows.T @ rows  # each part in float32, the sum in float64
    values, vectors = torch.linalg.eigh(covariance / (x.shape[0] * x.shape[1]))
    # One image, or equal ones, have no covariance: a small multiple of the features' own size keeps it positive.
    least = RIDGE * values.mean() + 1e-6 * x.square().mean() + 1e-12
    return (vectors / (values.clamp_min(0) + least).sqrt()).float()
