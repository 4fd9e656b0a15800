"""What each command does, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vqad
from vqad._decode import not_there
from vqad._writing import writing
from vqad.base import BaseImageDetector
from vqad.calibration import drift_p_value
from vqad.cli._arguments import DRAWN_SIDE
from vqad.cli._files import (
    check_folder_of_maps,
    csv_rows,
    files,
    groups_of,
    ignored,
    images_to_score,
    known_images,
    masks_in,
    spare,
    training_images,
    writable,
    write_image,
)
from vqad.cli._messages import INTERRUPTED, OK, USER_ERROR, complain, one_line, printable
from vqad.datasets import load_mvtec
from vqad.datasets._layouts import loader_of
from vqad.demo import FULL, QUICK, run_demo
from vqad.images import ImageSequence, check_images
from vqad.metrics import compare as compare_scores
from vqad.metrics import evaluate as measure
from vqad.persistence import replaceable
from vqad.registry import detector_class
from vqad.report import Verdicts, judge, overlay, write_report

# Images that are scored, and then told of, together.
ROWS_AT_ONCE = 32


def fit(arguments: argparse.Namespace) -> int:
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
        if by_folder:  # the first piece of one category is not that of another
            groups = list(zip(images.category, groups))
    detector = _detector(arguments)
    if isinstance(mask, str):
        detector.set_params(ignore=mask)
    data = check_images(images).ignoring(mask) if isinstance(mask, list) else images
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    origin = "from the folders" if by_folder else "to be found"
    of = "" if groups is None else f" in groups: {len(set(groups))}"
    print(f"{len(images)} normal images{of} ({listed}); categories {origin}")
    started = time.monotonic()
    detector.fit(data, category=images.category if by_folder else None, groups=groups)
    if arguments.by_folder is None and not by_folder and len(detector.categories_) == 1:  # no other kind was found
        detector.rename_categories(names)
    vqad.save(detector, target)
    found = [str(name) for name in detector.categories_]
    n_passes, seconds = detector.n_iter_, time.monotonic() - started
    print(f"{len(found)} {'category' if len(found) == 1 else 'categories'}: {', '.join(found)}")
    print(f"{n_passes} pass{'' if n_passes == 1 else 'es'} in {seconds:.0f} s; threshold {_thresholds(detector)}")
    print(f"model written to {target}")
    return INTERRUPTED if detector.training_log_.interrupted else OK


def score(arguments: argparse.Namespace) -> int:
    paths, outputs = images_to_score(arguments.images)
    n_asked, named = len(paths), set(arguments.images)
    broken = {path for path in paths if path not in named and not os.path.isfile(path)}  # links that folders have
    for path in sorted(broken):
        complain(f"error: {one_line(not_there(path, f'path {path!r}'))}")
    outputs = [output for path, output in zip(paths, outputs) if path not in broken]
    paths = [path for path in paths if path not in broken]
    if not paths:
        return USER_ERROR
    drawn = [] if arguments.maps is None else [arguments.maps / output for output in outputs]
    mask = ignored(arguments.ignore, paths)
    spare([arguments.model, *paths, *masks_in(mask)], [arguments.csv, *drawn])
    if arguments.csv is not None:
        writable(arguments.csv)
    if arguments.maps is not None:
        check_folder_of_maps(arguments.maps, arguments.images)
    data = check_images(paths) if mask is None else check_images(paths).ignoring(mask)
    detector = _loaded(arguments)
    if arguments.false_alarm_rate is not None:
        detector.recalibrate(false_alarm_rate=arguments.false_alarm_rate)
    if arguments.maps is not None:
        with writing(arguments.maps):
            arguments.maps.mkdir(parents=True, exist_ok=True)
    shown = [printable(path) for path in paths]
    wide = max(len("path"), *map(len, shown))
    kind = max(len("category"), *(len(str(name)) for name in detector.categories_))
    heading = f"{'path':<{wide}}  {'category':<{kind}}  {'score':>8}  {'p-value':>7}  label"
    n_anomalies = n_scored = 0
    scores: list[float] = []
    with csv_rows(arguments.csv) as write:
        for start in range(0, len(paths), ROWS_AT_ONCE):
            rows, verdicts = _judged(detector, data, range(start, min(start + ROWS_AT_ONCE, len(paths))))
            if verdicts is None:
                continue
            if not n_scored:
                print(heading)
            for k, i in enumerate(rows):
                label = "anomaly" if verdicts.label[k] == -1 else "normal"
                name, score, p = verdicts.category[k], float(verdicts.score[k]), float(verdicts.p_value[k])
                print(f"{shown[i]:<{wide}}  {name!s:<{kind}}  {score:8.3f}  {p:7.4f}  {label}", flush=True)
                scores.append(score)
                write([paths[i], name, score, float(verdicts.threshold[k]), p, label])
                if arguments.maps is not None:
                    write_image(arguments.maps / outputs[i], _drawn(detector, data, i, verdicts, k))
            n_anomalies += int((verdicts.label == -1).sum())
            n_scored += len(rows)
    if n_scored:
        print(f"{n_anomalies} of {n_scored} images are anomalous (scores over {_thresholds(detector)})")
        p = drift_p_value(detector.fitted_.held_out.score, np.array(scores), detector.fitted_.seed)
        meaning = "the images are not what was learned, or many are defective" if p < 0.01 else "nothing seems changed"
        print(f"drift: p = {p:.2g}, {meaning}")
    return OK if n_scored == n_asked else USER_ERROR


def _judged(detector: BaseImageDetector, data: ImageSequence, rows: range) -> tuple[Sequence[int], Verdicts | None]:
    """What is said of those images that can be read, and which these are; complain of the others."""
    try:
        return rows, judge(detector, data, rows)
    except (ValueError, OSError):
        readable = [i for i in rows if _is_readable(data, i)]
        if len(readable) == len(rows):
            raise
        return readable, judge(detector, data, readable) if readable else None


def _is_readable(data: ImageSequence, i: int) -> bool:
    try:
        data.load([i], (1, 1))
    except (ValueError, OSError) as error:
        complain(f"error: {one_line(error)}")
        return False
    return True


def recalibrate(arguments: argparse.Namespace) -> int:
    rate = arguments.false_alarm_rate
    if rate is None and arguments.directory is None:
        raise ValueError("nothing to do: give a folder of new normal images, --false-alarm-rate, or both.")
    target = writable(arguments.output)
    replaceable(target)
    images = None if arguments.directory is None else training_images(arguments.directory)
    mask = None if images is None else ignored(arguments.ignore, images.paths)
    spare([arguments.model, *files(images), *masks_in(mask)], [target])
    detector = _loaded(arguments)
    named = images is not None and set(images.category) <= set(detector.categories_.astype(str))
    category = images.category if named and detector.categories_.dtype.kind == "U" else None
    data = images if images is None or mask is None else check_images(images).ignoring(mask)
    detector.recalibrate(data, category=category, false_alarm_rate=rate)
    vqad.save(detector, target)
    seen = "the images held out at fit" if images is None else f"{len(images)} normal images"
    print(f"threshold {_thresholds(detector)} from {seen}, for a false-alarm rate of {detector.false_alarm_rate:g}")
    print(f"model written to {target}")
    return OK


def evaluate(arguments: argparse.Namespace) -> int:
    images = (loader_of(Path(arguments.directory)) or load_mvtec)(arguments.directory, split="test")
    target = None if arguments.json is None else writable(arguments.json)
    spare([arguments.model, *files(images)], [target])
    detector = _loaded(arguments)
    verdicts = judge(detector, images)
    data = check_images(images)
    pixels: dict[str, Any] = {}
    if any(path is not None for path in images.mask_paths) and not arguments.no_pixels:
        # Made one at a time: at full size they would not fit into memory.
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
        print(f"category inferred right: {right:.1%}")
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
    detector = _loaded(arguments)
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
    except RuntimeError as error:  # of the comparison, or of torch's exporter
        raise ValueError(f"the model could not be exported: {error}") from error
    compared = "drawn images" if images is None else f"{len(images)} images"
    size = target.stat().st_size / 1e6
    print(f"graph written to {target} ({size:.1f} MB); on {compared} it gives what the model gives in float32")
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
            raise ValueError(f"--set {name} is not taken: give it as --{options[name].replace('_', '-')}.")
    if more.get("backbone", "") is None:
        raise ValueError("--set backbone=None is for features: images need a backbone, such as the default one.")
    detector = detector_class(arguments.detector)(random_state=arguments.seed, verbose=int(sys.stderr.isatty()))
    detector.set_params(**given, **more)
    return detector


def _loaded(arguments: argparse.Namespace) -> BaseImageDetector:
    """The model, to work on the device of this machine that was asked for, not on the one it was fitted on."""
    detector: BaseImageDetector = vqad.load(arguments.model)
    detector.set_params(device=arguments.device)
    return detector


def _thresholds(detector: BaseImageDetector) -> str:
    values = [f"{-value:.3f}" for value in np.atleast_1d(detector.offset_)]
    if len(values) > 1:
        values = [f"{name} {value}" for name, value in zip(detector.categories_, values)]
    return ", ".join(values)


# ---- maps and masks ------------------------------------------------------------------------------


def _drawn(detector: BaseImageDetector, data: ImageSequence, i: int, verdicts: Verdicts, k: int) -> Any:
    size = data.size(i)
    shrink = min(1.0, DRAWN_SIDE / max(size))
    size = max(1, round(shrink * size[0])), max(1, round(shrink * size[1]))
    pixels = data.load([i], size)[0].permute(1, 2, 0).numpy()
    return overlay(pixels, verdicts.anomaly_map(k, size), detector.map_threshold_)


class _Lazy:
    """What a function makes of 0, 1, ..., made whenever it is asked for."""

    def __init__(self, n: int, make: Callable[[int], Any]):
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        return self._make(i)
