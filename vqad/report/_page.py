"""The HTML report: facts about the model, diagrams, and a grid of what it saw where."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from vqad._writing import writing
from vqad.base import BaseImageDetector
from vqad.images import ImageSequence
from vqad.metrics import evaluate
from vqad.persistence import replaceable
from vqad.report._figures import curves, histograms
from vqad.report._overlay import heat_colours, overlay
from vqad.report._verdicts import Verdicts, judge, sequence_of

THUMBNAIL = 320  # pixels, the longer side
JPEG_QUALITY = 85
MAX_HISTOGRAMS = 12
# Of the images that the page has room for: shares of the most anomalous, of those nearest the threshold and of the
# least anomalous ones; the rest is drawn at random from the normal ones.
SHARES = (0.4, 0.2, 0.15)


@dataclass(frozen=True)
class Card:
    """One image of the page."""

    name: str
    path: str
    score: float
    p_value: float
    category: str
    is_anomaly: bool
    truth: str
    is_wrong: bool
    original: str
    overlay: str


def write_report(
    path: str | os.PathLike[str],
    detector: BaseImageDetector,
    images: Any,
    *,
    y: ArrayLike | None = None,
    category: ArrayLike | None = None,
    title: str = "Anomaly report",
    n_images: int = 40,
    facts: Mapping[str, str] | None = None,
    verdicts: Verdicts | None = None,
    random_state: int = 0,
) -> Path:
    """Write one self-contained HTML page about what a detector says of some images.

    Parameters
    ----------
    path : path-like
        The page; an older one is replaced.
    detector : fitted detector
    images : images
        Any of the forms that the detector takes.
    y : array-like of shape (n,) of +1 normal / -1 anomaly, default=None
        What the images are, if that is known: then the page has image metrics and marks wrong labels.
    category : array-like of shape (n,), default=None
        The kind of object on each image, by which the histograms are parted; None: the inferred one.
    title : str, default="Anomaly report"
    n_images : int, default=40
        How many images the page shows at the most: it holds the most and the least anomalous ones, some around the
        threshold and some of the others.
    facts : mapping of str to str, default=None
        Further rows of the table of facts.
    verdicts : Verdicts, default=None
        What `judge` said of these images, if that is at hand; None: they are judged now.
    random_state : int, default=0
        Draws the sample of normal images.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ImportError
        If jinja2 or matplotlib are not installed.
    ValueError
        If y, category or verdicts do not go with the images, or an image cannot be read.
    """
    _require_extras()
    data = sequence_of(detector, images)
    truth = _one_each("y", y, len(data))
    path = Path(path)
    if path.is_dir() or not path.exists():
        replaceable(path)  # says what is wrong before the work
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{str(path)!r} may not be written.")
    if n_images < 1:
        raise ValueError(f"n_images must be at least 1; got {n_images!r}.")
    if verdicts is None:
        verdicts = judge(detector, data)
    elif len(verdicts) != len(data):
        raise ValueError(f"verdicts has {len(verdicts)} entries for {len(data)} images.")
    given = _one_each("category", category, len(data))
    group = (verdicts.category if given is None else given).astype(str)
    paths = [data.path(i) or "" for i in range(len(data))]
    sections = [
        (heading, [_card(detector, data, verdicts, truth, paths, i) for i in rows])
        for heading, rows in _sections(verdicts, truth, n_images, random_state)
    ]
    by_group = group if len(np.unique(group)) <= MAX_HISTOGRAMS else np.full(len(group), "all categories")
    page = _template().render(
        title=title,
        facts={**_facts(detector, verdicts, truth), **(facts or {})},
        parameters={name: repr(value) for name, value in detector.get_params(deep=False).items()},
        table=None if truth is None else evaluate(truth, verdicts.score, group).table(),
        histogram=_uri(histograms(verdicts.score, verdicts.threshold, by_group, truth), "svg+xml"),
        loss=_uri(curves(list(detector.loss_curve_), list(detector.validation_curve_)), "svg+xml"),
        gradient=", ".join(_css(colour) for colour in heat_colours(np.linspace(0, 1, 9))),
        map_threshold=float(detector.map_threshold_),
        sections=sections,
        n_shown=sum(len(cards) for _, cards in sections),
        n_images=len(data),
    )
    with writing(path):
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files that are no UTF-8
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


def _one_each(name: str, values: ArrayLike | None, n: int) -> NDArray[Any] | None:
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"{name} has shape {array.shape}, but there are {n} images: one value each is expected.")
    return array


def _false_alarms(detector: BaseImageDetector) -> float:
    """Share of normal images over the threshold that those held out vouch for, of the worst category."""
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


def _sections(
    verdicts: Verdicts, y: NDArray[Any] | None, n_images: int, random_state: int
) -> list[tuple[str, list[int]]]:
    """Which images are shown under which heading; each image once, most anomalous first."""
    order = np.argsort(-verdicts.score, kind="stable")
    if len(order) <= n_images:
        return [("All images, most anomalous first", order.tolist())]
    counts = [max(1, round(share * n_images)) for share in SHARES]
    nearness = np.argsort(np.abs(verdicts.score - verdicts.threshold), kind="stable")
    normal = np.flatnonzero((verdicts.label if y is None else y) == 1)
    drawn = np.random.RandomState(random_state).permutation(normal)
    of = "judged" if y is None else "labelled"
    wanted = [
        ("Most anomalous", order, counts[0]),
        ("Around the threshold", nearness, counts[1]),
        ("Least anomalous", order[::-1], counts[2]),
        (f"A random sample of images {of} normal", drawn, n_images - sum(counts)),
    ]
    shown: set[int] = set()
    sections = []
    for heading, candidates, count in wanted:
        room = min(max(count, 0), n_images - len(shown))
        rows = [int(i) for i in candidates if int(i) not in shown][:room]
        shown.update(rows)
        if rows:
            sections.append((heading, sorted(rows, key=lambda i: -verdicts.score[i])))
    return sections


def _card(
    detector: BaseImageDetector,
    data: ImageSequence,
    verdicts: Verdicts,
    y: NDArray[Any] | None,
    paths: list[str],
    i: int,
) -> Card:
    thumbnail = _thumbnail(data.pixels(i))
    drawn = overlay(thumbnail, verdicts.anomaly_map(i, thumbnail.shape[:2]), detector.map_threshold_)
    is_anomaly = bool(verdicts.label[i] == -1)
    truth = "" if y is None else "normal" if y[i] == 1 else "anomalous"
    return Card(
        name="/".join(Path(paths[i]).parts[-2:]) if paths[i] else f"image {i}",
        path=paths[i],
        score=float(verdicts.score[i]),
        p_value=float(verdicts.p_value[i]),
        category=str(verdicts.category[i]),
        is_anomaly=is_anomaly,
        truth=truth,
        is_wrong=bool(truth) and is_anomaly != (truth == "anomalous"),
        original=_jpeg(thumbnail),
        overlay=_jpeg(drawn),
    )


def _thumbnail(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) in 0..1 as uint8, the longer side `THUMBNAIL` at the most."""
    image = Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(image)


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    # Colour at full resolution, or the thin outline would fade.
    Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return _uri(out.getvalue(), "jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _css(colour: NDArray[np.float64]) -> str:
    return "rgb({:.0f} {:.0f} {:.0f})".format(*colour)
