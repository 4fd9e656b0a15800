"""Metrics with confidence intervals, and their curves, if labels are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vqad.metrics import evaluate
from vqad.metrics._evaluation import split_by
from vqad.verdicts import Verdicts

N_RESAMPLES = 400
CONFIDENCE = 0.95
FPR_LIMIT = 0.3
# Thresholds at which pixels are counted for curves and intervals; the metrics themselves are exact.
N_THRESHOLDS = 400
# Points of a drawn curve.
N_POINTS = 80
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Steps:
    """False alarms and hits of each image at or above descending thresholds.

    Attributes
    ----------
    false, hits : ndarray of shape (n, n_thresholds)
    n_false, n_hits : ndarray of shape (n,)
        Largest possible numbers of both.
    """

    false: NDArray[Any]
    hits: NDArray[Any]
    n_false: NDArray[Any]
    n_hits: NDArray[Any]

    def __getitem__(self, rows: NDArray[Any]) -> Steps:
        return Steps(self.false[rows], self.hits[rows], self.n_false[rows], self.n_hits[rows])

    def curves(self, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """False-positive and true-positive rates, (n_resamples, n_thresholds + 2), for weights (n_resamples, n)."""
        rates = []
        for part, whole in ((self.false, self.n_false), (self.hits, self.n_hits)):
            share = (weights @ part) / np.maximum(weights @ whole, 1e-12)[:, None]
            rates.append(np.pad(share, ((0, 0), (1, 1)), constant_values=(0.0, 1.0)))
        return rates[0], rates[1]


@dataclass(frozen=True)
class Curve:
    """A curve to plot, with its interval at each point."""

    title: str
    x_title: str
    y_title: str
    limit: float
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def line(self, width: float, height: float) -> str:
        """The points of the curve, for an SVG polyline."""
        return self._points(self.x, self.y, width, height)

    def band(self, width: float, height: float) -> str:
        """The points around the interval, for an SVG polygon."""
        return self._points(np.append(self.x, self.x[::-1]), np.append(self.low, self.high[::-1]), width, height)

    def _points(self, x: NDArray[Any], y: NDArray[Any], width: float, height: float) -> str:
        return " ".join(f"{a * width / self.limit:.1f},{(1 - b) * height:.1f}" for a, b in zip(x, y))


@dataclass(frozen=True)
class Evidence:
    """Rows of the table, its notes, and the curves."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    curves: list[Curve]


def evidence(
    verdicts: Verdicts, y: NDArray[Any], group: NDArray[Any], masks: Sequence[Any] | None, maps: Any
) -> Evidence:
    """Measure image scores and, if there are masks, maps, with percentile bootstrap intervals over the images.

    Parameters
    ----------
    verdicts : Verdicts
    y : ndarray of shape (n,)
        +1 normal, -1 anomaly.
    group : ndarray of shape (n,)
        Category of each image.
    masks, maps : sequence of n arrays, or None
        As for `vqad.metrics.evaluate`; read three times, one image at a time.
    """
    pixels = {} if masks is None else {"masks": masks, "maps": maps, "fpr_limit": FPR_LIMIT}
    found = evaluate(y, verdicts.score, group, **pixels)
    names, position = split_by(group, len(y))
    by_image = _image_steps(verdicts.score, y)
    by_pixel = None if masks is None else _pixel_steps(verdicts.grids, masks, maps)
    areas = {"image_auroc": _intervals(by_image, y, position, len(names), 1.0)}
    if by_pixel is not None:
        areas["aupro"] = _intervals(by_pixel, y, position, len(names), FPR_LIMIT)
    columns = sorted(found.mean, key=lambda column: column not in areas)  # those with intervals first
    rows = [
        [str(name), *(_cell(row, column, areas, k) for column in ["n_images", "n_anomalies", *columns])]
        for k, (name, row) in enumerate(found.per_category.items())
    ]
    if len(names) > 1:
        rows.append(["mean", "", "", *(_cell(found.mean, column, areas, -1) for column in columns)])
    header = ["", "images", "anomalous", *map(_title, columns)]
    curves = []
    if len(np.unique(y)) == 2:
        curves.append(
            _curve("ROC of the images", "good images called anomalous", "anomalous images found", by_image, y, 1.0)
        )
    if by_pixel is not None and by_pixel.n_hits.any():
        curves.append(
            _curve("Overlap with the defects", "good pixels called anomalous", "overlap (PRO)", by_pixel, y, FPR_LIMIT)
        )
    return Evidence(header, rows, found.notes(), curves)


def _title(column: str) -> str:
    if column == "aupro":
        return f"AUPRO to {FPR_LIMIT:g}"
    of, _, metric = column.partition("_")
    names = {"auroc": "AUROC", "average_precision": "AP", "f1_max": "F1-max"}
    return f"{of} {names[metric]}"


def _cell(row: dict[str, float], column: str, areas: dict[str, NDArray[Any]], k: int) -> str:
    value = row[column]
    if column.startswith("n_"):
        return str(value)
    if np.isnan(value):
        return "–"
    samples = areas.get(column)
    if samples is None or np.isnan(samples).all():
        return f"{value:.3f}"
    tail = (1 - CONFIDENCE) / 2
    # For the mean over categories, take the mean of each resample.
    mine = np.nanmean(samples, axis=0) if k < 0 else samples[k]
    low, high = np.quantile(mine, [tail, 1 - tail])
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _image_steps(score: NDArray[Any], y: NDArray[Any]) -> Steps:
    limits = np.unique(score)[::-1]
    if len(limits) > N_THRESHOLDS:
        limits = limits[np.linspace(0, len(limits) - 1, N_THRESHOLDS).round().astype(int)]
    over = score[:, None] >= limits
    normal = (y == 1)[:, None]
    return Steps(
        (over & normal).astype(np.float32),
        (over & ~normal).astype(np.float32),
        (y == 1).astype(float),
        (y == -1).astype(float),
    )


def _pixel_steps(grids: NDArray[Any] | list[NDArray[Any]], masks: Sequence[Any], maps: Any) -> Steps:
    # Dense at high thresholds, where PRO rises and few normal pixels remain.
    shares = np.concatenate([np.geomspace(1e-6, 0.01, N_THRESHOLDS // 2), np.linspace(0.0101, 1, N_THRESHOLDS // 2)])
    limits = np.quantile(np.concatenate([np.ravel(grid) for grid in grids]), 1 - shares)  # maps may differ in size
    n = len(grids)
    made = Steps(np.zeros((n, len(limits))), np.zeros((n, len(limits))), np.zeros(n), np.zeros(n))
    for i, (mask, heat) in enumerate(zip(masks, maps)):
        if mask is None:
            continue
        regions, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
        made.n_false[i], made.n_hits[i] = (regions == 0).sum(), count
        made.false[i] = _at_least(heat[regions == 0], None, limits)
        if count:
            inside = regions[regions > 0]
            made.hits[i] = _at_least(heat[regions > 0], 1.0 / np.bincount(inside)[inside], limits)
    return made


def _at_least(values: NDArray[Any], weights: NDArray[Any] | None, limits: NDArray[Any]) -> NDArray[Any]:
    """Weighted number of values at or above each of the descending limits."""
    place = np.searchsorted(-limits, -values)
    counts = np.bincount(place, weights, minlength=len(limits) + 1)[: len(limits)]
    return np.cumsum(counts)


def _intervals(steps: Steps, y: NDArray[Any], position: NDArray[Any], n_groups: int, limit: float) -> NDArray[Any]:
    """Area under each category's curve in each resample, (n_groups, n_resamples); nan if undefined."""
    areas = np.full((n_groups, N_RESAMPLES), np.nan)
    for g in range(n_groups):
        mine = position == g
        if steps.n_false[mine].any() and steps.n_hits[mine].any():
            areas[g] = _areas(*steps[mine].curves(_resamples(y[mine])), limit)
    return areas


def _resamples(y: NDArray[Any]) -> NDArray[np.float64]:
    """How often each image is drawn, (n_resamples, n), stratified by label."""
    rng, weights = np.random.RandomState(0), np.zeros((N_RESAMPLES, len(y)))
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        weights[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=N_RESAMPLES)
    return weights


def _areas(false: NDArray[Any], hits: NDArray[Any], limit: float) -> NDArray[Any]:
    out = np.empty(len(false))
    for k, (x, height) in enumerate(zip(false, hits)):
        inside = np.searchsorted(x, limit, side="right")
        end = np.interp(limit, x, height)
        xs, heights = np.append(x[:inside], limit), np.append(height[:inside], end)
        out[k] = (np.diff(xs) @ (heights[1:] + heights[:-1])) / 2 / limit
    return out


def _curve(title: str, x_title: str, y_title: str, steps: Steps, y: NDArray[Any], limit: float) -> Curve:
    """The curve over all images, with the interval of its height at each point."""
    (x,), (height,) = steps.curves(np.ones((1, len(y))))
    false, hits = steps.curves(_resamples(y))
    at = np.linspace(0, limit, N_POINTS)
    drawn = np.array([_heights(at, a, b) for a, b in zip(false, hits)])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return Curve(title, x_title, y_title, limit, at, _heights(at, x, height), low, high)


def _heights(at: NDArray[Any], x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Height of a rising curve at given x: at a vertical step its upper end."""
    last = np.searchsorted(x, at, side="right") - 1
    nxt = np.minimum(last + 1, len(x) - 1)
    span = x[nxt] - x[last]
    share = np.divide(at - x[last], span, out=np.zeros(len(at)), where=span > 0)
    return y[last] + share * (y[nxt] - y[last])
