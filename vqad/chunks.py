"""Images in chunks of a fixed size, and parts of them side by side: what keeps an image's bits the same in company."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqad._heap import keep_freed_memory
from vqad._warn import holding_warnings, let_out, warn
from vqad.device import join_pool, one_core_each

# Images that pass through a network together. A convolution's last bits depend on the size of the batch, so the
# size is fixed: an image's features are the same alone and in company. On a CPU one at a time is as fast as many.
_CHUNK_CELLS = {"cpu": 64, "cuda": 4096}
# Chunks that one thread takes at a time; and at least, where a chunk has several images: each part has its rests.
_PART, _LEAST_CHUNKS = 32, 8
# Numbers in the maps of chunks that are joined (64 MiB).
_JOINED_NUMBERS = 2**24


def chunk_size(device: torch.device, cells: int = 196) -> int:
    """Number of images of so many cells that pass through a network together on ``device``."""
    return max(1, _CHUNK_CELLS.get(device.type, 64) // cells)


def in_chunks(work, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Any]]:
    """``work(part, size)`` for parts of ``size`` rows, the last one smaller; with each part.

    Where the device's memory does not hold that, the size is halved with a warning. Last bits may then be others.
    """
    start = 0
    while start < len(rows):
        part = rows[start : start + size]
        try:
            done = work(part, size)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            done = None
        if done is None:
            size = max(1, size // 2)
            warn(
                f"Out of device memory: going on with {size} images at a time. Scores may differ in their last digits."
            )
        else:
            yield part, done
            start += len(part)


def side_by_side(work, rows: np.ndarray, device: torch.device, wanted: bool = True, chunk: int = 1) -> Iterator[Any]:
    """What the lists ``work(part)`` hold, for consecutive parts of ``rows``; on a CPU in as many threads as torch has.

    Where that is not ``wanted``, or on another device, what ``work(rows)`` holds. A part has several of the chunks of
    ``chunk`` images that ``work`` makes of it.

    Images of the size that a network wants keep one core busy and two cores waiting for each other: every thread works
    on its own images with one core. How many threads there are then does not change a bit of what comes out.
    """
    if device.type != "cpu" or not wanted:
        yield from work(rows)
        return
    keep_freed_memory()
    least = chunk if chunk == 1 else _LEAST_CHUNKS * chunk
    with one_core_each() as threads:
        n_parts = max(1, min(len(rows) // least, max(threads, math.ceil(len(rows) / (_PART * chunk)))))
        for held in _in_threads(holding_warnings(work), np.array_split(rows, n_parts), threads):
            yield from let_out(held)


def _in_threads(work, parts: list[np.ndarray], threads: int) -> Iterator[Any]:
    """``map(work, parts)`` in so many threads, all of which have ended when this has, however that was.

    Not in a pool of ``concurrent.futures``, which takes no work once the main thread has ended.
    """
    done: list[Future] = [Future() for _ in parts]
    waiting = deque(zip(done, parts))

    def run() -> None:
        join_pool(threads)
        while waiting:
            try:
                future, part = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                future.set_result(work(part))
            except BaseException as error:
                future.set_exception(error)

    workers = [threading.Thread(target=run, name=f"vqad-{i}", daemon=True) for i in range(min(threads, len(parts)))]
    try:
        for worker in workers:
            worker.start()
        for future in done:
            yield future.result()
    finally:
        waiting.clear()
        for worker in workers:
            if worker.ident is not None:  # it was started
                worker.join()


def pad_chunk(x: Tensor, size: int) -> Tensor:
    """Fill a last, smaller chunk up to ``size`` by repeating its first image."""
    return x if len(x) == size else torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])


def joined(
    chunks: Iterator[tuple[np.ndarray, np.ndarray, list[Tensor]]],
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Tensor]]]:
    """The same images, what describes them and their maps, in fewer, larger chunks, where a chunk has several images.

    A model takes one category at a time and fills up what is left of a chunk: of many categories there are then fewer
    such rests.
    """
    held: list[tuple[np.ndarray, np.ndarray, list[Tensor]]] = []
    numbers = 0
    for item in chunks:
        held.append(item)
        numbers += sum(m.numel() for m in item[2])
        if len(item[0]) == 1 or numbers >= _JOINED_NUMBERS:
            yield _join(held)
            held, numbers = [], 0
    if held:
        yield _join(held)


def _join(held: list[tuple[np.ndarray, np.ndarray, list[Tensor]]]) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
    if len(held) == 1:
        return held[0]
    chunks, descriptors, maps = zip(*held)
    return np.concatenate(chunks), np.concatenate(descriptors), [torch.cat(stage) for stage in zip(*maps)]
