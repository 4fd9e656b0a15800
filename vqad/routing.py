"""Which category an image belongs to: learned from labels, or discovered; at scoring always inferred."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_argmin

from vqad._warn import warn

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


class CategoryRouter:
    """Assigns images to categories by a descriptor of the whole image.

    A category is a Gaussian in descriptor space; all share one covariance, shrunk after Ledoit and Wolf, so
    that the nearest mean in Mahalanobis distance is the linear discriminant's decision. Few images are enough.

    Attributes
    ----------
    categories_ : ndarray of shape (n_categories,)
        Labels as given, sorted; or 0..n-1 where they were discovered. Those that `extend` took in come after.
    discovered_ : bool
    silhouette_ : float
        Mean silhouette of the discovered partition; nan with labels.
    means_ : ndarray of shape (n_categories, n_components)
    """

    def fit(self, descriptor: np.ndarray, category=None, *, groups=None, random_state: int = 0) -> np.ndarray:
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
        index : ndarray of shape (n,), int64
            Position of every image's category in ``categories_``.

        Warns
        -----
        UserWarning
            When five or more categories were found, of fewer than 20 images in the median.
        """
        self.silhouette_ = float("nan")
        self.discovered_ = category is None
        self._fit_scaling(descriptor, random_state)
        projected = self._project(descriptor)
        if category is None:
            index, self.silhouette_ = discover(projected, random_state, groups)
            self.categories_ = np.arange(index.max() + 1)
        else:
            self.categories_, index = np.unique(np.asarray(category), return_inverse=True)
        self._fit_gaussians(projected, index)
        if category is None:
            index = self._settle(projected, self.predict(descriptor)[0])
            typical = np.median(np.bincount(index))
            if len(self.categories_) >= MANY_CATEGORIES and typical < FEW_IMAGES:
                warn(
                    f"{len(self.categories_)} categories were found in {len(index)} images, of {typical:g} images in "
                    "the median: few to learn one from. Give more images; or, if these are several pictures of each of "
                    "many pieces of one kind, say which by groups, and give one label for all: category=['part'] * n."
                )
        return index.astype(np.int64)

    def _settle(self, projected: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Drop discovered categories that no image is routed to."""
        present, settled = np.unique(index, return_inverse=True)
        if len(present) < len(self.categories_):
            self.categories_ = np.arange(len(present))
            self._fit_gaussians(projected, settled)
        return settled

    def extend(self, descriptor: np.ndarray, category: np.ndarray) -> None:
        """Take in categories that are not known yet, in the space of those that are, which keep every bit.

        Parameters
        ----------
        descriptor : ndarray of shape (n, D)
        category : ndarray of shape (n,) of labels like those of `fit`
        """
        labels, index = np.unique(category, return_inverse=True)
        white = self._whiten(descriptor)
        means = [white[index == c].mean(0) for c in range(len(labels))]
        self.categories_ = np.append(self.categories_, labels)
        self.means_ = np.vstack([self.means_, *means])

    def discover_more(self, descriptor: np.ndarray, random_state: int = 0, groups=None) -> np.ndarray:
        """Labels (n,) of new kinds among images that belong to no known category."""
        index, _ = discover(self._project(descriptor), random_state, groups)
        _, index = np.unique(index, return_inverse=True)
        if self.categories_.dtype.kind == "U":
            names = (f"new {k}" for k in itertools.count(1))
            free = (name for name in names if name not in self.categories_)
            return np.array(list(itertools.islice(free, index.max() + 1)))[index]
        return self.categories_.max() + 1 + index

    def predict(self, descriptor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest category of each image, and the Mahalanobis distance to its mean.

        Returns
        -------
        index : ndarray of shape (n,), int64
        distance : ndarray of shape (n,), float64
        """
        index, distance = np.empty(len(descriptor), dtype=np.int64), np.empty(len(descriptor))
        for i, row in enumerate(self._whiten(descriptor)):
            away = np.sqrt(np.square(row - self.means_).sum(-1))
            index[i] = away.argmin()
            distance[i] = away[index[i]]
        return index, distance

    def _fit_scaling(self, descriptor: np.ndarray, random_state: int) -> None:
        rows = _subsample(len(descriptor), random_state, MAX_SCALING_IMAGES)
        sample = descriptor[rows].astype(np.float64)
        self.center_ = sample.mean(0)
        scale = sample.std(0)
        # Each number by its own digits: numbers may be of any units.
        floor = 1e-6 * np.sqrt(np.square(sample).mean(0)) + 1e-12
        self.scale_ = np.where(scale > floor, scale, np.maximum(floor, 1.0))
        with np.errstate(invalid="ignore"):  # images that are all the same
            pca = PCA(min(32, *sample.shape), svd_solver="full").fit((sample - self.center_) / self.scale_)
        self.components_ = pca.components_.T

    def _project(self, descriptor: np.ndarray) -> np.ndarray:
        # Row by row in float64: a matrix product's last bits may depend on how many rows it has.
        rows = (row.astype(np.float64) for row in np.asarray(descriptor))
        return np.stack([((row - self.center_) / self.scale_) @ self.components_ for row in rows])

    def _whiten(self, descriptor: np.ndarray) -> np.ndarray:
        return np.stack([row @ self.whitening_ for row in self._project(descriptor)])

    def _fit_gaussians(self, projected: np.ndarray, index: np.ndarray) -> None:
        n = int(index.max()) + 1
        means = np.stack([projected[index == c].mean(0) for c in range(n)])
        residual = projected - means[index]
        covariance = LedoitWolf(assume_centered=True).fit(residual).covariance_
        covariance += np.eye(len(covariance)) * max(1e-6 * np.trace(covariance) / len(covariance), 1e-12)
        values, vectors = np.linalg.eigh(covariance)
        self.whitening_ = vectors / np.sqrt(np.maximum(values, 1e-12))
        self.means_ = means @ self.whitening_


def discover(projected: np.ndarray, random_state: int = 0, groups=None) -> tuple[np.ndarray, float]:
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
