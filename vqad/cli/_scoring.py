"""`vqad score`: images from folders and lists, scored here or on workers, to rows written as they come."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np

from vqad._decode import not_there
from vqad._ignore import Ignored, as_mask
from vqad._writing import writing
from vqad.base import BaseImageDetector
from vqad.calibration import drift_p_value
from vqad.cli._arguments import DRAWN_SIDE
from vqad.cli._files import (
    Listed,
    check_folder_of_maps,
    csv_rows,
    ignored,
    images_to_score,
    masks_in,
    spare,
    writable,
    write_image,
)
from vqad.cli._messages import OK, USER_ERROR, complain, one_line, printable
from vqad.cli._models import loaded, thresholds_of
from vqad.images import ImageSequence, check_images
from vqad.report import overlay
from vqad.verdicts import Verdicts, sequence_of, verdicts_of
from vqad.workers import Done, JudgeTask, do_task, map_in_order, results

# Images that are scored and reported together.
ROWS_AT_ONCE = 32
# Largest number of scores, the first ones, that the drift test uses.
DRIFT_ROWS = 100_000


Pair = tuple[str, Path | None, str | None]
"""Paths of an image, of its heatmap relative to the folder of maps, and of its mask of what to ignore."""


class Part(NamedTuple):
    """Images that are scored together, with their heatmaps; ``one`` mask to ignore for all, ``masks`` for each."""

    numbers: range
    paths: list[str]
    outputs: list[Path | None]
    one: np.ndarray | None
    masks: list[str | None]

    def images(self) -> ImageSequence:
        paths = [os.path.abspath(path) for path in self.paths]
        masks = [None if mask is None else os.path.abspath(mask) for mask in self.masks] if any(self.masks) else None
        ignored = None if self.one is None and masks is None else Ignored(self.one, masks)
        return ImageSequence(paths, np.arange(len(paths)), None, ignored, np.asarray(self.numbers))


def score(arguments: argparse.Namespace) -> int:
    """Judge all images in the folders and the list, except those that already have a row."""
    named, listed, n_broken = _named(arguments)
    if not named and listed is None:
        return USER_ERROR
    detector = loaded(arguments)
    if arguments.false_alarm_rate is not None:
        detector.recalibrate(false_alarm_rate=arguments.false_alarm_rate)
    table = _Table(detector, arguments, max([len("path"), *(len(printable(path)) for path, _, _ in named)]))
    with table.opened(resume=arguments.resume), _workers(arguments) as are_elsewhere:
        more = () if listed is None else listed.with_outputs(arguments.maps is not None)
        missing = (pair for pair in chain(named, more) if not table.has(pair[0]))
        one = arguments.ignore
        one = None if one is None or os.path.isdir(one) else as_mask(one, "--ignore")
        for part, readable in _judged(detector, _parts(missing, one), arguments, are_elsewhere):
            table.add(part, *readable)
    return table.close(n_broken)


def _named(arguments: argparse.Namespace) -> tuple[list[Pair], Listed | None, int]:
    """Images of the command line, images of the list, and the number of broken links. Checks all outputs.

    This comes before opening the model, which is slow.
    """
    paths, outputs = images_to_score(arguments.images)
    given = set(arguments.images)
    broken = {path for path in paths if path not in given and not os.path.isfile(path)}  # links in folders
    for path in sorted(broken):
        complain(f"error: {one_line(not_there(path, f'path {path!r}'))}")
    named = [(path, output) for path, output in zip(paths, outputs) if path not in broken]
    mask = ignored(arguments.ignore, [path for path, _ in named])
    masks = mask if isinstance(mask, list) else [None] * len(named)
    pairs: list[Pair] = [(*pair, own) for pair, own in zip(named, masks)]
    listed = None if arguments.list is None else Listed(arguments.list)
    drawn = [] if arguments.maps is None else [arguments.maps / output for _, output in named]
    spare([arguments.model, *(path for path, _ in named), *masks_in(mask)], [arguments.csv, *drawn])
    if listed is not None:
        spare(listed.paths(), [arguments.csv])
    if arguments.csv is not None:
        writable(arguments.csv)
    if arguments.maps is not None:
        check_folder_of_maps(arguments.maps, arguments.images)
    if named:
        images = check_images([path for path, _ in named])
        if mask is not None:
            images.ignoring(mask)
    if arguments.maps is not None:
        with writing(arguments.maps):
            arguments.maps.mkdir(parents=True, exist_ok=True)
    return pairs, listed, len(broken)


def _parts(pairs: Iterable[Pair], one: np.ndarray | None) -> Iterator[Part]:
    pairs, start = iter(pairs), 0
    while some := list(islice(pairs, ROWS_AT_ONCE)):
        paths, outputs, masks = (list(column) for column in zip(*some))
        yield Part(range(start, start + len(some)), paths, outputs, one, masks)
        start += len(some)


# ---- where it is judged ----------------------------------------------------------------------------


@contextmanager
def _workers(arguments: argparse.Namespace) -> Iterator[bool]:
    """Have joblib use the workers asked for; yields whether there are any."""
    address, workers = arguments.scheduler, arguments.workers
    if address is None:
        if workers in (None, 1):
            yield False
            return
        with joblib.parallel_config(backend="loky", n_jobs=workers):
            yield True
        return
    with _cluster(address) as config, joblib.parallel_config(**config, n_jobs=-1 if workers is None else workers):
        yield True


@contextmanager
def _cluster(address: str) -> Iterator[dict[str, Any]]:
    """Arguments of `joblib.parallel_config` for the scheduler at an address; disconnects at the end."""
    engine = "ray" if address == "ray" or address.startswith("ray://") else "dask"
    try:
        if engine == "ray":
            import ray
            from ray.util.joblib import register_ray
        else:
            from distributed import Client
    except ImportError as error:
        raise ImportError(f'--scheduler {address} needs {engine}: pip install "vqad[{engine}]".') from error
    try:
        if engine == "ray":
            ray.init(address="auto" if address == "ray" else address, log_to_driver=False, logging_level="ERROR")
            client = None
        else:
            client = Client(address, timeout=20)
    except (OSError, TimeoutError, ConnectionError, ValueError) as error:
        raise OSError(f"no {engine} scheduler answers at {address!r}: {one_line(error)}") from error
    try:
        if client is None:
            register_ray()
        yield {"backend": engine} if client is None else {"backend": engine, "client": client}
    finally:
        ray.shutdown() if client is None else client.close()


def _judged(
    detector: BaseImageDetector, parts: Iterator[Part], arguments: argparse.Namespace, are_elsewhere: bool
) -> Iterator[tuple[Part, Any]]:
    """Each part with the judgement of its images, in order."""
    if detector.backbone is None:
        sequence_of(detector, None)  # raises
    source = detector.map_source(ImageSequence([], np.arange(0)))
    where = (detector.device, detector.precision)
    task = JudgeTask(detector.scorer_, source, arguments.maps is not None, where, skips=True)
    waiting: list[Part] = []

    def images() -> Iterator[ImageSequence]:
        for part in parts:
            waiting.append(part)
            yield part.images()

    done = map_in_order(task, images(), None) if are_elsewhere else _here(task, images())
    with closing(done):
        for value, _ in results(done, news=ImageSequence([], np.arange(0))):
            yield waiting.pop(0), value


def _here(task: JudgeTask, parts: Iterator[ImageSequence]) -> Generator[Done, None, None]:
    for part in parts:
        yield do_task(task, None, part, None)


# ---- where it is written ---------------------------------------------------------------------------


class _Table:
    """Rows on the screen and in a file, which may already have some, and heatmaps in a folder."""

    def __init__(self, detector: BaseImageDetector, arguments: argparse.Namespace, wide: int) -> None:
        self.detector, self.csv, self.maps = detector, arguments.csv, arguments.maps
        kind = max(len("category"), *(len(str(name)) for name in detector.categories_))
        self.form = f"{{:<{wide}}}  {{:<{kind}}}  {{:>8}}  {{:>7}}  {{}}"
        self.scores = array("d")
        self.n_scored = self.n_anomalies = self.n_failed = self.n_before = 0
        self.known: set[bytes] = set()
        self.write: Callable[[list[list[Any]]], None] = lambda rows: None

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        with csv_rows(self.csv, resume) as (before, self.write):
            for row in before:
                self._take_over(row)
            if self.n_before:
                complain(f"resuming: {self.csv!r} already has rows for {self.n_before} images")
            yield

    def _take_over(self, row: dict[str, str]) -> None:
        """Count a row of an earlier run, which must have had this model and threshold."""
        thresholds = np.atleast_1d(-np.asarray(self.detector.offset_))
        if not any(float(row["threshold"]) == threshold for threshold in thresholds.tolist()):
            raise ValueError(
                f"{self.csv!r} has rows of another model or false-alarm rate, with the threshold {row['threshold']}: "
                "give another name, or leave --resume out to overwrite the file."
            )
        self.known.add(_key(row["path"]))
        self.n_before += 1
        self._count(float(row["anomaly_score"]), row["label"])

    def has(self, path: str) -> bool:
        return bool(self.known) and _key(path) in self.known

    def _count(self, score: float, label: str) -> None:
        self.n_scored += 1
        self.n_anomalies += label == "anomaly"
        if len(self.scores) < DRIFT_ROWS:
            self.scores.append(score)

    def add(self, part: Part, rows: np.ndarray, judgement: Any, errors: dict[int, str]) -> None:
        for error in errors.values():
            complain(f"error: {one_line(error)}")
        self.n_failed += len(errors)
        if judgement is None:
            return
        if self.n_scored == self.n_before:
            print(self.form.format("path", "category", "score", "p-value", "label"))
        verdicts, new = verdicts_of(self.detector.fitted_, judgement, self._hidden(part, rows)), []
        for k, i in enumerate(rows.tolist()):
            label, name = "anomaly" if verdicts.label[k] == -1 else "normal", verdicts.category[k]
            score, p = float(verdicts.score[k]), float(verdicts.p_value[k])
            shown = self.form.format(printable(part.paths[i]), str(name), f"{score:.3f}", f"{p:.4f}", label)
            print(shown, flush=True)
            new.append([part.paths[i], name, score, float(verdicts.threshold[k]), p, label])
            self._count(score, label)
            if self.maps is not None:
                write_image(self.maps / part.outputs[i], self._drawn(part, i, verdicts, k))
        self.write(new)

    def _hidden(self, part: Part, rows: np.ndarray) -> Any:
        """Masks of what to ignore in these images, if they are to be drawn."""
        source = None if self.maps is None else self.detector.map_source(part.images())
        return None if source is None or not source.ignores else source.data.subset(rows).mask

    def _drawn(self, part: Part, i: int, verdicts: Verdicts, k: int) -> Any:
        images = part.images()
        size = images.size(i)
        shrink = min(1.0, DRAWN_SIDE / max(size))
        size = max(1, round(shrink * size[0])), max(1, round(shrink * size[1]))
        pixels = images.load([i], size)[0].permute(1, 2, 0).numpy()
        return overlay(pixels, verdicts.anomaly_map(k, size), self.detector.map_threshold_)

    def close(self, n_broken: int) -> int:
        """Print the summary; returns the exit code."""
        if self.n_scored:
            thresholds = thresholds_of(self.detector)
            print(f"{self.n_anomalies} of {self.n_scored} images are anomalous (scores over {thresholds})")
            fitted = self.detector.fitted_
            p = drift_p_value(fitted.held_out.score, np.array(self.scores), fitted.seed)
            low = "the images differ from those learned from, or many are defective"
            print(f"drift: p = {p:.2g}, {low if p < 0.01 else 'no change detected'}")
        sys.stdout.flush()
        return USER_ERROR if n_broken or self.n_failed or not self.n_scored else OK


def _key(path: str) -> bytes:
    """A digest of a path: the names of millions of images would not fit into memory."""
    return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()
