"""Judging images on the workers of joblib's active backend, in order, with one copy of the model per worker."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import pickle
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import closing
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from vqad._warn import holding_warnings, warn
from vqad.engine import Engine, at_most_threads
from vqad.images import ImageSequence
from vqad.scoring import Judgement, Scorer, judge_images
from vqad.source import MapSource

logger = logging.getLogger("vqad")

# Images per task: enough that the overhead does not matter, few enough that no worker waits long at the end.
LEAST_IMAGES, MOST_IMAGES = 8, 32
# Tasks per worker in one list, for backends that take only lists of tasks.
_TASKS_AT_ONCE = 16
# Number of models that a worker process keeps.
_MODELS_KEPT = 2
# Consecutive worker failures, without a result in between, after which an error is raised.
_FAILURES = 3
# Packages whose exceptions concern workers, never a task: tasks return their own exceptions.
_ENGINES = {"distributed", "ray", "joblib"}

T = TypeVar("T")


class Done(NamedTuple):
    """Result of a task.

    Attributes
    ----------
    value : object or None
        None if it failed.
    error : Exception or None
    warnings : list of (str, type)
        Warnings to issue with `vqad._warn.warn`.
    worker : str
        Host and process.
    n_opened : int
        Number of models sent to this process so far.
    """

    value: Any
    error: Exception | None
    warnings: list[tuple[str, type[Warning]]]
    worker: str
    n_opened: int


# ---- in the calling process ------------------------------------------------------------------------


def jobs_elsewhere(n_jobs: int | None) -> int:
    """Number of jobs that run in other processes at a time; 0 if the work stays in this one.

    It stays here unless `joblib.parallel_config` selects a backend of processes or machines, and within a task of such
    a backend.
    """
    if n_jobs == 1 or _in_a_task():
        return 0
    backend, configured = get_active_backend(prefer="threads")
    if getattr(backend, "supports_sharedmem", False):
        return 0
    jobs = int(backend.effective_n_jobs(configured if n_jobs is None else n_jobs))
    is_cluster = _engine_of(backend) not in ("loky", "multiprocessing")
    return jobs if jobs > 1 or is_cluster else 0


def _in_a_task() -> bool:
    """Whether this thread runs a task of a dask worker, which must not wait for other tasks."""
    worker = sys.modules.get("distributed.worker")
    return worker is not None and hasattr(worker.thread_state, "execution_state")


def _engine_of(backend: Any) -> str:
    name = type(backend).__module__
    if name.startswith("ray."):
        return "ray"
    return {"LokyBackend": "loky", "MultiprocessingBackend": "multiprocessing"}.get(type(backend).__name__, name)


def judge_anywhere(
    scorer: Scorer, source: MapSource, rows: np.ndarray, keep_maps: bool, where: tuple[Any, str]
) -> Judgement:
    """`judge_images`, on workers if `joblib.parallel_config` provides some and there are enough images.

    Parameters
    ----------
    scorer, source, rows, keep_maps
        As for `judge_images`.
    where : (device, precision)
        Values of the parameters of these names, which each worker interprets for itself.
    """
    data, jobs = source.data, jobs_elsewhere(source.n_jobs)
    is_sent = isinstance(data, ImageSequence) and data.reads_in_threads and len(rows) >= 2 * LEAST_IMAGES
    if not jobs or not is_sent:
        return judge_images(scorer, source, rows, keep_maps)
    size = min(MOST_IMAGES, max(LEAST_IMAGES, math.ceil(len(rows) / (4 * jobs))))
    # The model's own mask for all images is sent with the model.
    own = source.ignore is None or not np.array_equal(data.ignored.one, source.ignore)
    parts = (data.part(rows[start : start + size], own) for start in range(0, len(rows), size))
    work = JudgeTask(scorer, source, keep_maps, where)
    # Always close it, because joblib's workers accept nothing else before.
    with closing(map_in_order(work, parts, source.n_jobs)) as done:
        judged = [value for value, _ in results(done, data)]
    score, category, maps = zip(*judged)
    return Judgement(np.concatenate(score), np.concatenate(category), _joined(maps))


def _joined(maps: Sequence[Any]) -> Any:
    """Join the maps of several parts: an array if all have one size, else a list."""
    if all(isinstance(each, np.ndarray) for each in maps) and len({each.shape[1:] for each in maps}) == 1:
        return np.concatenate(maps)
    return [heat for each in maps for heat in each]


def results(done: Iterable[Done], news: ImageSequence | None = None) -> Iterator[tuple[Any, Done]]:
    """Yield the values of tasks, issue each kind of warning once, and raise the first exception at the end."""
    opened: dict[str, int] = {}
    error: Exception | None = None
    for each in done:
        opened[each.worker], error = each.n_opened, error or each.error
        if error is not None:
            continue
        for message, category in each.warnings:
            if news is None or news.is_news(message):
                warn(message, category)
        yield each.value, each
    if error is not None:
        raise error
    logger.info("%d workers judged; models that each was sent: %s", len(opened), sorted(opened.values()))


def map_in_order(work: Callable[[Any], Done], parts: Iterable[Any], n_jobs: int | None) -> Generator[Done, None, None]:
    """``map(work, parts)`` on the workers of joblib's active backend, which draw parts as they have capacity.

    If a worker dies, its parts are given to others.
    """
    parts, waiting, failures, failed = iter(parts), deque[Any](), 0, False

    def noted(parts: Iterator[Any]) -> Iterator[Any]:
        for part in parts:
            if failed:  # wait for the few running tasks, because joblib warns about aborted ones
                return
            waiting.append(part)
            yield part

    while True:
        again = list(waiting)
        waiting.clear()
        try:
            with closing(_run(work, noted(chain(again, parts)), n_jobs)) as running:
                for done in running:
                    if not isinstance(done, Done):  # dask's result for a task that it has lost
                        raise CancelledError(f"a task was lost: {done!r}")
                    waiting.popleft()
                    failures, failed = 0, failed or done.error is not None
                    yield done
            return
        except Exception as error:
            failures += 1
            if not _is_of_a_worker(error) or failures >= _FAILURES:
                raise
            warn(f"A worker was lost ({type(error).__name__}): its images are given to others.")


def _run(work: Callable[[Any], Done], parts: Iterator[Any], n_jobs: int | None) -> Generator[Done, None, None]:
    backend, _ = get_active_backend(prefer="threads")
    work, content = work.sent_by(backend) if isinstance(work, JudgeTask) else (work, None)
    threads = getattr(backend, "inner_max_num_threads", None) or 1
    task = joblib.delayed(do_task)
    if getattr(backend, "supports_return_generator", False):
        with joblib.Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator") as parallel:
            yield from parallel(task(work, content, part, threads) for part in parts)
        return
    with joblib.Parallel(n_jobs=n_jobs, prefer="threads") as parallel:
        at_once = _TASKS_AT_ONCE * max(1, jobs_elsewhere(n_jobs))
        while some := list(islice(parts, at_once)):
            yield from parallel(task(work, content, part, threads) for part in some)


def _is_of_a_worker(error: Exception) -> bool:
    kinds = (BrokenExecutor, CancelledError, ConnectionError)
    return isinstance(error, kinds) or type(error).__module__.split(".")[0] in _ENGINES


# ---- sending the model -----------------------------------------------------------------------------


_PACKED: WeakKeyDictionary[Scorer, tuple[Any, str, np.ndarray]] = WeakKeyDictionary()


class JudgeTask:
    """Computes a `Judgement` from images, with a model whose bytes are sent separately, once to each worker.

    The bytes are an array, which joblib puts into shared memory, dask scatters, and ray keeps in its object store. A
    worker opens them when it sees their digest for the first time.

    Parameters
    ----------
    scorer : Scorer
    source : MapSource
        How maps are computed; its images are not kept.
    keep_maps : bool
    where : (device, precision)
        Values of the parameters of these names, which each worker interprets for itself.
    skips : bool, default=False
        Whether to skip images that cannot be read; the result is then `Readable`.
    """

    def __init__(
        self, scorer: Scorer, source: MapSource, keep_maps: bool, where: tuple[Any, str], skips: bool = False
    ) -> None:
        self.keep_maps, self.where, self.skips = keep_maps, where, skips
        self.map_shape, self.memory, self.of_timm = source.map_shape, source.memory, bool(source.override)
        self.n_jobs, self.tiles = source.n_jobs, None
        if source.tiling is not None:
            self.tiles = source.tiling.size, source.tiling.overlap
        self.model: Any = scorer, source.features, source.ignore
        self.digest = ""

    def sent_by(self, backend: Any) -> tuple[JudgeTask, Any]:
        """The task without its model, and the model's content in the form that this backend sends once."""
        self.digest, content = _packed(*self.model)
        task = copy.copy(self)
        task.model, task.n_jobs = None, 1
        if _engine_of(backend) != "ray":
            return task, content
        import ray

        # Stored again for each run, because it is lost with the machine that holds it.
        return task, ray.put(content)

    def __call__(self, images: ImageSequence, content: Any = None) -> Any:
        model = self.model or opened(self.digest, lambda: pickle.loads(_fetched(content)))
        engine = Engine.pick(*self.where)
        override = {"device": engine.device, "precision": self.where[1]} if self.of_timm else {}
        source = MapSource(
            images, model[1], engine, map_shape=self.map_shape, ignore=model[2], tiles=self.tiles, memory=self.memory,
            n_jobs=self.n_jobs, **override,
        )  # fmt: skip
        if self.skips:
            return judge_readable(model[0], source, self.keep_maps)
        return judge_images(model[0], source, np.arange(len(images)), self.keep_maps)


class Readable(NamedTuple):
    """Results for the images that can be read.

    Attributes
    ----------
    rows : ndarray of int
        Images that can be read.
    judgement : Judgement or None
        None if there are none.
    errors : dict of int to str
        Reasons why other images cannot be read.
    """

    rows: np.ndarray
    judgement: Judgement | None
    errors: dict[int, str]


def judge_readable(scorer: Scorer, source: MapSource, keep_maps: bool) -> Readable:
    """Judge all images that can be read; errors that are not about an image are raised."""
    rows = np.arange(len(source))
    try:
        return Readable(rows, judge_images(scorer, source, rows, keep_maps), {})
    except (ValueError, OSError):
        errors = {int(i): text for i in rows if (text := _unreadable(source.data, int(i))) is not None}
        if not errors:
            raise
    rows = np.setdiff1d(rows, list(errors))
    return Readable(rows, judge_images(scorer, source, rows, keep_maps) if len(rows) else None, errors)


def _unreadable(images: Any, i: int) -> str | None:
    try:
        images.load([i], (1, 1))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _packed(scorer: Scorer, features: Any, ignore: np.ndarray | None = None) -> tuple[str, np.ndarray]:
    """Digest and bytes of a model, computed once while it lives."""
    found = _PACKED.get(scorer)
    if found is None or found[0][0] is not features or found[0][1] is not ignore:
        # Pickles classes by value that are defined in a script or notebook, which workers do not have.
        content = pickle.dumps(joblib.wrap_non_picklable_objects((scorer, features, ignore), keep_wrapper=False))
        _PACKED[scorer] = found = (
            (features, ignore),
            hashlib.sha256(content).hexdigest(),
            np.frombuffer(content, np.uint8),
        )
    return found[1:]


# ---- on a worker -----------------------------------------------------------------------------------


_OPENING = threading.Lock()
_OPEN: OrderedDict[str, Any] = OrderedDict()
_n_opened = 0


def opened(digest: str, make: Callable[[], T]) -> T:
    """``make()`` for the content of this digest, called once per process; the last few results are kept."""
    global _n_opened
    with _OPENING:
        if digest not in _OPEN:
            _OPEN[digest] = make()
            _n_opened += 1
        _OPEN.move_to_end(digest)
        while len(_OPEN) > _MODELS_KEPT:
            _OPEN.popitem(last=False)
        found: T = _OPEN[digest]
        return found


def do_task(work: Callable[..., Any], content: Any, part: Any, threads: int | None) -> Done:
    """Run one task, with at most this number of threads.

    Its exceptions are returned, so that any exception raised comes from the backend.
    """
    arguments = (part,) if content is None else (part, content)
    said: list[tuple[str, type[Warning]]] = []
    value, error = None, None
    try:
        with at_most_threads(threads):
            value, said = holding_warnings(work)(*arguments)
    except Exception as caught:
        error = _sendable(caught)
    return Done(value, error, said, f"{os.uname().nodename if hasattr(os, 'uname') else ''} {os.getpid()}", _n_opened)


def _sendable(error: Exception) -> Exception:
    """An exception that another process can unpickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _fetched(content: Any) -> Any:
    """The bytes of a model, wherever they are stored."""
    if not isinstance(content, np.ndarray):
        import ray

        content = ray.get(content)
    return memoryview(np.ascontiguousarray(content))


def _unlock() -> None:
    global _OPENING
    _OPENING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
