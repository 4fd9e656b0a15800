"""Which category an image belongs to: learned from labels, or discovered; at scoring always inferred."""

from __future__ import annotations

import itertools

import numpy as np
from sklearn.cluster import KMeans
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_argmin, silhouette_score

# A partition whose mean silhouette is below this is no evidence of several kinds of object. Single categories of real
# products reach 0.36 at the most when they are cut in parts, different products 0.55 and more (docs/choices.md).
MIN_SILHOUETTE = 0.4
MIN_CATEGORY_SIZE = 5
MAX_ODD_IMAGES = 0.02
MAX_DISCOVERY_IMAGES = 2000
MAX_CATEGORIES = 128


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

    def fit(self, descriptor: np.ndarray, category=None, *, random_state: int = 0) -> np.ndarray:
        """Learn the categories.

        Parameters
        ----------
        descriptor : ndarray of shape (n, D)
        category : array-like of shape (n,) of str or int, optional
            Discovered when left out.

        Returns
        -------
        index : ndarray of shape (n,), int64
            Position of every image's category in ``categories_``.
        """
        self.silhouette_ = float("nan")
        self.discovered_ = category is None
        self._fit_scaling(descriptor, random_state)
        projected = self._project(descriptor)
        if category is None:
            index, self.silhouette_ = discover(projected, random_state)
            self.categories_ = np.arange(index.max() + 1)
        else:
            self.categories_, index = np.unique(np.asarray(category), return_inverse=True)
        self._fit_gaussians(projected, index)
        if category is None:
            index = self._settle(projected, self.predict(descriptor)[0])
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

    def discover_more(self, descriptor: np.ndarray, random_state: int = 0) -> np.ndarray:
        """Labels (n,) of new kinds among images that belong to no known category."""
        index, _ = discover(self._project(descriptor), random_state)
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
        white = self._whiten(descriptor)
        distance = np.sqrt(np.square(white[:, None] - self.means_[None]).sum(-1))
        index = distance.argmin(1)
        return index, distance[np.arange(len(index)), index]

    def _fit_scaling(self, descriptor: np.ndarray, random_state: int) -> None:
        self.center_ = descriptor.mean(0)
        scale = descriptor.std(0)
        self.scale_ = np.where(scale > 1e-6 * max(scale.max(), 1e-12), scale, 1.0)
        scaled = (descriptor - self.center_) / self.scale_
        n_components = min(32, len(descriptor), descriptor.shape[1])
        rows = _subsample(len(scaled), random_state)
        with np.errstate(invalid="ignore"):  # images that are all the same
            pca = PCA(min(n_components, len(rows)), svd_solver="full").fit(scaled[rows])
        self.components_ = pca.components_.T

    def _project(self, descriptor: np.ndarray) -> np.ndarray:
        # Row by row in float64: a matrix product's last bits may depend on how many rows it has.
        scaled = (np.asarray(descriptor, dtype=np.float64) - self.center_) / self.scale_
        return np.stack([row @ self.components_ for row in scaled])

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


def discover(projected: np.ndarray, random_state: int = 0) -> tuple[np.ndarray, float]:
    """Find the kinds of object in a set of descriptors, and how many there are.

    k-means for k = 2, 3, ...; the k with the largest mean silhouette wins if that is at least 0.4 and no
    part has fewer than 5 images, otherwise everything is one category. One image in fifty, or a single one, may lie
    in smaller parts: these are broken or foreign images, not categories. At most 2,000 images are looked at.

    Returns
    -------
    index : ndarray of shape (n,), int64
    silhouette : float
    """
    n = len(projected)
    rows = _subsample(n, random_state)
    sample = projected[rows]
    best, best_score, waited = None, MIN_SILHOUETTE, 0
    n_distinct = len(np.unique(sample, axis=0))
    for k in range(2, min(MAX_CATEGORIES, len(sample) // MIN_CATEGORY_SIZE, n_distinct) + 1):
        kmeans = KMeans(k, n_init=4, random_state=random_state).fit(sample)
        is_category = np.bincount(kmeans.labels_, minlength=k) >= MIN_CATEGORY_SIZE
        placed = is_category[kmeans.labels_]
        if is_category.sum() < 2 or (~placed).sum() > max(1, MAX_ODD_IMAGES * len(sample)):
            score = -1.0
        else:
            score = float(silhouette_score(sample[placed], kmeans.labels_[placed]))
        waited = 0 if score > best_score else waited + 1
        if score > best_score:
            best, best_score = kmeans.cluster_centers_[is_category], score
        if waited >= 12:
            break
    if best is None:
        return np.zeros(n, dtype=np.int64), 0.0
    return pairwise_distances_argmin(projected, best).astype(np.int64), best_score


def _subsample(n: int, random_state: int) -> np.ndarray:
    if n <= MAX_DISCOVERY_IMAGES:
        return np.arange(n)
    return np.sort(np.random.RandomState(random_state).choice(n, MAX_DISCOVERY_IMAGES, replace=False))
