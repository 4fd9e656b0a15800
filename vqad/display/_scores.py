"""Anomaly maps over their images, and histograms of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vqad.display._common import detector_and_images, pyplot_for
from vqad.images import check_images
from vqad.report import judge, overlay
from vqad.report._figures import draw_histograms, figure_size, set_title, tidy
from vqad.verdicts import sequence_of

IMAGE_INCHES = 1.6
HISTOGRAM_INCHES = 1.35


class AnomalyMapDisplay:
    """Images, and below them the same images overlaid with their anomaly maps.

    Create it with `from_estimator` or `from_predictions`. The colours of `vqad.report.overlay` have one scale for all
    images: transparent at 0, orange at the threshold, dark red from twice the threshold. A line surrounds the areas
    above the threshold.

    Parameters
    ----------
    images : sequence of n arrays of shape (H_i, W_i) or (H_i, W_i, C)
        uint8, or float in 0..1.
    maps : sequence of n arrays of shape (H_i, W_i)
        Higher is more anomalous.
    map_threshold : float
        Values above it are anomalous.
    titles : sequence of n str, default=None
        Title of each image.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of shape (2, n) or (n,) of matplotlib Axes
        Images above, overlays below; or only overlays.

    See Also
    --------
    ScoreDistributionDisplay : Histograms of image scores.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.datasets import make_textured_parts
    >>> from vqad.display import AnomalyMapDisplay
    >>> parts = make_textured_parts(n_normal=20, n_anomalous=2, categories=["tile"], image_size=64, random_state=0)
    >>> detector = HVQTransDetector(image_size=64, d_model=16, n_codes=8, max_iter=1, false_alarm_rate=0.2)
    >>> detector = detector.fit(parts.images[:20])
    >>> display = AnomalyMapDisplay.from_estimator(detector, parts.images[20:])
    >>> display.axes_.shape
    (2, 2)
    """

    def __init__(self, images: Any, maps: Any, *, map_threshold: float, titles: Any = None) -> None:
        if len(images) != len(maps):
            raise ValueError(f"images and maps must have the same length; got {len(images)} and {len(maps)}.")
        if titles is not None and len(titles) != len(images):
            raise ValueError(f"titles must have one entry per image, {len(images)}; got {len(titles)}.")
        self.images = images
        self.maps = maps
        self.map_threshold = map_threshold
        self.titles = titles

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: ArrayLike | None = None, *, ax: Any = None) -> AnomalyMapDisplay:
        """Compute anomaly maps with a fitted detector, and plot them.

        Parameters
        ----------
        estimator : detector of vqad
            Fitted on images; or a `Pipeline` or a search that ends in one.
        X : images of length n
            A few images in any form that the estimator takes; all are read and shown in one row.
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies; shown in the titles.
        ax : array-like of matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        AnomalyMapDisplay

        Raises
        ------
        TypeError
            When the estimator is not a detector of vqad.
        ValueError
            When the detector was fitted on features, or y and X differ in length.
        """
        pyplot_for(cls)
        detector, X = detector_and_images(cls, estimator, X)
        images = sequence_of(detector, X)
        pixels = [images.pixels(i) for i in range(len(images))]
        verdicts = judge(detector, images)
        maps = [verdicts.anomaly_map(i, images.size(i)) for i in range(len(images))]
        titles = [
            f"{kind}: {'normal' if label == 1 else 'anomaly'}\nscore {score:.1f}, p = {p:.2g}"
            for kind, label, score, p in zip(verdicts.category, verdicts.label, verdicts.score, verdicts.p_value)
        ]
        if y is not None:
            y = _labels(y, len(titles))
            titles = [f"{title}\nlabelled {_NAMES[label]}" for title, label in zip(titles, y)]
        return cls(pixels, maps, map_threshold=detector.map_threshold_, titles=titles).plot(ax)

    @classmethod
    def from_predictions(
        cls, images: Any, maps: Any, *, map_threshold: float, titles: Any = None, ax: Any = None
    ) -> AnomalyMapDisplay:
        """Plot given maps, of any detector.

        Parameters
        ----------
        images : images of length n
            Any of the forms that the detectors take.
        maps : sequence of n arrays of shape (H_i, W_i)
            Higher is more anomalous; of the images' sizes, as ``anomaly_map`` returns them.
        map_threshold : float
            Values above it are anomalous.
        titles : sequence of n str, default=None
            Title of each image.
        ax : array-like of matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        AnomalyMapDisplay
        """
        pyplot_for(cls)
        checked = check_images(images)
        pixels = [checked.pixels(i) for i in range(len(checked))]
        return cls(pixels, maps, map_threshold=map_threshold, titles=titles).plot(ax)

    def plot(self, ax: Any = None) -> AnomalyMapDisplay:
        """Plot images and overlays.

        Parameters
        ----------
        ax : array-like of matplotlib Axes of shape (2, n) or (n,), or one Axes for one image, default=None
            With two rows, images are plotted in the first and overlays in the second; with one row, only overlays.
            None: a new figure of two rows.

        Returns
        -------
        self : AnomalyMapDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = pyplot_for(type(self))
        n = len(self.images)
        if ax is None:
            size = (IMAGE_INCHES * n, IMAGE_INCHES * 2.2 + 0.2 * self._title_lines())
            _, ax = pyplot.subplots(2, n, figsize=size, layout="constrained", squeeze=False)
        axes = np.atleast_1d(np.asarray(ax, dtype=object))
        if axes.shape not in ((2, n), (n,)):
            raise ValueError(f"ax must hold Axes in the shape (2, {n}) or ({n},) for {n} images; got {axes.shape}.")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for i, (image, anomaly_map) in enumerate(zip(self.images, self.maps)):
            column = axes[:, i] if axes.ndim == 2 else axes[i : i + 1]
            if len(column) == 2:
                column[0].imshow(image, cmap="gray")
            column[-1].imshow(overlay(image, anomaly_map, self.map_threshold))
            if self.titles is not None:
                set_title(column[0], self.titles[i], fontsize=8)
        self.axes_, self.figure_ = axes, axes.flat[0].figure
        return self

    def _title_lines(self) -> int:
        return 0 if self.titles is None else max(str(title).count("\n") + 1 for title in self.titles)


class ScoreDistributionDisplay:
    """Histograms of image scores, with the threshold.

    Create it with `from_estimator` or `from_predictions`. Scores are shown as anomaly scores, ``-score_samples``:
    images to the right of the threshold are anomalous. All histograms have the same bins; scores far beyond the
    threshold share the last bar, and the axis label says so.

    Parameters
    ----------
    anomaly_score : ndarray of shape (n,)
        Higher is more anomalous.
    threshold : ndarray of shape (n,)
        Threshold of each image.
    y : ndarray of shape (n,), default=None
        +1 for normal images, -1 for anomalies, shown in different colours.
    category : ndarray of shape (n,), default=None
        Category of each image; there is one histogram per category. None: one for all.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of shape (n_categories,) of matplotlib Axes

    See Also
    --------
    AnomalyMapDisplay : Images with their anomaly maps.

    Examples
    --------
    >>> from vqad.display import ScoreDistributionDisplay
    >>> display = ScoreDistributionDisplay.from_predictions([0.1, -0.4, 3.2], threshold=2.0, y=[1, 1, -1])
    >>> display.axes_.shape
    (1,)
    """

    def __init__(self, anomaly_score: Any, threshold: Any, *, y: Any = None, category: Any = None) -> None:
        self.anomaly_score = anomaly_score
        self.threshold = threshold
        self.y = y
        self.category = category

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Any, y: ArrayLike | None = None, *, per_category: bool = False, ax: Any = None
    ) -> ScoreDistributionDisplay:
        """Score images with a fitted detector, and plot.

        Parameters
        ----------
        estimator : detector of vqad
            Fitted; or a `Pipeline` or a search that ends in one.
        X : images of length n, or features
            In any form that the estimator takes.
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies.
        per_category : bool, default=False
            Whether to plot a histogram for each category that images are judged as.
        ax : matplotlib Axes or array-like of them, default=None
            As for `plot`.

        Returns
        -------
        ScoreDistributionDisplay

        Raises
        ------
        TypeError
            When the estimator is not a detector of vqad.
        ValueError
            When y and X differ in length, or y has values other than +1 and -1.
        """
        pyplot_for(cls)
        detector, X = detector_and_images(cls, estimator, X)
        judged = detector.judge(X, keep_maps=False)
        category = judged.category if per_category else None
        return cls.from_predictions(judged.score, threshold=judged.threshold, y=y, category=category, ax=ax)

    @classmethod
    def from_predictions(
        cls,
        anomaly_score: ArrayLike,
        *,
        threshold: ArrayLike,
        y: ArrayLike | None = None,
        category: ArrayLike | None = None,
        ax: Any = None,
    ) -> ScoreDistributionDisplay:
        """Plot given scores, of any detector.

        Parameters
        ----------
        anomaly_score : array-like of shape (n,)
            Higher is more anomalous: ``-score_samples``.
        threshold : float or array-like of shape (n,)
            Scores above it are anomalous: ``-offset_``.
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies.
        category : array-like of shape (n,), default=None
            Category of each image; there is one histogram per category.
        ax : matplotlib Axes or array-like of them, default=None
            As for `plot`.

        Returns
        -------
        ScoreDistributionDisplay

        Raises
        ------
        ValueError
            When the arguments differ in length, or y has values other than +1 and -1.
        """
        pyplot_for(cls)
        score = np.asarray(anomaly_score, dtype=float)
        if score.ndim != 1 or not len(score) or not np.isfinite(score).all():
            raise ValueError(f"anomaly_score must be finite numbers of shape (n,), n > 0; got shape {score.shape}.")
        threshold = np.broadcast_to(np.asarray(threshold, dtype=float), score.shape)
        y = None if y is None else _labels(y, len(score))
        if category is not None and len(category := np.asarray(category)) != len(score):
            raise ValueError(f"category has {len(category)} entries for {len(score)} scores.")
        return cls(score, threshold, y=y, category=category).plot(ax)

    def plot(self, ax: Any = None) -> ScoreDistributionDisplay:
        """Plot the histograms.

        Parameters
        ----------
        ax : matplotlib Axes, or array-like of one Axes per category, default=None
            None: a new figure, one histogram below the other.

        Returns
        -------
        self : ScoreDistributionDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = pyplot_for(type(self))
        group = np.full(len(self.anomaly_score), "all") if self.category is None else self.category
        n = len(np.unique(group))
        is_new = ax is None
        if is_new:
            size = figure_size(n, HISTOGRAM_INCHES)
            _, ax = pyplot.subplots(n, 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
        axes = np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != n:
            raise ValueError(f"ax must have one Axes for each of {n} categories; got {len(axes)}.")
        tidy(axes)
        draw_histograms(axes, self.anomaly_score, self.threshold, group, self.y)
        figure = axes[0].figure
        if is_new:
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
        else:
            axes[0].legend(fontsize=8, frameon=False)
        self.axes_, self.figure_ = axes, figure
        return self


_NAMES = {1: "normal", -1: "anomalous"}


def _labels(y: ArrayLike, n: int) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (n,):
        raise ValueError(f"y must have one label for each of {n} images; got shape {y.shape}.")
    if not np.isin(y, (1, -1)).all():
        raise ValueError(f"y must be +1 (normal) or -1 (anomaly); got {list(dict.fromkeys(y.tolist()))[:5]}.")
    return y
