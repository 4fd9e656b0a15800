"""Pictures of what a detector found, in the manner of scikit-learn's displays; matplotlib is needed to plot them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vqad.base import BaseImageDetector
from vqad.images import check_images
from vqad.model_selection import unwrapped
from vqad.report import judge, overlay
from vqad.report._figures import draw_histograms, figure_size, set_title, tidy
from vqad.report._verdicts import sequence_of

__all__ = ["AnomalyMapDisplay", "CodebookDisplay", "ScoreDistributionDisplay"]

IMAGE_INCHES = 1.6
HISTOGRAM_INCHES = 1.35
THUMBNAIL_INCHES = 0.58
# White around a thumbnail, and below it for its share, in parts of its side.
GAP, CAPTION = 0.08, 0.36


class AnomalyMapDisplay:
    """Images, and below them the same images with their anomaly maps drawn over them.

    Make it with `from_estimator` or `from_predictions`. The colours of `vqad.report.overlay` are on one scale for all
    images: transparent at 0, orange at the threshold, dark red from twice the threshold on; a line surrounds what is
    over the threshold.

    Parameters
    ----------
    images : sequence of n arrays of shape (H_i, W_i) or (H_i, W_i, C)
        uint8, or float in 0..1.
    maps : sequence of n arrays of shape (H_i, W_i)
        Higher is more anomalous.
    map_threshold : float
        Values over it are anomalous.
    titles : sequence of n str, default=None
        What is written over each image.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of shape (2, n) or (n,) of matplotlib Axes
        Images above, overlays below; or overlays alone.

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
            raise ValueError(f"titles must have one entry an image, {len(images)}; got {len(titles)}.")
        self.images = images
        self.maps = maps
        self.map_threshold = map_threshold
        self.titles = titles

    @classmethod
    def from_estimator(cls, estimator: Any, X: Any, y: ArrayLike | None = None, *, ax: Any = None) -> AnomalyMapDisplay:
        """Map images with a fitted detector, and plot.

        Parameters
        ----------
        estimator : detector of vqad
            Fitted on images; or a `Pipeline` or a search that ends in one.
        X : images of length n
            In any form that the estimator takes. A few: all of them are read and shown in one row.
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies, to be named in the titles.
        ax : array-like of matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        AnomalyMapDisplay

        Raises
        ------
        TypeError
            When the estimator is no detector of vqad.
        ValueError
            When the detector was fitted on features, or y has another length than X.
        """
        _matplotlib(cls)
        detector, X = _detector_and_images(cls, estimator, X)
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
        """Plot maps that are at hand, of any detector.

        Parameters
        ----------
        images : images of length n
            Any of the forms that the detectors take.
        maps : sequence of n arrays of shape (H_i, W_i)
            Higher is more anomalous; of the images' sizes, as ``anomaly_map`` returns them.
        map_threshold : float
            Values over it are anomalous.
        titles : sequence of n str, default=None
            What is written over each image.
        ax : array-like of matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        AnomalyMapDisplay
        """
        _matplotlib(cls)
        checked = check_images(images)
        pixels = [checked.pixels(i) for i in range(len(checked))]
        return cls(pixels, maps, map_threshold=map_threshold, titles=titles).plot(ax)

    def plot(self, ax: Any = None) -> AnomalyMapDisplay:
        """Draw.

        Parameters
        ----------
        ax : array-like of matplotlib Axes of shape (2, n) or (n,), or one Axes for one image, default=None
            With two rows, images are drawn in the first one and overlays in the second one, otherwise overlays alone.
            None: a new figure of two rows.

        Returns
        -------
        self : AnomalyMapDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = _matplotlib(type(self))
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
    """Histograms of image scores with the threshold that decides.

    Make it with `from_estimator` or `from_predictions`. Scores are shown as anomaly scores, ``-score_samples``:
    right of the threshold is anomalous. All histograms have the same bins; scores far beyond the threshold share the
    last bar, and the axis says so.

    Parameters
    ----------
    anomaly_score : ndarray of shape (n,)
        Higher is more anomalous.
    threshold : ndarray of shape (n,)
        Each image's threshold.
    y : ndarray of shape (n,), default=None
        +1 for normal images, -1 for anomalies: they get different colours.
    category : ndarray of shape (n,), default=None
        Kind of object of each image; each kind gets a histogram of its own. None: one for all.

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
            Whether to draw a histogram for each category that images are judged as.
        ax : matplotlib Axes or array-like of them, default=None
            As for `plot`.

        Returns
        -------
        ScoreDistributionDisplay

        Raises
        ------
        TypeError
            When the estimator is no detector of vqad.
        ValueError
            When y has another length than X, or values other than +1 and -1.
        """
        _matplotlib(cls)
        detector, X = _detector_and_images(cls, estimator, X)
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
        """Plot scores that are at hand, of any detector.

        Parameters
        ----------
        anomaly_score : array-like of shape (n,)
            Higher is more anomalous: ``-score_samples``.
        threshold : float or array-like of shape (n,)
            Scores over it are anomalous: ``-offset_``.
        y : array-like of shape (n,), default=None
            +1 for normal images, -1 for anomalies.
        category : array-like of shape (n,), default=None
            Kind of object of each image; each kind gets a histogram of its own.
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
        _matplotlib(cls)
        score = np.asarray(anomaly_score, dtype=float)
        if score.ndim != 1 or not len(score) or not np.isfinite(score).all():
            raise ValueError(f"anomaly_score must be finite numbers of shape (n,), n > 0; got shape {score.shape}.")
        threshold = np.broadcast_to(np.asarray(threshold, dtype=float), score.shape)
        y = None if y is None else _labels(y, len(score))
        if category is not None and len(category := np.asarray(category)) != len(score):
            raise ValueError(f"category has {len(category)} entries for {len(score)} scores.")
        return cls(score, threshold, y=y, category=category).plot(ax)

    def plot(self, ax: Any = None) -> ScoreDistributionDisplay:
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, or array-like of one Axes for each category, default=None
            None: a new figure, one histogram under the other.

        Returns
        -------
        self : ScoreDistributionDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = _matplotlib(type(self))
        group = np.full(len(self.anomaly_score), "all") if self.category is None else self.category
        n = len(np.unique(group))
        is_new = ax is None
        if is_new:
            size = figure_size(n, HISTOGRAM_INCHES)
            _, ax = pyplot.subplots(n, 1, figsize=size, layout="constrained", sharex=True, squeeze=False)
        axes = np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != n:
            raise ValueError(f"ax must hold one Axes for each of {n} categories; got {len(axes)}.")
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


class CodebookDisplay:
    """The normal patches that the most used codes stand for, with the share of the cells that have each.

    Make it with `from_estimator`. Each picture is the patch of the normal images that is nearest to a code: a cell and
    what is around it. The number under it is the share of all cells of the normal images that have the code.

    Parameters
    ----------
    thumbnails : sequence of G arrays of shape (n_g, s, s, 3), uint8
        Of each group of codes, the most used first.
    shares : sequence of G arrays of shape (n_g,)
        Of the cells, in 0..1.
    titles : sequence of G str, default=None
        What is written over each group.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : ndarray of shape (G,) of matplotlib Axes

    See Also
    --------
    vqad.prototypes.Prototypes : Where the patches come from, and how many are kept.
    AnomalyMapDisplay : Images with their anomaly maps.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.datasets import make_textured_parts
    >>> from vqad.display import CodebookDisplay
    >>> parts = make_textured_parts(n_normal=20, n_anomalous=0, categories=["tile"], image_size=64, random_state=0)
    >>> detector = HVQTransDetector(image_size=64, d_model=16, n_codes=8, max_iter=1, false_alarm_rate=0.2)
    >>> display = CodebookDisplay.from_estimator(detector.fit(parts.images), n_codes=4)
    >>> display.axes_.shape
    (1,)
    """

    def __init__(self, thumbnails: Any, shares: Any, *, titles: Any = None) -> None:
        if not len(thumbnails) or [len(t) for t in thumbnails] != [len(s) for s in shares]:
            raise ValueError("thumbnails and shares must have the same lengths, one or more groups of each.")
        if titles is not None and len(titles) != len(thumbnails):
            raise ValueError(f"titles must have one entry a group, {len(thumbnails)}; got {len(titles)}.")
        self.thumbnails = thumbnails
        self.shares = shares
        self.titles = titles

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        codebook: str | None = None,
        category: Any = None,
        n_codes: int = 24,
        n_columns: int = 12,
        ax: Any = None,
    ) -> CodebookDisplay:
        """Draw the prototypes of a fitted detector.

        Parameters
        ----------
        estimator : detector of vqad
            Fitted on images; or a `Pipeline` or a search that ends in one.
        codebook : str, default=None
            One of ``prototypes_.codebooks``, such as "level_0" or "pattern_1"; the first of them when left out.
        category : str or int, default=None
            The category whose codes to show; when left out all groups of codes are shown, one below the other.
        n_codes : int, default=24
            Codes to show of each group, at most.
        n_columns : int, default=12
            As for `plot`.
        ax : matplotlib Axes or array-like of them, default=None
            As for `plot`.

        Returns
        -------
        CodebookDisplay

        Raises
        ------
        TypeError
            When the estimator is no detector of vqad.
        ValueError
            When there is no such codebook or category, or there are no thumbnails, as after a fit on features.
        """
        _matplotlib(cls)
        detector, _ = _detector_and_images(cls, estimator)
        prototypes = detector.prototypes_
        if not len(prototypes.thumbnails):
            raise ValueError(
                "The detector keeps no thumbnails of its prototypes: it was fitted on features, or they were forgotten."
            )
        codebook = prototypes.codebooks[0] if codebook is None else codebook
        names = _names_of_groups(detector)
        groups = range(len(names)) if category is None else [_group_of(detector, category)]
        thumbnails, shares, titles = [], [], []
        for group in groups:
            used = prototypes.most_used(codebook, group)
            found = [(code, prototypes.get(codebook, code, group)) for code in used.tolist()]
            shown = [each for _, each in found if each.thumbnail is not None][:n_codes]
            n_cells = sum(each.usage for _, each in found)
            share = np.array([each.usage / n_cells for each in shown])
            thumbnails.append([each.thumbnail for each in shown])
            shares.append(share)
            titles.append(
                f"{names[group]}, {codebook}: {len(shown)} of {len(used)} codes in use, {share.sum():.0%} of the cells"
            )
        return cls(thumbnails, shares, titles=titles).plot(ax, n_columns=n_columns)

    def plot(self, ax: Any = None, *, n_columns: int = 12) -> CodebookDisplay:
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes, or array-like of one Axes for each group, default=None
            None: a new figure, one group under the other.
        n_columns : int, default=12
            Pictures in a row.

        Returns
        -------
        self : CodebookDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = _matplotlib(type(self))
        n = len(self.thumbnails)
        rows = [max(1, -(-len(thumbnails) // n_columns)) for thumbnails in self.thumbnails]
        if ax is None:
            height = sum(rows) * (1 + CAPTION) * THUMBNAIL_INCHES + 0.4 * n
            size = (n_columns * (1 + GAP) * THUMBNAIL_INCHES, height)
            _, ax = pyplot.subplots(
                n, 1, figsize=size, layout="constrained", squeeze=False, gridspec_kw={"height_ratios": rows}
            )
        axes = np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != n:
            raise ValueError(f"ax must hold one Axes for each of {n} groups of codes; got {len(axes)}.")
        for k, axis in enumerate(axes):
            for place, (thumbnail, share) in enumerate(zip(self.thumbnails[k], self.shares[k])):
                row, col = divmod(place, n_columns)
                left, top = col * (1 + GAP), row * (1 + CAPTION)
                axis.imshow(thumbnail, extent=(left, left + 1, top + 1, top))
                text = f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
                axis.text(left + 0.5, top + 1.04, text, ha="center", va="top", fontsize=6, color="0.35")
            axis.set(xlim=(0, n_columns * (1 + GAP) - GAP), ylim=(rows[k] * (1 + CAPTION), 0), aspect="equal")
            axis.set_axis_off()
            if self.titles is not None:
                set_title(axis, self.titles[k], fontsize=8, loc="left")
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


_NAMES = {1: "normal", -1: "anomalous"}


def _labels(y: ArrayLike, n: int) -> np.ndarray:
    y = np.asarray(y)
    if y.shape != (n,):
        raise ValueError(f"y must have one label for each of {n} images; got shape {y.shape}.")
    if not np.isin(y, (1, -1)).all():
        raise ValueError(f"y must be +1 (normal) or -1 (anomaly); got {list(dict.fromkeys(y.tolist()))[:5]}.")
    return y


def _names_of_groups(detector: BaseImageDetector) -> list[str]:
    """What each group of codes is for: its category, or all that share it."""
    group = detector.model_.group_of(np.arange(len(detector.categories_)))
    names = [detector.categories_[group == g].tolist() for g in range(group.max() + 1)]
    return [str(own[0]) if len(own) == 1 else "all categories" if len(own) == len(group) else
            f"{len(own)} categories" for own in names]  # fmt: skip


def _group_of(detector: BaseImageDetector, category: Any) -> int:
    known = detector.categories_.tolist()
    if category not in known:
        raise ValueError(f"category must be one of {', '.join(map(repr, known))}; got {category!r}.")
    return int(detector.model_.group_of(np.array([known.index(category)]))[0])


def _detector_and_images(display: type, estimator: Any, X: Any = None) -> tuple[BaseImageDetector, Any]:
    """The detector at the end of a pipeline or a search, and X as it comes to it."""
    detector, X = unwrapped(estimator, X)
    if not isinstance(detector, BaseImageDetector):
        instead = " from_predictions takes the scores or maps of any detector."
        raise TypeError(
            f"{display.__name__}.from_estimator takes a detector of vqad; got {type(detector).__name__}."
            + (instead if hasattr(display, "from_predictions") else "")
        )
    return detector, X


def _matplotlib(display: type) -> Any:
    """pyplot, imported when something is drawn."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{display.__name__} needs matplotlib: pip install vqad[report], or matplotlib.") from error
    return pyplot
