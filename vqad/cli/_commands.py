"""What each command does, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vqad
from vqad._writing import writing
from vqad.base import BaseImageDetector
from vqad.cli._files import (
    files,
    groups_of,
    ignored,
    known_images,
    masks_in,
    spare,
    training_images,
    writable,
)
from vqad.cli._messages import INTERRUPTED, OK
from vqad.cli._models import loaded, thresholds_of
from vqad.cli._scoring import score as score
from vqad.collective import learning_together
from vqad.datasets import load_mvtec
from vqad.datasets._layouts import loader_of
from vqad.demo import FULL, QUICK, run_demo
from vqad.images import check_images
from vqad.metrics import compare as compare_scores
from vqad.metrics import evaluate as measure
from vqad.persistence import replaceable
from vqad.registry import detector_class
from vqad.report import judge, write_report


def fit(arguments: argparse.Namespace) -> int:
    """Fit. Of the processes that torchrun started, each does its share; only the first prints and saves."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return _fit(arguments)
    with learning_together() as crew, contextlib.ExitStack() as quiet:
        if crew.rank:
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        return _fit(arguments, saves=crew.rank == 0)


def _fit(arguments: argparse.Namespace, saves: bool = True) -> int:
    images = training_images(arguments.directory)
    names, counts = np.unique(images.category, return_counts=True)
    target = writable(arguments.output)
    replaceable(target)
    mask = ignored(arguments.ignore, images.paths)
    spare([*files(images), *masks_in(mask)], [target])
    by_folder = len(names) > 1 if arguments.by_folder is None else arguments.by_folder
    groups = None
    if arguments.groups is not None:
        groups = groups_of(images.paths, arguments.directory, arguments.groups)
        if by_folder:  # piece 1 of one category is not piece 1 of another
            groups = list(zip(images.category, groups))
    detector = _detector(arguments)
    if isinstance(mask, str):
        detector.set_params(ignore=mask)
    data = check_images(images).ignoring(mask) if isinstance(mask, list) else images
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    origin = "from the folders" if by_folder else "to be discovered"
    of = "" if groups is None else f" in groups: {len(set(groups))}"
    print(f"{len(images)} normal images{of} ({listed}); categories {origin}")
    started = time.monotonic()
    detector.fit(data, category=images.category if by_folder else None, groups=groups)
    if arguments.by_folder is None and not by_folder and len(detector.categories_) == 1:
        detector.rename_categories(names)
    if saves:
        vqad.save(detector, target)
    found = [str(name) for name in detector.categories_]
    n_passes, seconds = detector.n_iter_, time.monotonic() - started
    print(f"{len(found)} {'category' if len(found) == 1 else 'categories'}: {', '.join(found)}")
    print(f"{n_passes} pass{'' if n_passes == 1 else 'es'} in {seconds:.0f} s; threshold {thresholds_of(detector)}")
    print(f"model written to {target}")
    return INTERRUPTED if detector.training_log_.interrupted else OK


def recalibrate(arguments: argparse.Namespace) -> int:
    rate = arguments.false_alarm_rate
    if rate is None and arguments.directory is None:
        raise ValueError("nothing to do: give a folder of new normal images, or --false-alarm-rate, or both.")
    target = writable(arguments.output)
    replaceable(target)
    images = None if arguments.directory is None else training_images(arguments.directory)
    mask = None if images is None else ignored(arguments.ignore, images.paths)
    spare([arguments.model, *files(images), *masks_in(mask)], [target])
    detector = loaded(arguments)
    named = images is not None and set(images.category) <= set(detector.categories_.astype(str))
    category = images.category if named and detector.categories_.dtype.kind == "U" else None
    data = images if images is None or mask is None else check_images(images).ignoring(mask)
    detector.recalibrate(data, category=category, false_alarm_rate=rate)
    vqad.save(detector, target)
    seen = "the images held out at fit" if images is None else f"{len(images)} normal images"
    print(f"threshold {thresholds_of(detector)} from {seen}, for a false-alarm rate of {detector.false_alarm_rate:g}")
    print(f"model written to {target}")
    return OK


def evaluate(arguments: argparse.Namespace) -> int:
    images = (loader_of(Path(arguments.directory)) or load_mvtec)(arguments.directory, split="test")
    target = None if arguments.json is None else writable(arguments.json)
    spare([arguments.model, *files(images)], [target])
    detector = loaded(arguments)
    verdicts = judge(detector, images)
    data = check_images(images)
    pixels: dict[str, Any] = {}
    if any(path is not None for path in images.mask_paths) and not arguments.no_pixels:
        # Resized one at a time: together, maps at full size may not fit into memory.
        maps = _Lazy(len(images), lambda i: verdicts.anomaly_map(i, data.size(i)))
        pixels = {"masks": _Lazy(len(images), images.mask), "maps": maps, "fpr_limit": arguments.fpr_limit}
    found = measure(images.target, verdicts.score, images.category, **pixels)
    print(found)
    alarm = verdicts.label == -1
    for label, what in ((1, "false alarms: {} of {} normal images"), (-1, "found: {} of {} anomalies")):
        mine = images.target == label
        print(what.format(int(alarm[mine].sum()), int(mine.sum())))
    if not detector.scorer_.router.discovered and set(images.category) <= set(detector.categories_.astype(str)):
        right = (verdicts.category.astype(str) == images.category).mean()
        print(f"category inferred correctly: {right:.1%}")
    if target is not None:
        with writing(target):
            target.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return OK


def compare(arguments: argparse.Namespace) -> int:
    images = (loader_of(Path(arguments.directory)) or load_mvtec)(arguments.directory, split="test")
    scores = []
    for path in (arguments.a, arguments.b):
        detector = vqad.load(path).set_params(device=arguments.device)
        scores.append(-detector.score_samples(images))
    rate, seed = arguments.false_alarm_rate, arguments.seed
    found = compare_scores(images.target, *scores, category=images.category, false_alarm_rate=rate, random_state=seed)
    print(f"a: {arguments.a}\nb: {arguments.b}\n{found}")
    return OK


def report(arguments: argparse.Namespace) -> int:
    images, truth = known_images(arguments.directory)
    target = writable(arguments.output)
    spare([arguments.model, *files(images)], [target])
    detector = loaded(arguments)
    has_masks = truth and not arguments.no_pixels and any(path is not None for path in images.mask_paths)
    page = write_report(
        target,
        detector,
        images,
        y=images.target if truth else None,
        category=images.category if truth else None,
        title=arguments.title or f"Anomaly report: {Path(arguments.directory).resolve().name}",
        masks=_Lazy(len(images), images.mask) if has_masks else None,
        n_images=arguments.n_images,
    )
    print(f"page written to {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return OK


def export(arguments: argparse.Namespace) -> int:
    images = None if arguments.images is None else known_images(arguments.images)[0]
    target = writable(arguments.output)
    replaceable(target)
    spare([arguments.model, *files(images)], [target])
    detector = vqad.load(arguments.model)
    try:
        vqad.export_onnx(detector, target, X=images)
    except RuntimeError as error:  # from the comparison, or from torch's exporter
        raise ValueError(f"the model could not be exported: {error}") from error
    compared = "synthetic images" if images is None else f"{len(images)} images"
    size = target.stat().st_size / 1e6
    print(f"graph written to {target} ({size:.1f} MB); on {compared} it agrees with the model in float32")
    print("input: image, float32 (height, width, 3) in 0..1; outputs: score (higher is more normal), label,")
    print("map (higher is more anomalous), category")
    return OK


def demo(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
    result = run_demo(
        QUICK if arguments.quick else FULL,
        random_state=arguments.seed,
        device=arguments.device,
        verbose=int(sys.stderr.isatty()),
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{result.summary()}\n")
    page = result.write_pages(arguments.out)
    models = result.save_models(arguments.out)
    print(f"Heatmaps: {page.resolve()}")
    print(f"Models:   {', '.join(str(path.resolve()) for path in models)}")
    print(f"Total:    {time.monotonic() - started:.0f} s")
    return OK


# ---- models --------------------------------------------------------------------------------------


def _detector(arguments: argparse.Namespace) -> BaseImageDetector:
    """A detector with the parameters that were given, the defaults for the rest."""
    named = ("max_iter", "image_size", "batch_size", "false_alarm_rate", "device")
    given = {name: value for name in named if (value := getattr(arguments, name)) is not None}
    more = dict(arguments.set or ())
    options = {**{name: name for name in named}, "random_state": "seed"}
    for name in more:
        if name in options:
            raise ValueError(f"--set {name} is refused: give it as --{options[name].replace('_', '-')}.")
    if more.get("backbone", "") is None:
        raise ValueError("--set backbone=None expects features, and images need a backbone: leave it out.")
    detector = detector_class(arguments.detector)(random_state=arguments.seed, verbose=int(sys.stderr.isatty()))
    detector.set_params(**given, **more)
    return detector


# ---- maps and masks ------------------------------------------------------------------------------


class _Lazy:
    """A sequence whose items a function computes when they are asked for."""

    def __init__(self, n: int, make: Callable[[int], Any]):
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        return self._make(i)
