"""The most used codes of a detector, shown as the normal patches that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np

from vqad.base import BaseImageDetector
from vqad.display._common import detector_and_images, pyplot_for
from vqad.report._figures import set_title

THUMBNAIL_INCHES = 0.58
# White space around a thumbnail, and below it for its share, as fractions of its side.
GAP, CAPTION = 0.08, 0.36


class CodebookDisplay:
    """The normal patches that the most used codes stand for, with the share of cells that have each code.

    Create it with `from_estimator`. Each picture shows the patch of the normal images that is nearest to a code: a cell
    and its surroundings. The number under it is the share of all cells of the normal images that have the code.

    Parameters
    ----------
    thumbnails : sequence of G arrays of shape (n_g, s, s, 3), uint8
        Pictures of each group of codes, the most used first.
    shares : sequence of G arrays of shape (n_g,)
        Share of the cells that have each code, in 0..1.
    titles : sequence of G str, default=None
        Title of each group.

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
            raise ValueError("thumbnails and shares must have the same lengths, with at least one group.")
        if titles is not None and len(titles) != len(thumbnails):
            raise ValueError(f"titles must have one entry per group, {len(thumbnails)}; got {len(titles)}.")
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
        """Plot the prototypes of a fitted detector.

        Parameters
        ----------
        estimator : detector of vqad
            Fitted on images; or a `Pipeline` or a search that ends in one.
        codebook : str, default=None
            One of ``prototypes_.codebooks``, such as "level_0" or "pattern_1"; None: the first of them.
        category : str or int, default=None
            Category whose codes to show; None: all groups of codes, one below the other.
        n_codes : int, default=24
            Largest number of codes to show per group.
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
            When the estimator is not a detector of vqad.
        ValueError
            When there is no such codebook or category, or there are no thumbnails, as after a fit on features.
        """
        pyplot_for(cls)
        detector, _ = detector_and_images(cls, estimator)
        prototypes = detector.prototypes_
        if not len(prototypes.thumbnails):
            raise ValueError(
                "The detector has no thumbnails of its prototypes: it was fitted on features, or forget_thumbnails was "
                "called."
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
        """Plot the pictures.

        Parameters
        ----------
        ax : matplotlib Axes, or array-like of one Axes per group, default=None
            None: a new figure, one group below the other.
        n_columns : int, default=12
            Pictures per row.

        Returns
        -------
        self : CodebookDisplay
            With the attributes ``figure_`` and ``axes_``.
        """
        pyplot = pyplot_for(type(self))
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
            raise ValueError(f"ax must have one Axes for each of {n} groups of codes; got {len(axes)}.")
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


def _names_of_groups(detector: BaseImageDetector) -> list[str]:
    """Title of each group of codes: its category, or how many categories share it."""
    group = detector.model_.group_of(np.arange(len(detector.categories_)))
    names = [detector.categories_[group == g].tolist() for g in range(group.max() + 1)]
    return [str(own[0]) if len(own) == 1 else "all categories" if len(own) == len(group) else
            f"{len(own)} categories" for own in names]  # fmt: skip


def _group_of(detector: BaseImageDetector, category: Any) -> int:
    known = detector.categories_.tolist()
    if category not in known:
        raise ValueError(f"category must be one of {', '.join(map(repr, known))}; got {category!r}.")
    return int(detector.model_.group_of(np.array([known.index(category)]))[0])
