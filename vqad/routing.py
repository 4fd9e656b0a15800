"""Routing images to categories, which are learned from labels or discovered. When scoring, the category is inferred."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vqad._warn import warn
from vqad.nn.model import Configured

# Parts of scipy and scikit-learn that only learning needs are imported there, so that scoring starts sooner.

# Smallest mean silhouette of a partition that counts as several categories. Single categories of real products reach at
# most 0.31 when they are divided, different products 0.51 and more (docs/choices.md).
MIN_SILHOUETTE = 0.4
MIN_CATEGORY_SIZE = 5
# Warn about at least so many discovered categories with fewer images: they may be pieces with several pictures each.
MANY_CATEGORIES, FEW_IMAGES = 5, 20
MAX_ODD_IMAGES = 0.02
MAX_SCALING_IMAGES = 2000
MAX_DISCOVERY_IMAGES = 4000
MAX_PARTS = 400
# Distance limit of a category, in units of the 99th percentile of its normal images' distances.
FAR = 1.5
# Upper bound of the excess over the limit, also for features that overflow when squared.
FARTHEST = 1e9


class CategoryRouter(Configured):
    """Assigns images to categories by a descriptor of the whole image.

    A category is a Gaussian in descriptor space. All categories share one covariance, with Ledoit-Wolf shrinkage, so
    the nearest mean in Mahalanobis distance is the decision of linear discriminant analysis. Few images are enough.

    Parameters
    ----------
    n_features : int
        Length of a descriptor (D).
    n_components : int
        Number of principal components.
    n_categories : int
    discovered : bool, default=False
        Whether the categories were discovered without labels.
    silhouette : float, default=nan
        Mean silhouette of the discovered partition.

    Attributes
    ----------
    means : Tensor of shape (n_categories, n_components), float64
        Whitened means of the categories.
    limit : Tensor of shape (n_categories,), float64
        Distance from the mean of a category beyond which an image does not belong to it.
    """

    center: Tensor
    scale: Tensor
    components: Tensor
    whitening: Tensor
    means: Tensor
    limit: Tensor

    def __init__(
        self,
        n_features: int,
        n_components: int,
        n_categories: int,
        discovered: bool = False,
        silhouette: float = float("nan"),
    ) -> None:
        super().__init__()
        self.discovered, self.silhouette = discovered, silhouette
        shapes = {"center": (n_features,), "scale": (n_features,), "components": (n_features, n_components)}
        shapes |= {"whitening": (n_components, n_components), "means": (n_categories, n_components)}
        for name, shape in {**shapes, "limit": (n_categories,)}.items():
            self.register_buffer(name, torch.full(shape, math.inf, dtype=torch.float64))

    @property
    def n_features(self) -> int:
        """Length of a descriptor."""
        return self.components.shape[0]

    @property
    def n_components(self) -> int:
        """Number of principal components."""
        return self.components.shape[1]

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return len(self.means)

    def forward(self, descriptor: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest category of each image, (N,) int64, and the Mahalanobis distance to its mean, (N,) float64."""
        # Row by row, because the last bits of a matrix product may depend on the number of rows.
        rows = torch.split(descriptor.double(), 1)
        white = torch.cat([((row - self.center) / self.scale) @ self.components @ self.whitening for row in rows])
        distance = (white[:, None] - self.means).square().sum(-1).sqrt()
        category = distance.argmin(1)
        return category, distance.gather(1, category[:, None])[:, 0]

    def excess(self, category: Tensor, distance: Tensor) -> Tensor:
        """Distance beyond the limit of the category, in units of the limit, (N,) float64; 0 within the limit."""
        beyond = (distance / self.limit[category] - 1.0).clamp_min(0.0)
        return torch.nan_to_num(beyond, nan=FARTHEST, posinf=FARTHEST).clamp_max(FARTHEST)

    @classmethod
    def learn(
        cls,
        descriptor: np.ndarray,
        category: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        random_state: int = 0,
    ) -> tuple[CategoryRouter, np.ndarray, np.ndarray]:
        """Learn the categories.

        Parameters
        ----------
        descriptor : ndarray of shape (n, D)
        category : array-like of shape (n,) of str or int, optional
            Discovered if left out.
        groups : ndarray of shape (n,), int, optional
            Group of each image; if categories are discovered, all images of a group get the same one.

        Returns
        -------
        router : CategoryRouter
        categories : ndarray
            Labels as given, sorted; or 0..n-1 if they were discovered.
        index : ndarray of shape (n,), int64
            Position of each image's category in ``categories``.

        Warns
        -----
        UserWarning
            When five or more categories were discovered, with a median of fewer than 20 images.
        """
        center, scale, components = _scaling(descriptor, random_state)
        projected = ((descriptor - center) / scale) @ components
        silhouette = float("nan")
        if category is None:
            index, silhouette = discover(projected, random_state, groups)
            categories = np.arange(index.max() + 1)
        else:
            categories, index = np.unique(np.asarray(category), return_inverse=True)
        router = cls(len(components), components.shape[1], len(categories), category is None, silhouette)
        router.center[:], router.scale[:] = torch.from_numpy(center), torch.from_numpy(scale)
        router.components[:] = torch.from_numpy(components)
        router._fit_gaussians(projected, index)
        if category is None:
            present, settled = np.unique(router(torch.from_numpy(descriptor))[0].numpy(), return_inverse=True)
            if len(present) < len(categories):  # drop categories that no image is routed to
                categories = np.arange(len(present))
                router._fit_gaussians(projected, settled)
            index = settled
            _warn_of_many(len(categories), index)
        return router, categories, index.astype(np.int64)

    def add(self, descriptor: np.ndarray, index: np.ndarray) -> None:
        """Add categories in the existing descriptor space; known categories keep every bit.

        Parameters
        ----------
        descriptor : ndarray of shape (n, D)
        index : ndarray of shape (n,) of int
            Number of each image's category among the new ones: 0, 1, ...
        """
        white = self._projected(descriptor) @ self.whitening
        means = [white[torch.from_numpy(index == c)].mean(0) for c in range(index.max() + 1)]
        self.means = torch.cat([self.means, torch.stack(means)])
        self.limit = torch.cat([self.limit, self.limit.new_full((len(means),), math.inf)])

    def kinds_among(
        self, descriptor: np.ndarray, random_state: int = 0, groups: np.ndarray | None = None
    ) -> np.ndarray:
        """Discover new categories among images that belong to no known one: the number of each image's, (n,)."""
        index, _ = discover(self._projected(descriptor).numpy(), random_state, groups)
        return np.unique(index, return_inverse=True)[1]

    def set_limits(self, descriptor: np.ndarray, index: np.ndarray, n_known: int = 0) -> None:
        """Set the distance limits of categories from their images; those of the first ``n_known`` can only grow."""
        if not n_known:
            self.limit = torch.full_like(self.limit, math.inf)
        distance = self(torch.from_numpy(descriptor))[1].numpy()
        for c, n in zip(*np.unique(index, return_counts=True)):
            if n > 1:
                # New images are farther from the mean than the n images that it was computed from.
                widened = math.sqrt((n + 1) / (n - 1))
                limit = FAR * widened * np.quantile(distance[index == c], 0.99) + 1e-9
                self.limit[c] = max(limit, float(self.limit[c])) if c < n_known else limit

    def _projected(self, descriptor: np.ndarray) -> Tensor:
        return ((torch.from_numpy(descriptor).double() - self.center) / self.scale) @ self.components

    def _fit_gaussians(self, projected: np.ndarray, index: np.ndarray) -> None:
        from sklearn.covariance import LedoitWolf

        n = int(index.max()) + 1
        means = np.stack([projected[index == c].mean(0) for c in range(n)])
        residual = projected - means[index]
        covariance = LedoitWolf(assume_centered=True).fit(residual).covariance_
        covariance += np.eye(len(covariance)) * max(1e-6 * np.trace(covariance) / len(covariance), 1e-12)
        values, vectors = np.linalg.eigh(covariance)
        whitening = vectors / np.sqrt(np.maximum(values, 1e-12))
        self.whitening, self.means = torch.from_numpy(whitening), torch.from_numpy(means @ whitening)
        self.limit = self.limit.new_full((n,), math.inf)


def describe(maps: Sequence[Tensor]) -> Tensor:
    """Descriptor of each whole image, (N, D) float32: mean and standard deviation of each channel over the map."""
    parts = []
    for m in maps:
        cells = m.float().flatten(2)
        mean = cells.mean(2)
        # On a CPU torch's std takes ten times as long.
        spread = (cells - mean[..., None]).square().mean(2).sqrt()
        parts += [mean, torch.where(spread > 1e-6 * mean.abs(), spread, 0.0)]  # ignore rounding errors
    return torch.cat(parts, 1)


def new_labels(kind: np.ndarray, known: np.ndarray) -> np.ndarray:
    """New labels for new categories 0, 1, ..., of the same type as the known ones."""
    if known.dtype.kind == "U":
        names = (f"new {k}" for k in itertools.count(1))
        free = (name for name in names if name not in known)
        labels = np.array(list(itertools.islice(free, kind.max() + 1)))
    else:
        labels = known.max() + 1 + np.arange(kind.max() + 1)
    of_each: np.ndarray = labels[kind]
    return of_each


def _warn_of_many(n_categories: int, index: np.ndarray) -> None:
    typical = np.median(np.bincount(index))
    if n_categories >= MANY_CATEGORIES and typical < FEW_IMAGES:
        warn(
            f"{n_categories} categories were discovered in {len(index)} images, with a median of {typical:g} images, "
            "which are few to learn from. Give more images; or, if these are several pictures of many pieces of one "
            "kind, pass groups and one label for all: category=['part'] * n."
        )


def _scaling(descriptor: np.ndarray, random_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation of descriptors, and their principal components, from a subsample."""
    from sklearn.decomposition import PCA

    rows = _subsample(len(descriptor), random_state, MAX_SCALING_IMAGES)
    sample = descriptor[rows].astype(np.float64)
    center, scale = sample.mean(0), sample.std(0)
    # Relative to the size of each number, because features may have any units.
    floor = 1e-6 * np.sqrt(np.square(sample).mean(0)) + 1e-12
    scale = np.where(scale > floor, scale, np.maximum(floor, 1.0))
    with np.errstate(invalid="ignore"):  # if all images are equal
        pca = PCA(min(32, *sample.shape), svd_solver="full").fit((sample - center) / scale)
    return center, scale, pca.components_.T.copy()


def discover(
    projected: np.ndarray, random_state: int = 0, groups: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Discover the categories in a set of descriptors, and their number.

    Ward's hierarchical clustering is cut into 2, 3, ... clusters. The cut with the largest mean silhouette is used if
    that is at least 0.4 and no cluster has fewer than 5 images; otherwise everything is one category. One image in
    fifty, or a single one, may be in smaller clusters: these are damaged or foreign images, not categories. At most
    4,000 images and 400 clusters are used.

    With ``groups`` (n,), each group is represented by its mean, because several pictures of one piece form a cluster
    that is not a category.

    Returns
    -------
    index : ndarray of shape (n,), int64
    silhouette : float
    """
    from sklearn.metrics import pairwise_distances_argmin

    if groups is not None:
        _, piece = np.unique(groups, return_inverse=True)
        total = np.zeros((piece.max() + 1, projected.shape[1]))
        np.add.at(total, piece, projected)
        index, silhouette = discover(total / np.bincount(piece)[:, None], random_state)
        return index[piece], silhouette
    rows = _subsample(len(projected), random_state, MAX_DISCOVERY_IMAGES)
    sample = projected[rows]
    best, best_score = None, MIN_SILHOUETTE
    if len(rows) >= 2 * MIN_CATEGORY_SIZE:
        for label, score in _cuts(sample):
            if score >= best_score:
                best, best_score = label, score
    if best is None:
        return np.zeros(len(projected), dtype=np.int64), 0.0
    centres = np.stack([sample[best == c].mean(0) for c in np.unique(best[best >= 0])])
    # Of centres that differ only in the last digits, one may have no image nearest to it.
    _, index = np.unique(pairwise_distances_argmin(projected, centres), return_inverse=True)
    return index.astype(np.int64), best_score


def _cuts(sample: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Cuts of Ward's tree from many clusters to few: each image's cluster, -1 for odd images, and the mean silhouette.

    Each step merges two clusters and adds their sums of distances, so all cuts take at most n * k**2 operations.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist, squareform

    n = len(sample)
    pairs = pdist(sample)
    tree = linkage(pairs, "ward")[:, :2].astype(int)
    n_odd = max(1, MAX_ODD_IMAGES * n)
    k = min(n, MAX_PARTS, n // MIN_CATEGORY_SIZE + int(n_odd))
    node = np.arange(n)
    for step in range(n - k):
        node[np.isin(node, tree[step])] = n + step
    nodes, label = np.unique(node, return_inverse=True)
    nodes, size = nodes.tolist(), np.bincount(label)
    # Row p: sum of each image's distances to the images of cluster p.
    to_part = np.eye(k, dtype=np.float32)[:, label] @ squareform(pairs.astype(np.float32))
    for step in range(n - k, n - 1):
        is_category = size >= MIN_CATEGORY_SIZE
        placed = is_category[label]
        if is_category.sum() >= 2 and n - placed.sum() <= n_odd:
            yield np.where(placed, label, -1), _silhouette(to_part[:, placed], label[placed], size)
        kept, gone = sorted(nodes.index(i) for i in tree[step])
        to_part[kept] += to_part[gone]
        size[kept] += size[gone]
        label[label == gone] = kept
        nodes[kept] = n + step
        # Move the last cluster to the place of the one that was merged.
        to_part[gone], size[gone], nodes[gone] = to_part[-1], size[-1], nodes[-1]
        label[label == len(nodes) - 1] = gone
        to_part, size = to_part[:-1], size[:-1]
        nodes.pop()


def _silhouette(to_part: np.ndarray, label: np.ndarray, size: np.ndarray) -> float:
    """Mean silhouette of the images in categories; clusters that are too small do not count as neighbours."""
    is_category = size >= MIN_CATEGORY_SIZE
    label = np.cumsum(is_category)[label] - 1
    to_part, size, each = to_part[is_category], size[is_category], np.arange(len(label))
    inside = to_part[label, each] / (size[label] - 1)
    mean = to_part / size[:, None]
    mean[label, each] = np.inf
    outside = mean.min(0)
    return float(np.mean((outside - inside) / np.maximum(np.maximum(outside, inside), 1e-30)))


def _subsample(n: int, random_state: int, limit: int) -> np.ndarray:
    if n <= limit:
        return np.arange(n)
    return np.sort(np.random.RandomState(random_state).choice(n, limit, replace=False))
