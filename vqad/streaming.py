"""Reading images ahead in threads, and their maps chunk by chunk, from a cache or computed."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from joblib.parallel import get_active_backend
from torch import Tensor

from vqad._warn import holding_warnings, release_warnings
from vqad.cache import FeatureCache
from vqad.engine import threads_beside
from vqad.images import ImageSequence


def stream_maps(
    images: ImageSequence,
    indices: np.ndarray,
    read: Callable[[int], Any],
    compute: Callable[[list[Any]], list[Tensor]],
    device: torch.device,
    *,
    size: int = 1,
    cache: FeatureCache | None = None,
    n_jobs: int | None = None,
) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
    """Yield maps of images chunk by chunk: cached ones from the cache, the others computed together.

    Parameters
    ----------
    read : callable
        From an image's number to the input of ``compute``; called in threads with ``n_jobs``.
    compute : callable
        From a list of outputs of ``read`` to maps (len(list), C, h, w). Maps of an image must not depend on the others.
    size : int
        Images per chunk.
    """

    def find_or_read(i: int) -> tuple[Any, Any, Any]:
        if cache is None:
            return None, None, read(i)
        key = images.digest(i)
        found = cache.find(key)
        return key, found, None if found is not None else read(i)

    n_threads = readers(n_jobs)
    ahead = size + n_threads
    items = read_ahead(find_or_read, (int(i) for i in indices), n_threads, ahead)
    for start in range(0, len(indices), size):
        chunk = indices[start : start + size]
        keys, found, content = zip(*itertools.islice(items, len(chunk)))
        missing = [k for k, maps in enumerate(found) if maps is None]
        computed = compute([content[k] for k in missing]) if missing else []
        if cache is None:
            maps = computed
        else:
            rows = dict(enumerate(found))
            for row, k in enumerate(missing):
                rows[k] = [m[row] for m in computed]
                cache.keep(keys[k], rows[k])
            maps = [torch.stack([m.cpu() for m in stage]) for stage in zip(*rows.values())]
        # In one memory layout, cached or not, because the last bits of a sum depend on it.
        yield chunk, [m.to(device).contiguous() for m in maps]


def readers(n_jobs: int | None) -> int:
    """Number of threads that read ahead for this thread, its share in a pool; 0: it reads images itself."""
    backend, configured = get_active_backend(prefer="threads")
    if not getattr(backend, "supports_sharedmem", False):  # then n_jobs is the number of workers
        return 0
    n_threads = 1 if n_jobs == 1 else backend.effective_n_jobs(configured if n_jobs is None else n_jobs)
    return 0 if n_threads == 1 else max(1, n_threads // threads_beside())


def read_ahead(read: Callable[[Any], Any], items: Iterable[Any], n_threads: int, ahead: int) -> Iterator[Any]:
    """``map(read, items)``, where threads, if any, read up to ``ahead`` items in advance."""
    if not n_threads:
        yield from map(read, items)
        return
    with ThreadPoolExecutor(n_threads, "vqad-read") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(holding_warnings(read), item))
                if len(waiting) > ahead:
                    yield release_warnings(waiting.popleft().result())
            while waiting:
                yield release_warnings(waiting.popleft().result())
        finally:
            for future in waiting:
                future.cancel()
