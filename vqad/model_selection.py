"""Splitters and scorers for detectors that learn from normal images, for scikit-learn's search and validation tools.

For example::

    search = GridSearchCV(detector, {"n_codes": [64, 512]}, cv=InlierKFold(), scoring=image_auroc_scorer)
    search.fit(images, y)

Labels are +1 for normal images and -1 for anomalies. All scorers take anomalies as the positive class. Of
scikit-learn's own scorers, "roc_auc" is the same with either class as positive and can be used too;
"average_precision" and "f1" take normal images as the positive class.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import make_scorer
from sklearn.model_selection import BaseCrossValidator
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state, indexable
from sklearn.utils.metadata_routing import UNUSED

from vqad._checks import check_groups
from vqad.metrics import (
    aupro,
    image_auroc,
    image_average_precision,
    image_f1_max,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_max,
)
from vqad.metrics._evaluation import split_by

__all__ = [
    "InlierKFold",
    "PixelScorer",
    "image_auroc_scorer",
    "image_average_precision_scorer",
    "image_f1_max_scorer",
]


class InlierKFold(BaseCrossValidator):
    """K-fold cross-validation that trains on normal samples only and tests on normal samples and anomalies.

    Normal samples and anomalies are each divided over the folds as in `KFold`. Each fold is tested on its share of both
    and trained on the normal samples of the other folds. So every sample is tested exactly once, as `cross_val_predict`
    requires.

    Parameters
    ----------
    n_splits : int, default=5
        Number of folds, at least 2 and at most the number of normal samples, or of groups with a normal sample.
    shuffle : bool, default=True
        Whether to assign samples to folds at random. Otherwise folds are consecutive samples: if images are sorted by
        category and `category` is not passed, a whole category may be missing from training.
    random_state : int, RandomState instance or None, default=None
        Draws the folds; an int makes every call of `split` return the same ones. Only with ``shuffle=True``.

    Notes
    -----
    Scores on training folds are undefined because these have no anomalies: set ``return_train_score=False`` in
    `HalvingGridSearchCV`, which computes them by default.

    If y is passed, `cross_val_predict` with ``method="decision_function"`` needs classes, which outlier detectors do
    not have. Create the folds first and leave y out:
    ``cross_val_predict(detector, X, cv=list(InlierKFold().split(X, y)), method="decision_function")``.

    With metadata routing, `groups` is requested by default, as by scikit-learn's own group splitters; `category` must
    be requested.

    Examples
    --------
    >>> import numpy as np
    >>> from vqad.model_selection import InlierKFold
    >>> y = np.array([1, 1, 1, 1, -1, -1])
    >>> for train, test in InlierKFold(2, shuffle=False).split(np.zeros((6, 3)), y):
    ...     print(train, test)
    [2 3] [0 1 4]
    [0 1] [2 3 5]
    """

    __metadata_request__split = {"groups": True}

    def __init__(self, n_splits: int = 5, *, shuffle: bool = True, random_state: Any = None) -> None:
        if not isinstance(n_splits, Integral) or isinstance(n_splits, bool) or n_splits < 2:
            raise ValueError(f"n_splits must be an int of at least 2; got {n_splits!r}.")
        if not isinstance(shuffle, bool):
            raise TypeError(f"shuffle must be True or False; got {shuffle!r}.")
        if not shuffle and random_state is not None:
            raise ValueError("random_state has no effect with shuffle=False: leave it None, or set shuffle=True.")
        self.n_splits = int(n_splits)
        self.shuffle = shuffle
        self.random_state = random_state

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None, *, category: Any = None) -> int:
        """Return the number of folds; the arguments are not used."""
        return self.n_splits

    def split(
        self, X: Any, y: Any = None, groups: Any = None, *, category: ArrayLike | None = None
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Generate the rows to train on and to test on, fold by fold.

        Parameters
        ----------
        X : indexable of length n
            Only its length is used.
        y : array-like of shape (n,)
            +1 for normal samples, -1 for anomalies.
        groups : array-like of shape (n,), default=None
            Which samples belong together, such as several pictures of one piece: each group stays in one fold. Then
            groups, not samples, are divided evenly over the folds: groups of normal samples, of anomalies, and of both,
            each separately. A group has the category of its first sample.
        category : array-like of shape (n,), default=None
            Category of each sample: each category is divided evenly over the folds, normal samples and anomalies
            separately. In `GridSearchCV` and similar tools it needs metadata routing and
            ``InlierKFold().set_split_request(category=True)``.

        Yields
        ------
        train : ndarray of int
            Normal samples of the other folds, in increasing order.
        test : ndarray of int
            Samples of the fold, normal ones and anomalies, in increasing order.

        Raises
        ------
        ValueError
            When y is missing or has other values; when there are fewer normal samples, or groups with one, than folds;
            when y, groups or category and X differ in length; or when a group or category is missing.
        """
        X, y, groups, category = indexable(X, y, groups, category)
        y = self._check_y(y)
        kind = split_by(category, len(y))[1]
        group = check_groups(groups, len(y))
        if group is None:
            folds = self._deal(y, kind)
        else:
            total, size = np.bincount(group, weights=y), np.bincount(group)
            label = np.where(total == size, 1, np.where(total == -size, -1, 0))
            n_normal = np.count_nonzero(label >= 0)
            if n_normal < self.n_splits:
                raise ValueError(
                    f"n_splits={self.n_splits} folds need as many groups with a normal sample (y = +1); got {n_normal}."
                )
            folds = self._deal(label, kind[np.unique(group, return_index=True)[1]])[group]
        for fold in range(self.n_splits):
            yield np.flatnonzero((folds != fold) & (y == 1)), np.flatnonzero(folds == fold)

    def _check_y(self, y: Any) -> NDArray[Any]:
        if y is None:
            raise ValueError("InlierKFold needs y (+1 for normal samples, -1 for anomalies); got None.")
        y = np.asarray(y)
        if y.ndim != 1:
            raise ValueError(f"y must have one label for each sample, shape (n,); got shape {y.shape}.")
        if not np.isin(y, (-1, 1)).all():
            raise ValueError(f"y must be +1 (normal) or -1 (anomaly); got {list(dict.fromkeys(y.tolist()))[:5]}.")
        n_normal = np.count_nonzero(y == 1)
        if n_normal < self.n_splits:
            raise ValueError(f"n_splits={self.n_splits} folds need as many normal samples (y = +1); got {n_normal}.")
        return y

    def _deal(self, y: NDArray[Any], kind: NDArray[Any]) -> NDArray[np.intp]:
        """Fold of each sample: the sizes of folds differ by at most one, within each kind and over all kinds.

        Groups with both labels, y = 0, continue where normal samples ended, so that every fold gets normal samples.
        """
        rng = check_random_state(self.random_state)
        folds = np.empty(len(y), dtype=np.intp)
        for label, start in ((1, 0), (0, np.count_nonzero(y == 1)), (-1, 0)):
            rows = np.flatnonzero(y == label)
            rows = rng.permutation(rows) if self.shuffle else rows
            rows = rows[np.argsort(kind[rows], kind="stable")]
            dealt = (start + np.arange(len(rows))) % self.n_splits
            # Within a kind, sort the folds, so that folds without shuffling are consecutive samples.
            folds[rows] = dealt[np.lexsort((dealt, kind[rows]))]
        return folds


def _image_auroc(y_true, y_score):
    return _with_both_labels(image_auroc, y_true, y_score)


def _image_average_precision(y_true, y_score):
    return _with_both_labels(image_average_precision, y_true, y_score)


def _image_f1_max(y_true, y_score):
    return _with_both_labels(image_f1_max, y_true, y_score)


def _with_both_labels(metric, y_true, y_score):
    """Anomaly metric of scores that are higher for normal images; nan, as in scikit-learn, if y has only one label."""
    if len(np.unique(y_true)) == 1:
        return _undefined(f"{metric.__name__} needs normal images and anomalies, but y is {y_true[0]:+g} throughout")
    return metric(y_true, -y_score)


def _undefined(reason: str) -> float:
    message = (
        f"{reason}: the score is nan. For test folds with both labels use cv=InlierKFold(); its training folds have no "
        "anomalies, so set return_train_score=False."
    )
    warnings.warn(message, UndefinedMetricWarning, stacklevel=2)
    return float("nan")


# For ``scoring=``: metrics of ``decision_function`` with anomalies as the positive class; see `vqad.metrics`. Nan, with
# an UndefinedMetricWarning, if y has only one label.
image_auroc_scorer = make_scorer(_image_auroc, response_method="decision_function")
image_average_precision_scorer = make_scorer(_image_average_precision, response_method="decision_function")
image_f1_max_scorer = make_scorer(_image_f1_max, response_method="decision_function")

_PIXEL_METRICS = {
    "aupro": aupro,
    "pixel_auroc": pixel_auroc,
    "pixel_average_precision": pixel_average_precision,
    "pixel_f1_max": pixel_f1_max,
}


class PixelScorer(BaseEstimator):
    """Scorer of ``anomaly_map`` against defect masks, for ``scoring=``.

    If X is a `vqad.datasets.ImageDataset`, masks come with it (and are split with it). For other X they are metadata:
    enable scikit-learn's metadata routing, request them, and pass them to ``fit``::

        with sklearn.config_context(enable_metadata_routing=True):
            scorer = PixelScorer("aupro").set_score_request(masks=True)
            GridSearchCV(detector, grid, cv=InlierKFold(), scoring=scorer).fit(images, y, masks=masks)

    Parameters
    ----------
    metric : {"aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max"}, default="aupro"
        Function of `vqad.metrics`.
    fpr_limit : float, default=0.3
        In (0, 1]: false-positive rate up to which "aupro" integrates; not used by the others.
    """

    # A scorer's request is that of its score method, whose first argument is not metadata.
    __metadata_request__score = {"estimator": UNUSED}

    def __init__(self, metric: str = "aupro", *, fpr_limit: float = 0.3) -> None:
        self.metric = metric
        self.fpr_limit = fpr_limit

    def __call__(self, estimator: Any, X: Any, y: Any = None, *, masks: Any = None) -> float:
        """Same as `score`."""
        return self.score(estimator, X, y, masks=masks)

    def score(self, estimator: Any, X: Any, y: Any = None, *, masks: Any = None) -> float:
        """Measure the anomaly maps of a fitted detector.

        Parameters
        ----------
        estimator : detector
            Fitted, with a method ``anomaly_map``; or a `Pipeline` or a search over one.
        X : images of length n
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies.
        masks : array of shape (n, H, W), or sequence of n arrays of shape (H_i, W_i), default=None
            True on defect pixels, of the size of the maps. If the mask of an image is None, the image has no defect if
            y is +1, and is left out otherwise. None takes the masks from X.

        Returns
        -------
        float
            Higher is better; nan, with an `UndefinedMetricWarning`, if no mask marks a defect.

        Raises
        ------
        ValueError
            When there are no masks, when they differ from X in length or from the maps in size, or the metric is
            unknown.
        TypeError
            When the estimator has no method ``anomaly_map``.
        """
        if self.metric not in _PIXEL_METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, _PIXEL_METRICS))}; got {self.metric!r}.")
        masks = self._masks_of(X) if masks is None else masks
        if len(masks) != len(X):
            raise ValueError(f"masks has {len(masks)} entries, but X has {len(X)} images.")
        if not any(mask is not None and np.any(mask) for mask in masks):
            return _undefined(f"{self.metric} needs a defect, but the masks mark none")
        maps = _anomaly_map(estimator, X)
        normal = np.zeros(len(X), dtype=bool) if y is None else np.asarray(y) == 1
        masks = [
            np.zeros(np.shape(values), dtype=bool) if mask is None and fine else mask
            for mask, values, fine in zip(masks, maps, normal)
        ]
        options = {"fpr_limit": self.fpr_limit} if self.metric == "aupro" else {}
        return _PIXEL_METRICS[self.metric](masks, maps, **options)

    def _masks_of(self, X: Any) -> list[Any]:
        if callable(getattr(X, "masks", None)):
            return X.masks()
        raise ValueError(
            "PixelScorer needs defect masks: pass masks=, in a search by metadata routing with "
            "set_score_request(masks=True); or pass images as a vqad.datasets collection with masks."
        )


def _anomaly_map(estimator: Any, X: Any) -> Any:
    """Maps of a detector, which may be in a pipeline or a search."""
    estimator, X = unwrapped(estimator, X)
    if not hasattr(estimator, "anomaly_map"):
        raise TypeError(f"PixelScorer needs a detector with anomaly_map; {type(estimator).__name__} has none.")
    return estimator.anomaly_map(X)


def unwrapped(estimator: Any, X: Any = None) -> tuple[Any, Any]:
    """The last step of a pipeline or a search, and X, if given, as it arrives there."""
    if hasattr(estimator, "best_estimator_"):
        return unwrapped(estimator.best_estimator_, X)
    if isinstance(estimator, Pipeline):
        as_it_is = X is None or len(estimator) == 1
        return unwrapped(estimator[-1], X if as_it_is else estimator[:-1].transform(X))
    return estimator, X
