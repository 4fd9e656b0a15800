"""Which category an image belongs to: learned from labels, or discovered; at scoring always inferred."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vqad._warn import warn
from vqad.nn.model import Configured

# What only learning needs of scipy and scikit-learn is imported there: scoring one image starts sooner.

# A partition whose mean silhouette is below this is no evidence of several kinds of object. Single categories of real
# products reach 0.31 at the most when they are cut in parts, different products 0.51 and more (docs/choices.md).
MIN_SILHOUETTE = 0.4
MIN_CATEGORY_SIZE = 5
# So many categories of so few images may be pieces of one kind, of which there are several pictures each.
MANY_CATEGORIES, FEW_IMAGES = 5, 20
MAX_ODD_IMAGES = 0.02
MAX_SCALING_IMAGES = 2000
MAX_DISCOVERY_IMAGES = 4000
MAX_PARTS = 400
# An image this many times as far from its category as the farthest hundredth of normal images belongs to none.
FAR = 1.5
# The most limits that count: of features that overflow when squared, too.
FARTHEST = 1e9


class CategoryRouter(Configured):
    """Assigns images to categories by a descriptor of the whole image.

    A category is a Gaussian in descriptor space; all share one covariance, shrunk after Ledoit and Wolf, so
    that the nearest mean in Mahalanobis distance is the linear discriminant's decision. Few images are enough.

    Parameters
    ----------
    n_features : int
        Length of a descriptor (D).
    n_components : int
    n_categories : int
    discovered : bool, default=False
        Whether the categories were found without labels.
    silhouette : float, default=nan
        Mean silhouette of the discovered partition.

    Attributes
    ----------
    means : Tensor of shape (n_categories, n_components), float64
        Of the categories, whitened.
    limit : Tensor of shape (n_categories,), float64
        Distance from the nearest mean beyond which an image belongs to no category.
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
        """Numbers that categories are told apart by."""
        return self.components.shape[1]

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return len(self.means)

    def forward(self, descriptor: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest category of each image, (N,) int64, and the Mahalanobis distance to its mean, (N,) float64."""
        # Row by row: a matrix product's last bits may depend on how many rows it has.
        rows = torch.split(descriptor.double(), 1)
        white = torch.cat([((row - self.center) / self.scale) @ self.components @ self.whitening for row in rows])
        distance = (white[:, None] - self.means).square().sum(-1).sqrt()
        category = distance.argmin(1)
        return category, distance.gather(1, category[:, None])[:, 0]

    def excess(self, category: Tensor, distance: Tensor) -> Tensor:
        """By how many limits images are too far from their category, (N,) float64; 0 for those that belong there."""
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
            Discovered when left out.
        groups : ndarray of shape (n,), int, optional
            Of what is one piece; where categories are discovered it is of one kind.

        Returns
        -------
        router : CategoryRouter
        categories : ndarray
            Labels as given, sorted; or 0..n-1 where they were discovered.
        index : ndarray of shape (n,), int64
            Position of every image's category in ``categories``.

        Warns
        -----
        UserWarning
            When five or more categories were found, of fewer than 20 images in the median.
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
            if len(present) < len(categories):  # no image is routed to the others
                categories = np.arange(len(present))
                router._fit_gaussians(projected, settled)
            index = settled
            _warn_of_many(len(categories), index)
        return router, categories, index.astype(np.int64)

    def add(self, descriptor: np.ndarray, index: np.ndarray) -> None:
        """Take in more categories, in the space of those that are known, which keep every bit.

        Parameters
        ----------
        descriptor : ndarray of shape (n, D)
        index : ndarray of shape (n,) of int
            0, 1, ...: the number of each image's category among the new ones.
        """
        white = self._projected(descriptor) @ self.whitening
        means = [white[torch.from_numpy(index == c)].mean(0) for c in range(index.max() + 1)]
        self.means = torch.cat([self.means, torch.stack(means)])
        self.limit = torch.cat([self.limit, self.limit.new_full((len(means),), math.inf)])

    def kinds_among(
        self, descriptor: np.ndarray, random_state: int = 0, groups: np.ndarray | None = None
    ) -> np.ndarray:
        """Number (n,) of the new kind of each of some images that belong to no known category."""
        index, _ = discover(self._projected(descriptor).numpy(), random_state, groups)
        return np.unique(index, return_inverse=True)[1]

    def set_limits(self, descriptor: np.ndarray, index: np.ndarray, n_known: int = 0) -> None:
        """Set the limits of categories by their images; those of the first ``n_known`` ones only ever grow."""
        if not n_known:
            self.limit = torch.full_like(self.limit, math.inf)
        distance = self(torch.from_numpy(descriptor))[1].numpy()
        for c, n in zip(*np.unique(index, return_counts=True)):
            if n > 1:
                # New images lie farther from the mean than those n that it is the mean of.
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
    """Descriptor of each whole image, (N, D) float32: mean and standard deviation of every channel over the map."""
    parts = []
    for m in maps:
        cells = m.float().flatten(2)
        mean = cells.mean(2)
        # On a CPU torch's own standard deviation takes ten times as long.
        spread = (cells - mean[..., None]).square().mean(2).sqrt()
        parts += [mean, torch.where(spread > 1e-6 * mean.abs(), spread, 0.0)]  # no more than rounding
    return torch.cat(parts, 1)


def new_labels(kind: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Labels of new kinds 0, 1, ..., of the type of the known ones and none of these."""
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
            f"{n_categories} categories were found in {len(index)} images, of {typical:g} images in the median: few to "
            "learn one from. Give more images; or, if these are several pictures of each of many pieces of one kind, "
            "say which by groups, and give one label for all: category=['part'] * n."
        )


def _scaling(descriptor: np.ndarray, random_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middle and scale of each number of descriptors, and their principal directions, from a part of them."""
    from sklearn.decomposition import PCA

    rows = _subsample(len(descriptor), random_state, MAX_SCALING_IMAGES)
    sample = descriptor[rows].astype(np.float64)
    center, scale = sample.mean(0), sample.std(0)
    # Each number by its own digits: numbers may be of any units.
    floor = 1e-6 * np.sqrt(np.square(sample).mean(0)) + 1e-12
    scale = np.where(scale > floor, scale, np.maximum(floor, 1.0))
    with np.errstate(invalid="ignore"):  # images that are all the same
        pca = PCA(min(32, *sample.shape), svd_solver="full").fit((sample - center) / scale)
    return center, scale, pca.components_.T.copy()


def discover(
    projected: np.ndarray, random_state: int = 0, groups: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Find the kinds of object in a set of descriptors, and how many there are.

    Ward's tree, cut into 2, 3, ... parts; the cut with the largest mean silhouette wins if that is at least 0.4 and no
    part has fewer than 5 images, otherwise everything is one category. One image in fifty, or a single one, may lie
    in smaller parts: these are broken or foreign images, not categories. At most 4,000 images are looked at, and 400
    parts.

    Where ``groups`` (n,) says which images are of one piece, pieces take the place of images, each by its mean: several
    pictures of one are a cluster, and no kind.

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
    # Of centres that differ in their last digits alone one may have no image nearest to it.
    _, index = np.unique(pairwise_distances_argmin(projected, centres), return_inverse=True)
    return index.astype(np.int64), best_score


def _cuts(sample: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """Cuts of Ward's tree from many parts to few: each image's part, -1 for odd ones; and the mean silhouette.

    A step to fewer parts joins two of them, and so their sums of distances: all cuts take no more than n * k**2 steps.
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
    # Row p: of each image the sum of its distances to those of part p.
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
        # The last part takes the place of the one that is gone.
        to_part[gone], size[gone], nodes[gone] = to_part[-1], size[-1], nodes[-1]
        label[label == len(nodes) - 1] = gone
        to_part, size = to_part[:-1], size[:-1]
        nodes.pop()


def _silhouette(to_part: np.ndarray, label: np.ndarray, size: np.ndarray) -> float:
    """Mean silhouette of images in categories; parts that are too small to be one are no neighbours either."""
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
