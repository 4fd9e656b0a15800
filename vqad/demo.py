"""The demonstration: both detectors on real solar cells of two kinds, compared with an untrained Gaussian."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vqad
from vqad._writing import writing
from vqad._yardstick import GaussianYardstick
from vqad.base import BaseImageDetector
from vqad.datasets import ElpvDataset, load_elpv
from vqad.metrics import Evaluation, bootstrap_interval, evaluate, image_auroc
from vqad.registry import detector_class
from vqad.report import Verdicts, judge, write_report

# Names of the detectors, as in the parameters and file names.
DETECTORS = ("hvq-trans", "vq-flow")
PAGE, DETECTOR_PAGE, DETECTOR_MODEL = "solar-cells.html", "solar-cells-{}.html", "model-{}.safetensors"
TITLE = "Solar cells: what is wrong, and where"
SOURCE = "ELPV data set, CC BY-NC-SA 4.0"
PAGE_IMAGES = 48


@dataclass(frozen=True)
class DemoSize:
    """Size of the demonstration.

    Attributes
    ----------
    n_train : int
        Number of training cells, all surely sound (defect probability 0).
    n_test_normal, n_test_defective : int
        Number of test cells: other sound ones, and surely defective ones (probability 1).
    parameters : dict of str to dict
        Parameters of each detector in `DETECTORS` that are not its defaults.
    """

    n_train: int
    n_test_normal: int
    n_test_defective: int
    parameters: dict[str, dict[str, Any]]


# Smaller images and fewer passes than by default, to take only minutes.
FULL = DemoSize(
    n_train=600,
    n_test_normal=300,
    n_test_defective=200,
    parameters={
        "hvq-trans": {"image_size": 224, "max_iter": 3},
        "vq-flow": {"image_size": 224, "max_iter": 3},
    },
)
# For a quick look and for continuous integration.
QUICK = DemoSize(
    n_train=150,
    n_test_normal=60,
    n_test_defective=60,
    parameters={
        "hvq-trans": {"image_size": 224, "max_iter": 1},
        "vq-flow": {"image_size": 224, "max_iter": 1},
    },
)


@dataclass(frozen=True)
class Measured:
    """Result of a method that only ranks cells.

    Attributes
    ----------
    name : str
        Name to show.
    score : ndarray of shape (n_test,), float
        Higher is more anomalous.
    evaluation : Evaluation
        Image metrics of the scores.
    fit_seconds, score_seconds : float
        Seconds to fit, and to score the test cells.
    """

    name: str
    score: NDArray[Any]
    evaluation: Evaluation
    fit_seconds: float
    score_seconds: float

    def column(self, cells: ElpvDataset) -> dict[str, str]:
        """Column of the table, as a mapping of row titles to values."""
        low, high = bootstrap_interval(image_auroc, cells.target, self.score, random_state=0)
        parts = {**self.evaluation.per_category, "mean": self.evaluation.mean, "pooled": self.evaluation.pooled}
        return {
            **{f"image AUROC, {name}": f"{row['image_auroc']:.3f}" for name, row in parts.items()},
            "95 % interval over test cells": f"{low:.3f} to {high:.3f}",
            **self.judgements(cells),
            "seconds to fit": f"{self.fit_seconds:.1f}",
            "cells scored per second": f"{len(cells) / self.score_seconds:.1f}",
        }

    def judgements(self, cells: ElpvDataset) -> dict[str, str]:
        """Rows that need more than a ranking; here none."""
        return {}


@dataclass(frozen=True)
class MeasuredDetector(Measured):
    """Result of a detector, which also infers the kind of each cell and sets a threshold.

    Attributes
    ----------
    detector : fitted detector
    verdicts : Verdicts
        Its verdicts on the test cells.
    """

    detector: BaseImageDetector
    verdicts: Verdicts

    def judgements(self, cells: ElpvDataset) -> dict[str, str]:
        """Accuracy of the inferred kinds, and results at the threshold."""
        return {
            "kind of cell inferred correctly": f"{(self.verdicts.category.astype(str) == cells.category).mean():.1%}",
            "threshold of the anomaly score": f"{-self.detector.offset_:.3f}",
            "set for false alarms of": f"{self.detector.false_alarm_rate:.1%}",
            "false alarms on held-out sound cells": self._alarms(cells.target == 1),
            "defective cells found": self._alarms(cells.target == -1),
        }

    def _alarms(self, mine: NDArray[np.bool_]) -> str:
        """How many of the cells ``mine`` were called anomalous."""
        alarm = self.verdicts.label[mine] == -1
        return f"{alarm.sum()} of {len(alarm)} ({alarm.mean():.1%})"


@dataclass(frozen=True)
class DemoResult:
    """Results of the demonstration.

    Attributes
    ----------
    cells : ElpvDataset
        The test cells.
    n_train : int
        Number of training cells.
    detectors : dict of str to MeasuredDetector
        By the names in `DETECTORS`.
    baseline : Measured
        The untrained Gaussian, which is told the kind of every cell.
    """

    cells: ElpvDataset
    n_train: int
    detectors: dict[str, MeasuredDetector]
    baseline: Measured

    def table(self) -> list[list[str]]:
        """Header and rows; the first column says what was measured, each other one belongs to a method."""
        contenders = [*self.detectors.values(), self.baseline]
        columns = [contender.column(self.cells) for contender in contenders]
        rows = [[what, *(column.get(what, "-") for column in columns)] for what in columns[0]]
        return [["", *(contender.name for contender in contenders)], *rows]

    def heading(self) -> str:
        """One line that describes the table."""
        sound, defective = ((self.cells.target == target).sum() for target in (1, -1))
        return (
            f"Learned from {self.n_train} sound cells, tested on {defective} surely defective and {sound} sound ones "
            "that no model has seen"
        )

    def summary(self) -> str:
        """The result as text for a terminal."""
        table = self.table()
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        lines = [
            "  ".join([f"{what:<{widths[0]}}", *(f"{text:>{n}}" for text, n in zip(values, widths[1:]))])
            for what, *values in table
        ]
        return "\n".join([f"{self.heading()}:", *(f"  {line}" for line in lines)])

    def write_pages(self, folder: Path) -> Path:
        """Write a page of heatmaps per detector, and one with the table and links to them; returns the latter."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        for name in self.detectors:
            self._write_heatmaps(folder, name)
        header, *rows = self.table()
        loader = PackageLoader("vqad.report", "templates")
        page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("demo.html")
        links = [(DETECTOR_PAGE.format(name), mine.name) for name, mine in self.detectors.items()]
        text = page.render(title=TITLE, heading=self.heading(), header=header, rows=rows, links=links, source=SOURCE)
        with writing(folder / PAGE):
            (folder / PAGE).write_text(text, encoding="utf-8")
        return folder / PAGE

    def save_models(self, folder: Path) -> list[Path]:
        """Write a model file for each detector."""
        paths = [folder / DETECTOR_MODEL.format(name) for name in self.detectors]
        for path, mine in zip(paths, self.detectors.values()):
            vqad.save(mine.detector, path)
        return paths

    def _write_heatmaps(self, folder: Path, name: str) -> None:
        from markupsafe import Markup

        mine = self.detectors[name]
        pages = {PAGE: "all side by side"}
        pages |= {DETECTOR_PAGE.format(other): it.name for other, it in self.detectors.items() if other != name}
        links = [Markup('<a href="{}">{}</a>').format(page, text) for page, text in pages.items()]
        write_report(
            folder / DETECTOR_PAGE.format(name),
            mine.detector,
            self.cells,
            y=self.cells.target,
            category=self.cells.category,
            title=f"{TITLE} ({mine.name})",
            n_images=PAGE_IMAGES,
            verdicts=mine.verdicts,
            facts={
                "Cells learned from": f"{self.n_train}, surely sound",
                "Image AUROC, mean of both kinds": f"{mine.evaluation.mean['image_auroc']:.3f} "
                f"(untrained Gaussian: {self.baseline.evaluation.mean['image_auroc']:.3f})",
                "Images": SOURCE,
                "More": Markup(", ").join(links),
            },
        )


def run_demo(
    size: DemoSize = FULL,
    *,
    random_state: int = 0,
    device: str = "auto",
    verbose: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> DemoResult:
    """Fit both detectors on sound solar cells of both kinds, and measure them on other cells.

    Parameters
    ----------
    size : DemoSize, default=FULL
    random_state : int, default=0
        Selects the training cells, and seeds the detectors.
    device : str, default="auto"
    verbose : int, default=0
        Whether to show progress bars; otherwise progress is reported to ``say``.
    say : callable, optional
        Called with a line of text before and after each step: about 20 lines in all.

    Returns
    -------
    DemoResult

    Raises
    ------
    ImportError
        If `elpv-dataset` is not installed.
    KeyboardInterrupt
        When interrupted, also during training.
    """
    train, test = split_cells(load_elpv(), size, random_state)
    kinds = ", ".join(f"{(train.category == kind).sum()} {kind}" for kind in np.unique(train.category))
    say(
        f"Learning from {len(train)} sound solar cells ({kinds}), scoring {len(test)} others without saying their kind:"
    )
    common = {"random_state": random_state, "device": device, "verbose": verbose}
    detectors = {}
    for name in DETECTORS:
        detector = detector_class(name)(**{**common, **size.parameters[name]})
        with _passes_told(type(detector).__name__, len(train), None if verbose else say):
            detectors[name] = _measure_detector(detector, train, test, say)
    baseline = _measure_yardstick(GaussianYardstick(device), train, test, say)
    return DemoResult(test, len(train), detectors, baseline)


def _measure_detector(
    detector: BaseImageDetector, train: ElpvDataset, test: ElpvDataset, say: Callable[[str], None]
) -> MeasuredDetector:
    name = type(detector).__name__
    say(f"  {name}: reading {len(train)} cells")
    started = time.monotonic()
    detector.fit(train, category=train.category)
    if detector.training_log_.interrupted:
        raise KeyboardInterrupt
    fitted = time.monotonic()
    say(f"  {name}: scoring {len(test)} cells")
    verdicts = judge(detector, test)
    scored = time.monotonic()
    measured = MeasuredDetector(
        name=name,
        score=verdicts.score,
        evaluation=evaluate(test.target, verdicts.score, test.category),
        fit_seconds=fitted - started,
        score_seconds=scored - fitted,
        detector=detector,
        verdicts=verdicts,
    )
    say(_times(measured))
    return measured


def _measure_yardstick(
    yardstick: GaussianYardstick, train: ElpvDataset, test: ElpvDataset, say: Callable[[str], None]
) -> Measured:
    say(f"  untrained Gaussian, told the kind of every cell: learning {len(train)} cells, then scoring {len(test)}")
    started = time.monotonic()
    yardstick.fit(train, train.category)
    fitted = time.monotonic()
    score = yardstick.anomaly_score(test, test.category)
    scored = time.monotonic()
    measured = Measured(
        name="untrained Gaussian",
        score=score,
        evaluation=evaluate(test.target, score, test.category),
        fit_seconds=fitted - started,
        score_seconds=scored - fitted,
    )
    say(_times(measured))
    return measured


@contextmanager
def _passes_told(name: str, n_cells: int, say: Callable[[str], None] | None) -> Iterator[None]:
    """Report progress to ``say`` up to five times per training; the log's own handlers are not affected."""
    if say is None:
        yield
        return
    log = logging.getLogger("vqad")
    own, effective = log.level, log.getEffectiveLevel()

    def hear(record: logging.LogRecord) -> bool:
        match = re.match(r"pass (\d+)/(\d+)", record.getMessage())
        if match is not None and _is_told(*map(int, match.groups())):
            say(f"  {name}: learning {n_cells} cells, pass {match[1]} of {match[2]} done")
        return record.levelno >= effective

    log.addFilter(hear)
    log.setLevel(min(effective, logging.INFO))
    try:
        yield
    finally:
        log.removeFilter(hear)
        log.setLevel(own)


def _is_told(n_done: int, n_passes: int) -> bool:
    """Whether this pass is the first, or completes another quarter of all passes."""
    return n_done == 1 or 4 * n_done // n_passes > 4 * (n_done - 1) // n_passes


def _times(measured: Measured) -> str:
    return f"  {measured.name}: learned in {measured.fit_seconds:.0f} s, scored in {measured.score_seconds:.0f} s"


def split_cells(cells: ElpvDataset, size: DemoSize, random_state: int) -> tuple[ElpvDataset, ElpvDataset]:
    """Draw training and test cells, stratified by kind.

    Cells of which the experts were not sure (probability 1/3 and 2/3) are left out.

    Returns
    -------
    train, test : ElpvDataset
        Disjoint; train holds only sound cells.
    """
    rng = np.random.RandomState(random_state)
    sound = _shuffled_by_kind(cells, cells.probability == 0, rng)
    defective = _shuffled_by_kind(cells, cells.probability == 1, rng)
    train = _draw(sound, size.n_train)
    rest = [np.setdiff1d(rows, train, assume_unique=True) for rows in sound]
    test = np.append(_draw(rest, size.n_test_normal), _draw(defective, size.n_test_defective))
    return cells[np.sort(train)], cells[np.sort(test)]


def _shuffled_by_kind(
    cells: ElpvDataset, wanted: NDArray[np.bool_], rng: np.random.RandomState
) -> list[NDArray[np.intp]]:
    kinds = np.unique(cells.category)
    return [rng.permutation(np.flatnonzero(wanted & (cells.category == kind))) for kind in kinds]


def _draw(groups: list[NDArray[np.intp]], n: int) -> NDArray[np.intp]:
    """The first rows of each group, `n` in all, in proportion to the groups' sizes."""
    ends = np.rint(np.cumsum([len(rows) for rows in groups]) * n / sum(len(rows) for rows in groups)).astype(int)
    counts = np.diff(ends, prepend=0)
    return np.concatenate([rows[:count] for rows, count in zip(groups, counts)])
