"""The demonstration: real solar cells, one model for both kinds, measured beside a memory bank of patches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vqad.datasets import ElpvDataset, load_elpv
from vqad.features import BackboneFeatures
from vqad.hvq_trans import HVQTransDetector
from vqad.images import check_images
from vqad.metrics import Evaluation, bootstrap_interval, evaluate, image_auroc
from vqad.report import Verdicts, judge, write_report

PAGE_NAME = "solar-cells.html"
PAGE_IMAGES = 48


@dataclass(frozen=True)
class DemoSize:
    """How much work the demonstration is.

    Attributes
    ----------
    n_train : int
        Cells to learn from, of those that the experts called surely sound (defect probability 0).
    n_test_normal, n_test_defective : int
        Cells to measure on: sound ones that are not learned from, and surely defective ones (probability 1).
    bank_patches : int
        Patches that the memory bank keeps of each kind of cell.
    parameters : dict
        Of the detector, where they are not its defaults.
    """

    n_train: int
    n_test_normal: int
    n_test_defective: int
    bank_patches: int
    parameters: dict[str, Any] = field(default_factory=dict)


# Half of the passes that are the default, to stay within minutes.
FULL = DemoSize(n_train=600, n_test_normal=300, n_test_defective=200, bank_patches=8000, parameters={"max_iter": 12})
# For a quick look and for continuous integration. So few cells cannot support a false-alarm rate of 1 %.
QUICK = DemoSize(
    n_train=150,
    n_test_normal=60,
    n_test_defective=60,
    bank_patches=1000,
    parameters={"max_iter": 3, "false_alarm_rate": 0.05},
)


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes
    ----------
    detector : fitted HVQTransDetector
    cells : ElpvDataset
        The cells that were measured on.
    verdicts : Verdicts
        What the detector said of them.
    evaluation, baseline : Evaluation
        Image metrics of the detector and of the memory bank, on the same cells.
    n_train : int
    fit_seconds, score_seconds, baseline_seconds : float
    """

    detector: HVQTransDetector
    cells: ElpvDataset
    verdicts: Verdicts
    evaluation: Evaluation
    baseline: Evaluation
    n_train: int
    fit_seconds: float
    score_seconds: float
    baseline_seconds: float

    def alarms(self, target: int) -> tuple[int, int]:
        """How many of the cells that are sound (+1) or defective (-1) were called anomalous, and of how many."""
        mine = self.cells.target == target
        return int((self.verdicts.label[mine] == -1).sum()), int(mine.sum())

    def summary(self) -> str:
        """The result as text for a terminal."""
        rows = [("", "this model", "memory bank")]
        rows += [
            (name, f"{row['image_auroc']:.3f}", f"{self.baseline.per_category[name]['image_auroc']:.3f}")
            for name, row in self.evaluation.per_category.items()
        ]
        rows += [
            (name, f"{mine['image_auroc']:.3f}", f"{other['image_auroc']:.3f}")
            for name, mine, other in (
                ("mean", self.evaluation.mean, self.baseline.mean),
                ("pooled", self.evaluation.pooled, self.baseline.pooled),
            )
        ]
        low, high = bootstrap_interval(image_auroc, self.cells.target, self.verdicts.score, random_state=0)
        routed = (self.verdicts.category.astype(str) == self.cells.category).mean()
        (false, n_normal), (found, n_defective) = self.alarms(1), self.alarms(-1)
        rate = self.detector.false_alarm_rate
        return "\n".join(
            [
                f"Image AUROC on {n_defective} surely defective and {n_normal} sound cells that it never saw:",
                *(f"  {name:<8} {mine:>10}  {other:>11}" for name, mine, other in rows),
                f"  pooled, 95 % interval over test cells: {low:.3f} to {high:.3f}",
                f"Kind of cell inferred right: {routed:.1%}",
                f"Threshold of the anomaly score: {self.threshold():.3f}, set for {rate:.1%} false alarms",
                f"False alarms on held-out sound cells: {false} of {n_normal} ({false / n_normal:.1%})",
                f"Defective cells found at that threshold: {found} of {n_defective} ({found / n_defective:.1%})",
            ]
        )

    def threshold(self) -> float:
        """Anomaly score over which a cell is called anomalous."""
        return float(-self.detector.offset_)

    def write_page(self, folder: Path) -> Path:
        """Write the page of heatmaps into a folder."""
        return write_report(
            folder / PAGE_NAME,
            self.detector,
            self.cells,
            y=self.cells.target,
            category=self.cells.category,
            title="Solar cells: what is wrong, and where",
            n_images=PAGE_IMAGES,
            verdicts=self.verdicts,
            facts={
                "Cells learned from": f"{self.n_train}, surely sound",
                "Image AUROC, mean of both kinds": f"{self.evaluation.mean['image_auroc']:.3f} "
                f"(memory bank of patches: {self.baseline.mean['image_auroc']:.3f})",
                "Images": "ELPV data set, CC BY-NC-SA 4.0",
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
    """Learn sound solar cells of both kinds, then measure on cells that were not learned from.

    Parameters
    ----------
    size : DemoSize, default=FULL
    random_state : int, default=0
        Decides which cells are learned from, and seeds the detector and the memory bank.
    device : str, default="auto"
    verbose : int, default=0
        Whether to show the training's progress.
    say : callable, optional
        Is given a line of text after each step.

    Returns
    -------
    DemoResult

    Raises
    ------
    ImportError
        If `elpv-dataset` is not installed.
    KeyboardInterrupt
        Also when the training, which would keep what it has learned, is interrupted.
    """
    train, test = split_cells(load_elpv(), size, random_state)
    kinds = ", ".join(f"{(train.category == kind).sum()} {kind}" for kind in np.unique(train.category))
    say(f"Learning from {len(train)} sound solar cells ({kinds}) ...")
    detector = HVQTransDetector(
        **{"random_state": random_state, "device": device, "verbose": verbose, **size.parameters}
    )
    started = time.monotonic()
    detector.fit(train, category=train.category)
    if detector.training_log_.interrupted:
        raise KeyboardInterrupt
    fit_seconds = time.monotonic() - started
    say(f"  {detector.n_iter_} passes in {fit_seconds:.0f} s")

    started = time.monotonic()
    verdicts = judge(detector, test)
    score_seconds = time.monotonic() - started
    say(f"Scored {len(test)} other cells, without saying which kind they are, in {score_seconds:.0f} s")

    started = time.monotonic()
    bank = PatchMemoryBank(size.bank_patches, device=device, random_state=random_state)
    baseline_score = bank.fit(train, train.category).anomaly_score(test)
    baseline_seconds = time.monotonic() - started
    say(f"For comparison, a memory bank of patches learned and scored the same cells in {baseline_seconds:.0f} s")

    return DemoResult(
        detector=detector,
        cells=test,
        verdicts=verdicts,
        evaluation=evaluate(test.target, verdicts.score, test.category),
        baseline=evaluate(test.target, baseline_score, test.category),
        n_train=len(train),
        fit_seconds=fit_seconds,
        score_seconds=score_seconds,
        baseline_seconds=baseline_seconds,
    )


def split_cells(cells: ElpvDataset, size: DemoSize, random_state: int) -> tuple[ElpvDataset, ElpvDataset]:
    """Draw cells to learn from and cells to measure on, both kinds in the proportion that they have.

    Cells that the experts were not sure of (probability 1/3 and 2/3) are left out.

    Returns
    -------
    train, test : ElpvDataset
        Without a cell in common; train holds sound cells alone.
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
    """The first rows of every group, `n` in all, in the groups' proportion."""
    ends = np.rint(np.cumsum([len(rows) for rows in groups]) * n / sum(len(rows) for rows in groups)).astype(int)
    counts = np.diff(ends, prepend=0)
    return np.concatenate([rows[:count] for rows, count in zip(groups, counts)])


class PatchMemoryBank:
    """The yardstick: distance of an image's patches to the nearest patch of normal images.

    Features of the default backbone at strides 8 and 16, on the grid of stride 8, averaged over 3 x 3 cells,
    every channel standardised; an image's score is its farthest patch's. PatchCore [1]_ in its plainest form,
    with a random sample in place of a coreset.

    Parameters
    ----------
    n_patches : int
        Patches to keep of each category.
    device : str, default="auto"
    random_state : int, default=0

    References
    ----------
    .. [1] Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection, CVPR
       2022. arXiv:2106.08265.
    """

    def __init__(self, n_patches: int, *, device: str = "auto", random_state: int = 0):
        self.n_patches = n_patches
        self.features = BackboneFeatures(stages=(2, 3), grid_scale=2, device=device)
        self.random_state = random_state

    def fit(self, images: Any, category: NDArray[Any]) -> PatchMemoryBank:
        """Keep a random sample of the patches of normal images, as many of every image as of any other."""
        self.features.fit()
        rng = np.random.RandomState(self.random_state)
        counts = {name: (np.asarray(category) == name).sum() for name in np.unique(category)}
        cells = int(np.prod(self.features.grid_))
        kept = []
        for rows, patches in self._patches(images):
            for row, own in zip(rows, patches):
                # Rounded up, and cut to the exact number below.
                wanted = -(-self.n_patches // counts[category[row]])
                kept.append((category[row], own[rng.permutation(cells)[:wanted]]))
        bank = torch.cat([torch.cat([own for name, own in kept if name == kind])[: self.n_patches] for kind in counts])
        self.scale = bank.std(0).clamp_min(1e-6)
        self.bank = bank / self.scale
        self.squares = self.bank.square().sum(1)
        return self

    def anomaly_score(self, images: Any) -> NDArray[np.float64]:
        """Distance of every image's farthest patch to the bank, (n,)."""
        scores = []
        for _, patches in self._patches(images):
            for own in patches / self.scale:
                # |q - b|² = |q|² - 2 q·b + |b|²: a matrix product, and one minimum over the bank.
                nearest = torch.addmm(self.squares, own, self.bank.T, alpha=-2).amin(1) + own.square().sum(1)
                scores.append(float(nearest.max().clamp_min(0).sqrt()))
        return np.array(scores)

    def _patches(self, images: Any) -> Any:
        """Rows and their patches (n, cells, C), chunk by chunk."""
        for rows, (maps,) in self.features.iter_maps(check_images(images)):
            smooth = F.avg_pool2d(maps.float().cpu(), 3, stride=1, padding=1, count_include_pad=False)
            yield rows, smooth.flatten(2).transpose(1, 2)
