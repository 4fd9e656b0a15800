"""All metrics, per category and averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqad._checks import check_none_missing
from vqad.metrics._image import check_image_scores, image_auroc, image_average_precision, image_f1_max
from vqad.metrics._pixel import aupro_of, auroc_of, average_precision_of, check_fpr_limit, f1_max_of
from vqad.metrics._pixel_counts import PixelCounts, count_pixels

_IMAGE_METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "image_auroc": image_auroc,
    "image_average_precision": image_average_precision,
    "image_f1_max": image_f1_max,
}
_TITLES = {
    "n_images": ("", "images"),
    "n_anomalies": ("", "anomalies"),
    "image_auroc": ("image", "AUROC"),
    "image_average_precision": ("image", "AP"),
    "image_f1_max": ("image", "F1max"),
    "pixel_auroc": ("pixel", "AUROC"),
    "pixel_average_precision": ("pixel", "AP"),
    "pixel_f1_max": ("pixel", "F1max"),
}
_COUNTS = ("n_images", "n_anomalies")


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`; ``print(evaluation)`` shows it as a table.

    Attributes
    ----------
    per_category : dict of dict
        For each category ``n_images``, ``n_anomalies``, ``image_auroc``, ``image_average_precision`` and
        ``image_f1_max``, and with maps ``pixel_auroc``, ``pixel_average_precision``, ``pixel_f1_max`` and ``aupro``.
        Metrics that need missing anomalies, normal images or masks are nan.
    mean : dict
        Mean of each metric over the categories where it is not nan; nan if there is none.
    pooled : dict
        Image metrics over the images of all categories together, as with one threshold for all.
    fpr_limit : float
        Integration limit of ``aupro``.
    """

    per_category: dict[Any, dict[str, float]]
    mean: dict[str, float]
    pooled: dict[str, float]
    fpr_limit: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types for ``json.dumps``: categories as str, nan as None."""
        return {
            "per_category": {str(name): _plain(row) for name, row in self.per_category.items()},
            "mean": _plain(self.mean),
            "pooled": _plain(self.pooled),
            "fpr_limit": self.fpr_limit,
        }

    def table(self) -> str:
        """Return a text table: a row per category, the mean, all images pooled, and notes on metrics that are nan."""
        columns = [*_COUNTS, *self.mean]
        titles = {**_TITLES, "aupro": ("", f"AUPRO@{self.fpr_limit:g}")}
        rows = [(str(name), row) for name, row in self.per_category.items()]
        if len(rows) > 1:
            rows += [("mean", self.mean), ("pooled", self.pooled)]
        lines = [["", *(titles[column][0] for column in columns)]]
        lines.append(["category", *(titles[column][1] for column in columns)])
        lines += [[label, *(_cell(row.get(column)) for column in columns)] for label, row in rows]
        widths = [max(map(len, cells)) for cells in zip(*lines)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
            ).rstrip()
            for line in lines
        ]
        rule = "-" * (sum(widths) + 2 * len(columns))
        text.insert(2, rule)
        if len(rows) > 1:
            text.insert(-2, rule)
        return "\n".join([*text, *self.notes()])

    def __str__(self) -> str:
        return self.table()

    def notes(self) -> list[str]:
        """Return one line for each reason why a metric is nan."""
        reasons: dict[str, list[str]] = {}
        for name, row in self.per_category.items():
            if row["n_anomalies"] in (0, row["n_images"]):
                kind = "anomalies" if row["n_anomalies"] == 0 else "normal images"
                reasons.setdefault(f"no {kind}, so no image metrics", []).append(str(name))
            if np.isnan(row.get("aupro", 0.0)):
                reason = "no mask with defect and normal pixels, so no pixel metrics"
                reasons.setdefault(reason, []).append(str(name))
        consequence = "; left out of the mean" if len(self.per_category) > 1 else ""
        return [f"nan: {reason}: {', '.join(names)}{consequence}." for reason, names in reasons.items()]


def evaluate(
    y_true: ArrayLike,
    anomaly_score: ArrayLike,
    category: ArrayLike | None = None,
    *,
    masks: Iterable[Any] | None = None,
    maps: Iterable[Any] | None = None,
    fpr_limit: float = 0.3,
) -> Evaluation:
    """Compute all image and pixel metrics, per category and averaged.

    Parameters
    ----------
    y_true : array-like of shape (n_images,)
        +1 for a normal image, -1 for an anomaly.
    anomaly_score : array-like of shape (n_images,)
        Finite; higher is more anomalous: ``-detector.score_samples(X)``.
    category : array-like of shape (n_images,), str or int, default=None
        Category of each image; None takes all as one category, "all".
    masks, maps : array of shape (n_images, H, W), or iterable of (H_i, W_i) arrays, default=None
        As for `pixel_auroc`, with the same use of memory; pass both or neither, in the order of `y_true`. An anomalous
        image with mask None is left out of the pixel metrics. For a normal image None means no defects.
    fpr_limit : float, default=0.3
        In (0, 1]: false-positive rate up to which AUPRO integrates.

    Returns
    -------
    Evaluation
        With ``per_category``, ``mean``, ``pooled``, ``table()`` and ``to_dict()``.

    Raises
    ------
    ValueError
        As `image_auroc` and `pixel_auroc`, except that missing labels, defects or masks only give nan; also when the
        mask of a normal image marks defect pixels.

    See Also
    --------
    bootstrap_interval : Confidence interval of an image metric.
    """
    y, score = check_image_scores(y_true, anomaly_score, both_labels=False)
    check_fpr_limit(fpr_limit)
    if (masks is None) != (maps is None):
        given, missing = ("maps", "masks") if masks is None else ("masks", "maps")
        raise ValueError(f"{given} were given without {missing}: pixel metrics need both")
    names, groups = split_by(category, y.size)
    per_category = {}
    for g, name in enumerate(names):
        mine = groups == g
        per_category[name] = {
            "n_images": int(mine.sum()),
            "n_anomalies": int((y[mine] == -1).sum()),
            **_image_row(y[mine], score[mine]),
        }
    if masks is not None and maps is not None:
        counts = count_pixels(masks, maps, regions=True, groups=groups, normal=y == 1)
        for name, count in zip(names, counts):
            per_category[name].update(_pixel_row(count, fpr_limit))
    metrics = [key for key in per_category[names[0]] if key not in _COUNTS]
    mean = {metric: _mean([row[metric] for row in per_category.values()]) for metric in metrics}
    pooled = {"n_images": y.size, "n_anomalies": int((y == -1).sum()), **_image_row(y, score)}
    return Evaluation(per_category, mean, pooled, float(fpr_limit))


def split_by(category: ArrayLike | None, n_images: int) -> tuple[list[Any], NDArray[np.intp]]:
    """Return the names of the categories, sorted, and the position of each image's category among them."""
    if category is None:
        return ["all"], np.zeros(n_images, np.intp)
    labels = np.asarray(category)
    if labels.shape != (n_images,):
        raise ValueError(f"category must have one label for each of the {n_images} images, got shape {labels.shape}")
    check_none_missing(category)
    found = list(dict.fromkeys(labels.tolist()))
    try:
        found.sort()
    except TypeError:  # labels of several types have no order of their own
        found.sort(key=str)
    position = {name: g for g, name in enumerate(found)}
    return found, np.array([position[name] for name in labels.tolist()], np.intp)


def _image_row(y: NDArray[Any], score: NDArray[Any]) -> dict[str, float]:
    both = bool((y == 1).any() and (y == -1).any())
    return {name: metric(y, score) if both else np.nan for name, metric in _IMAGE_METRICS.items()}


def _pixel_row(counts: PixelCounts, fpr_limit: float) -> dict[str, float]:
    known = bool(counts.score.size and counts.n_normal)
    return {
        "pixel_auroc": auroc_of(counts) if known else np.nan,
        "pixel_average_precision": average_precision_of(counts) if known else np.nan,
        "pixel_f1_max": f1_max_of(counts)[0] if known else np.nan,
        "aupro": aupro_of(counts, fpr_limit) if known else np.nan,
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else np.nan


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _plain(row: dict[str, float]) -> dict[str, float | None]:
    return {key: None if np.isnan(value) else value for key, value in row.items()}
