"""Figures of the report as SVG; matplotlib is imported only to plot them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMAL_COLOUR, ANOMALY_COLOUR, THRESHOLD_COLOUR = "#3b6ea5", "#c2410c", "#111827"
WIDTH = 5.0  # inches: text of 9 points is readable on a phone
BINS = 40
# Scores beyond this many times the threshold share the last bin, so that an outlier does not squeeze all others.
LONGEST = 4.0


def draw_histograms(
    axes: Sequence[Any], score: NDArray[Any], threshold: NDArray[Any], group: NDArray[Any], y: NDArray[Any] | None
) -> None:
    """Plot the score histogram of each group with its threshold, one Axes per group, with common bins."""
    edges = _edges(score, threshold)
    shown = np.clip(score, edges[0], edges[-1])
    for axis, name in zip(axes, np.unique(group)):
        mine = group == name
        parts = [shown[mine]] if y is None else [shown[mine & (y == 1)], shown[mine & (y == -1)]]
        labels = ["images"] if y is None else ["labelled normal", "labelled anomalous"]
        colours = [NORMAL_COLOUR, ANOMALY_COLOUR][: len(parts)]
        axis.hist(parts, edges, stacked=True, color=colours, label=labels)
        for k, value in enumerate(np.unique(threshold[mine])):
            label = "threshold" if k == 0 else None
            axis.axvline(value, color=THRESHOLD_COLOUR, linestyle="--", linewidth=1.2, label=label)
        set_title(axis, f"{name} ({mine.sum()} images)", loc="left", fontsize=9)
        axis.set_ylabel("images")
        axis.yaxis.get_major_locator().set_params(integer=True)
    beyond = " (last bar: and beyond)" if score.max() > edges[-1] else ""
    axes[-1].set_xlabel(f"anomaly score{beyond}")


def loss_curves(loss: list[float], validation: list[float]) -> bytes:
    """Plot the training loss after each pass, and the validation loss if there is one."""
    figure, (axis,) = _figure(1, 2.2)
    passes = np.arange(1, len(loss) + 1)
    axis.plot(passes, loss, color=NORMAL_COLOUR, marker=".", label="training")
    if validation:
        axis.plot(passes[: len(validation)], validation, color=ANOMALY_COLOUR, marker=".", label="validation")
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel("pass over the training images")
    axis.set_ylabel("loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def _edges(score: NDArray[Any], threshold: NDArray[Any]) -> NDArray[np.float64]:
    low, high = float(score.min()), float(score.max())
    top = float(threshold.max())
    high = max(min(high, top + LONGEST * max(abs(top), 1.0)), top)
    low = min(low, float(threshold.min()))
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)


def _figure(rows: int, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=figure_size(rows, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    tidy(axes)
    return figure, axes


def figure_size(rows: int, height: float) -> tuple[float, float]:
    """Width and height in inches of a figure with rows of this height."""
    return WIDTH, 0.45 + height * rows


def tidy(axes: Sequence[Any]) -> None:
    """Remove the top and right spines."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)


def set_title(axis: Any, text: object, **options: Any) -> None:
    """Set a title that may hold names with a $ or with characters that cannot be displayed."""
    plain = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
    axis.set_title(plain, parse_math=False, **options)


def _svg(figure: Figure) -> bytes:
    from matplotlib import rc_context

    out = io.BytesIO()
    # Makes the file reproducible.
    with rc_context({"svg.hashsalt": "vqad"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
