"""The HTML report: a detector's results on some images, and sliders to try other thresholds."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vqad._writing import writing
from vqad.base import BaseImageDetector
from vqad.images import ImageSequence
from vqad.persistence import replaceable
from vqad.report._cards import make_cards, picture_side, rows_to_show, uri
from vqad.report._curves import Evidence, evidence
from vqad.report._dials import Scores
from vqad.report._figures import loss_curves
from vqad.report._overlay import heat_colours
from vqad.report._verdicts import Verdicts, judge, sequence_of

MAX_GROUPS_MEASURED = 30


def write_report(
    path: str | os.PathLike[str],
    detector: BaseImageDetector,
    images: Any,
    *,
    y: ArrayLike | None = None,
    category: ArrayLike | None = None,
    title: str = "Anomaly report",
    masks: Sequence[Any] | None = None,
    n_images: int = 1000,
    facts: Mapping[str, str] | None = None,
    verdicts: Verdicts | None = None,
    random_state: int = 0,
) -> Path:
    """Write one self-contained HTML page with a detector's results on some images.

    The page has sliders to try other thresholds, and can sort and filter. It loads nothing else, and is readable
    without scripts.

    Parameters
    ----------
    path : path-like
        HTML file to write; an existing one is replaced.
    detector : fitted detector
    images : images
        In any form that the detector takes.
    y : array-like of shape (n,) of +1 normal / -1 anomaly, default=None
        Labels, if known. With labels the page counts misses and false alarms, and has metrics.
    category : array-like of shape (n,), default=None
        Category of each image, for metrics per category; None: the inferred one.
    title : str, default="Anomaly report"
        Title of the page.
    masks : sequence of n arrays of shape (H_i, W_i), bool, or None, default=None
        Defect masks, as for `vqad.metrics.evaluate`. With masks and `y` the page has pixel metrics. The sequence may be
        lazy: it is read three times, one image at a time.
    n_images : int, default=1000
        Largest number of images to show. If there are more, the page shows the most and the least anomalous ones, some
        near the threshold and a sample of the normal ones; counts are over all. The longer side of the pictures has up
        to 800 pixels for up to 100 images, 320 for up to 1,000, and 192 for more, which takes about 10 kB per image.
    facts : mapping of str to str, default=None
        More rows for the table of facts.
    verdicts : Verdicts, default=None
        Result of `judge` for these images; None: they are judged now.
    random_state : int, default=0
        Draws the sample of normal images.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ImportError
        If jinja2 or matplotlib are not installed.
    ValueError
        If y, category, masks or verdicts and the images differ in number, `n_images` is less than 1, or an image cannot
        be read.
    OSError
        If the file cannot be written.
    """
    _require_extras()
    data = sequence_of(detector, images)
    truth = _one_each("y", y, len(data))
    path = Path(path)
    if path.is_dir() or not path.exists():
        replaceable(path)  # raises before the work
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{str(path)!r} is not writable.")
    if n_images < 1:
        raise ValueError(f"n_images must be at least 1; got {n_images!r}.")
    if verdicts is None:
        verdicts = judge(detector, data)
    elif len(verdicts) != len(data):
        raise ValueError(f"verdicts has {len(verdicts)} entries for {len(data)} images.")
    given = _one_each("category", category, len(data))
    group = (verdicts.category if given is None else given).astype(str)
    rows = rows_to_show(verdicts, truth, n_images, random_state)
    side = picture_side(len(rows))
    cards = list(make_cards(data, verdicts, truth, rows, float(detector.map_threshold_), side))
    scores = Scores.of(detector, verdicts, truth)
    script = _file("page.js")
    page = _template().render(
        title=title,
        style=_file("page.css"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        dials=scores.dials(),
        scores=scores.to_json(),
        facts={**_facts(detector, verdicts, truth), **(facts or {})},
        parameters={name: repr(value) for name, value in detector.get_params(deep=False).items()},
        evidence=None if truth is None else _evidence(data, verdicts, truth, group, masks),
        loss=uri(loss_curves(list(detector.loss_curve_), list(detector.validation_curve_)), "svg+xml"),
        gradient=", ".join(_css(colour) for colour in heat_colours(np.linspace(0, 1, 9))),
        map_threshold=float(detector.map_threshold_),
        cards=cards,
        one_category=len(detector.categories_) == 1,
        categories=sorted({card.category for card in cards}),
        n_images=len(data),
        side=side,
        megabytes=sum(len(card.picture) + len(card.heat) for card in cards) / 1e6,
    )
    with writing(path):
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # file names may not be valid UTF-8
    return path


def _require_extras() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'The report needs {error.name}: pip install "vqad[report]".') from error


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("vqad.report", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")


def _file(name: str) -> Any:
    """A file of the templates, to be inserted without escaping."""
    from markupsafe import Markup

    return Markup(files("vqad.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _evidence(
    data: ImageSequence, verdicts: Verdicts, y: NDArray[Any], group: NDArray[Any], masks: Sequence[Any] | None
) -> Evidence:
    if masks is not None and len(masks) != len(data):
        raise ValueError(f"masks has {len(masks)} entries, but there are {len(data)} images: one each is expected.")
    if len(np.unique(group)) > MAX_GROUPS_MEASURED:
        group = np.full(len(group), "all categories")
    return evidence(verdicts, y, group, masks, _Maps(data, verdicts))


class _Maps:
    """Lazy anomaly maps at the images' own sizes, because all together they may not fit into memory."""

    def __init__(self, data: ImageSequence, verdicts: Verdicts):
        self._data, self._verdicts = data, verdicts

    def __len__(self) -> int:
        return len(self._verdicts)

    def __getitem__(self, i: int) -> NDArray[np.float32]:
        if i >= len(self):
            raise IndexError(i)
        return self._verdicts.anomaly_map(i, self._data.size(i))


def _one_each(name: str, values: ArrayLike | None, n: int) -> NDArray[Any] | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{name} has shape {array.shape}, but there are {n} images: one value each is expected.")
    return array


def _false_alarms(detector: BaseImageDetector) -> float:
    """False-alarm rate at the current threshold, judging by the held-out images; the largest of all categories."""
    every = np.arange(len(detector.categories_))
    just_over = np.nextafter(np.broadcast_to(-np.asarray(detector.offset_), every.shape), np.inf)
    return float(detector.conformal_.p_values(just_over, every).max())


def _facts(detector: BaseImageDetector, verdicts: Verdicts, y: NDArray[Any] | None) -> dict[str, str]:
    names = [str(name) for name in detector.categories_]
    found = " (found without labels)" if detector.scorer_.router.discovered else ""
    thresholds = np.unique(-np.asarray(detector.offset_))
    anomalies = int((verdicts.label == -1).sum())
    facts = {
        "Model": type(detector).__name__,
        "Categories": f"{len(names)}{found}: {', '.join(names[:20])}{', …' if len(names) > 20 else ''}",
        "Passes over the training images": str(detector.n_iter_),
        "Normal images held out for the threshold": str(sum(len(scores) for scores in detector.conformal_.scores_)),
        "Threshold of the anomaly score": " to ".join(
            f"{value:.3f}" for value in thresholds[[0, -1][: len(thresholds)]]
        ),
        "False alarms by those held out": f"at most {100 * _false_alarms(detector):.3g} %",
        "Images judged": str(len(verdicts)),
        "Called anomalous": f"{anomalies} ({anomalies / len(verdicts):.1%})",
    }
    if labelled := detector.fitted_.thresholds.origin:
        facts["Threshold set for"] = labelled
    if y is not None:
        normal, defective = y == 1, y == -1
        facts["False alarms"] = _share(verdicts.label[normal] == -1, "images labelled normal")
        facts["Anomalies found"] = _share(verdicts.label[defective] == -1, "images labelled anomalous")
    return facts


def _share(hits: NDArray[np.bool_], of: str) -> str:
    return f"{hits.sum()} of {len(hits)} {of}" + (f" ({hits.mean():.1%})" if len(hits) else "")


def _css(colour: NDArray[np.float64]) -> str:
    return "rgb({:.0f} {:.0f} {:.0f})".format(*colour)
