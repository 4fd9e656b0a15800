"""Measure detectors on real defects, compared with an untrained Gaussian that is told the category.

One model is fitted on several data sets together, in the layout of MVTec AD, on at most 200 normal training images of
each. All test images are then scored, without telling which set they belong to. ``HVQTransDetector`` learns with
labels, ``VQFlowDetector`` without. For each set the table shows

- image AUROC, and pixel AUROC and AUPRO over the normal images and those with a mask;
- the share of defects found at 1 % and 5 % false alarms, that is, above that quantile of the normal test images;
- the shares of defects and of normal images that ``predict`` calls anomalous, the share of defects that the scores find
  at the same number of false alarms, and the ratio of the two, which tells how well the threshold uses the scores;
- seconds to fit the model, and images scored per second, including maps.

``--elpv`` does the same with solar cells of two kinds; half of the sound ones are training images.

    python benchmarks/real_defects.py ROOT --out found.json
    python benchmarks/real_defects.py ROOT --sets "bottle,screw;cookie,magnetic_tile" --small bottle=40
    python benchmarks/real_defects.py --elpv --detectors yardstick
    python benchmarks/real_defects.py ROOT --detectors hvq_trans --set-params max_iter=20 image_size=160
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import vqad
from vqad import HVQTransDetector, VQFlowDetector
from vqad._yardstick import GaussianYardstick
from vqad.cli._arguments import assignment
from vqad.datasets import ImageDataset, load_elpv, load_mvtec
from vqad.demo import DemoSize, split_cells
from vqad.images import check_images
from vqad.metrics import evaluate
from vqad.report import Verdicts, judge

SETS = "bottle,screw,magnetic_tile,cookie;light_guide_plate,mpdd_metal_plate,aitex_01,ball_screw"
DETECTORS = {"hvq_trans": HVQTransDetector, "vq_flow": VQFlowDetector}
KNOW_CATEGORIES = ("hvq_trans",)
YARDSTICK, SOLAR_CELLS = "yardstick", "solar cells"
# Name in a row, heading, and how it is printed.
COLUMNS = (
    ("image_auroc", "AUROC", ".3f"),
    ("found_at_1", "at 1 %", ".2f"),
    ("found_at_5", "at 5 %", ".2f"),
    ("predict_found", "predict", ".2f"),
    ("predict_alarms", "alarms", ".3f"),
    ("found_at_same", "same alarms", ".2f"),
    ("ratio", "ratio", ".2f"),
    ("pixel_auroc", "pixel AUROC", ".3f"),
    ("aupro", "AUPRO", ".3f"),
    ("fit_seconds", "fit s", ".0f"),
    ("images_per_second", "images/s", ".1f"),
)


@dataclass(frozen=True)
class Task:
    """What one model learns and is judged on; the categories are the sets."""

    name: str
    train: ImageDataset
    test: ImageDataset

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(self.test.category.tolist()))


@dataclass(frozen=True)
class Outcome:
    """What a detector said of the test images of a task; the yardstick only scores."""

    score: np.ndarray
    fit_seconds: float
    score_seconds: float
    verdicts: Verdicts | None = None
    parameters: dict[str, Any] | None = None


# ---- images --------------------------------------------------------------------------------------


def mvtec_task(root: str, limits: dict[str, int], skipped: dict[str, str]) -> Task | None:
    """A task of the sets that are there, with no more training images than the limits; ``skipped`` gets the others."""
    parts = []
    for name, limit in limits.items():
        try:
            train, test = (load_mvtec(root, categories=[name], split=split) for split in ("train", "test"))
            if len(set(test.target)) < 2:
                raise ValueError("its test images are not both normal and defective")
        except (ValueError, OSError) as error:
            skipped[name] = str(error)
            print(f"SKIPPED {name}: {error}", file=sys.stderr, flush=True)
            continue
        parts.append((sampled(train, limit), test))
    if not parts:
        return None
    train, test = parts[0]
    for more_train, more_test in parts[1:]:
        train, test = train + more_train, test + more_test
    return Task(", ".join(dict.fromkeys(test.category.tolist())), train, test)


def sampled(images: ImageDataset, limit: int) -> ImageDataset:
    """At most so many of the images, always the same, whatever the seed of the detectors."""
    paths = sorted(images.paths.tolist())
    chosen = random.Random(0).sample(paths, min(limit, len(paths)))
    return images[np.isin(images.paths, chosen)]


def elpv_task() -> Task:
    """Half of the surely sound solar cells to learn; the others and the surely defective ones to judge."""
    cells = load_elpv()
    n_sound, n_defective = ((cells.probability == p).sum() for p in (0, 1))
    half = n_sound // 2
    return Task(SOLAR_CELLS, *split_cells(cells, DemoSize(half, n_sound - half, n_defective, {}), 0))


# ---- detectors -----------------------------------------------------------------------------------


def run_detector(name: str, task: Task, parameters: dict[str, Any]) -> Outcome:
    """Fit a detector with its defaults but for ``parameters``, and let it judge the test images."""
    detector = DETECTORS[name](**parameters)
    started = time.perf_counter()
    detector.fit(task.train, category=task.train.category if name in KNOW_CATEGORIES else None)
    fitted = time.perf_counter()
    verdicts = judge(detector, task.test)
    scored = time.perf_counter()
    return Outcome(verdicts.score, fitted - started, scored - fitted, verdicts, detector.get_params())


def run_yardstick(task: Task) -> Outcome:
    """The same of the yardstick, which is told the category of every image."""
    started = time.perf_counter()
    yardstick = GaussianYardstick().fit(task.train, task.train.category)
    fitted = time.perf_counter()
    score = yardstick.anomaly_score(task.test, task.test.category)
    return Outcome(score, fitted - started, time.perf_counter() - fitted)


def known_parameters(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a detector has."""
    own = DETECTORS[name]().get_params()
    return {key: value for key, value in parameters.items() if key in own}


# ---- what they find ------------------------------------------------------------------------------


def found_at_rate(normal: np.ndarray, defective: np.ndarray, rate: float) -> float:
    """Share of defects above the quantile of the normal scores that leaves out at most this rate of them."""
    return float((defective > np.quantile(normal, 1 - rate, method="higher")).mean())


def found_at_alarms(normal: np.ndarray, defective: np.ndarray, n_alarms: int) -> float:
    """Share of defects above a threshold that just so many of the normal scores are above."""
    if n_alarms >= len(normal):
        return 1.0
    return float((defective > np.sort(normal)[len(normal) - 1 - n_alarms]).mean())


def predict_row(score: np.ndarray, target: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """What `predict` found of a set, and what the scores find at as many false alarms."""
    normal, alarm = target == 1, label == -1
    found = float(alarm[~normal].mean())
    best = found_at_alarms(score[normal], score[~normal], int(alarm[normal].sum()))
    return {
        "predict_found": found,
        "predict_alarms": float(alarm[normal].mean()),
        "found_at_same": best,
        "ratio": found / best if best else math.nan,
    }


def set_row(outcome: Outcome, test: ImageDataset, name: str) -> dict[str, float]:
    """All that is measured of one set."""
    rows = np.flatnonzero(test.category == name)
    images, score = test[rows], outcome.score[rows]
    normal = images.target == 1
    row = {
        "n_normal": int(normal.sum()),
        "n_defective": int((~normal).sum()),
        **{f"found_at_{rate}": found_at_rate(score[normal], score[~normal], rate / 100) for rate in (1, 5)},
        **image_and_pixel_metrics(outcome, images, rows),
        "fit_seconds": outcome.fit_seconds,
        "images_per_second": len(test) / outcome.score_seconds,
    }
    if outcome.verdicts is not None:
        row |= predict_row(score, images.target, outcome.verdicts.label[rows])
    return row


def image_and_pixel_metrics(outcome: Outcome, images: ImageDataset, rows: np.ndarray) -> dict[str, float]:
    """Those of `vqad.metrics`; defects without a mask are left out of the pixels'."""
    maps = masks = None
    if outcome.verdicts is not None and any(images.mask_paths):
        data, verdicts = check_images(images), outcome.verdicts
        maps = [verdicts.anomaly_map(int(row), data.size(i)) for i, row in enumerate(rows)]
        masks = images.masks()
    return evaluate(images.target, outcome.score[rows], masks=masks, maps=maps).mean


def with_mean(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The rows and one more, the mean over the sets that have a number."""
    return {**rows, "mean": {key: mean_of(row.get(key, math.nan) for row in rows.values()) for key, *_ in COLUMNS}}


def mean_of(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


# ---- what is told --------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, float]]) -> str:
    """Rows as aligned text."""
    cells = [["", *(heading for _, heading, _ in COLUMNS)]]
    for name, row in rows.items():
        values = [(row.get(key, math.nan), how) for key, _, how in COLUMNS]
        cells.append([name, *("-" if math.isnan(value) else format(value, how) for value, how in values)])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        [f"{first:<{widths[0]}}", *(f"{text:>{n}}" for text, n in zip(rest, widths[1:]))] for first, *rest in cells
    ]
    return "\n".join("  ".join(line) for line in lines)


def record(task: Task, detector: str, outcome: Outcome, rows: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One model's results as JSON takes them, image by image too."""
    verdicts = outcome.verdicts
    given = {} if verdicts is None else {"label": verdicts.label.tolist(), "judged_as": verdicts.category.tolist()}
    images = {
        "set": task.test.category.tolist(),
        "defect": task.test.defect.tolist(),
        "path": task.test.paths.tolist(),
        "score": outcome.score.tolist(),
        **given,
    }
    parameters = {key: repr(value) for key, value in (outcome.parameters or {}).items()}
    known = {name: {k: None if math.isnan(v) else v for k, v in row.items()} for name, row in rows.items()}
    n_train = {name: int((task.train.category == name).sum()) for name in task.sets}
    return {
        "task": task.name, "detector": detector, "n_train": n_train, "rows": known, "parameters": parameters,
        "images": images,
    }  # fmt: skip


def measure(
    task: Task, detector: str, parameters: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Fit and judge, print the table, and give what JSON takes and the rows of the sets."""
    print(f"\n{detector} on {task.name}: {len(task.train)} images learned, {len(task.test)} judged", flush=True)
    if detector == YARDSTICK:
        outcome = run_yardstick(task)
    else:
        outcome = run_detector(detector, task, known_parameters(detector, parameters))
    rows = {name: set_row(outcome, task.test, name) for name in task.sets}
    print(table(with_mean(rows)), flush=True)
    return record(task, detector, outcome, with_mean(rows)), rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    skipped: dict[str, str] = {}
    parameters = {"random_state": args.seed, "memory": args.memory, **dict(args.set_params)}
    records: list[dict[str, Any]] = []
    every: dict[str, dict[str, dict[str, float]]] = {}
    tasks = tasks_of(args, skipped)
    if not tasks:
        sys.exit("none of the sets has images")
    for task in tasks:
        for detector in args.detectors:
            done, rows = measure(task, detector, parameters)
            records.append(done)
            if task.name != SOLAR_CELLS:  # these are no set of the means
                every.setdefault(detector, {}).update(rows)
            if args.out:
                write(args.out, args, records, skipped)
    if sum(task.name != SOLAR_CELLS for task in tasks) > 1:
        print(f"\nmeans over all {len(every[args.detectors[0]])} sets")
        print(table({detector: with_mean(rows)["mean"] for detector, rows in every.items()}))
    if skipped:
        print(f"\nSKIPPED, no images: {', '.join(skipped)}", file=sys.stderr)


def tasks_of(args: argparse.Namespace, skipped: dict[str, str]) -> list[Task]:
    """What was asked for; ``skipped`` gets the sets that are not there."""
    small = dict(args.small)
    tasks = []
    if args.root is not None:
        for names in groups_of_sets(args.sets):
            limits = {name: min(args.max_train, small.get(name, args.max_train)) for name in names}
            tasks.append(mvtec_task(args.root, limits, skipped))
    if args.elpv:
        tasks.append(elpv_task())
    return [task for task in tasks if task is not None]


def groups_of_sets(text: str) -> list[list[str]]:
    """The sets of each model, of "a,b;c,d"."""
    groups = [[name.strip() for name in group.split(",") if name.strip()] for group in text.split(";")]
    return [group for group in groups if group]


def write(path: str, args: argparse.Namespace, records: list[dict[str, Any]], skipped: dict[str, str]) -> None:
    """Write all results so far."""
    versions = {"vqad": vqad.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(
            {"arguments": vars(args), "versions": versions, "skipped": skipped, "models": records}, file, indent=1
        )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder of sets in the layout of MVTec AD")
    parser.add_argument(
        "--sets", default=SETS, help="names, separated by commas; a semicolon starts the next model (%(default)s)"
    )
    parser.add_argument("--elpv", action="store_true", help="also use the solar cells of the package elpv-dataset")
    known = [*DETECTORS, YARDSTICK]
    parser.add_argument("--detectors", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--max-train", type=int, default=200, help="training images per set, except for solar cells (%(default)s)"
    )
    parser.add_argument("--small", nargs="+", type=small_set, default=[], metavar="SET=N", help="fewer of this set")
    parser.add_argument("--memory", metavar="DIR", help="folder to cache features in, which makes later fits faster")
    parser.add_argument("--seed", type=int, default=0, help="random_state of the detectors (%(default)s)")
    parser.add_argument("--set-params", nargs="+", type=assignment, default=[], metavar="NAME=VALUE",
                        help="parameters, for the detectors that have them")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write all numbers here as JSON, after each model")
    args = parser.parse_args(argv)
    if args.root is None and not args.elpv:
        parser.error("give ROOT, --elpv, or both")
    trained = [name for name in args.detectors if name != YARDSTICK]
    unknown = {
        key for key, value in args.set_params if not any(known_parameters(name, {key: value}) for name in trained)
    }
    absent = {name for name, _ in args.small}.difference(*groups_of_sets(args.sets))
    if absent:
        parser.error(f"--small: {', '.join(sorted(absent))} is none of the sets {args.sets}")
    if unknown:
        parser.error(f"--set-params: none of the detectors has {', '.join(sorted(unknown))}")
    return args


def small_set(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not SET=N")
    return name, int(number)


if __name__ == "__main__":
    main()
