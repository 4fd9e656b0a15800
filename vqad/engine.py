"""Where and how to compute: device, precision, threads, chunks, and what stays on a device between calls."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vqad._warn import holding_warnings, release_warnings, warn
from vqad.nn.draws import generator_place, own_draws
from vqad.nn.fast.memory import keep_freed_memory

Module = TypeVar("Module", bound=nn.Module)

# Images that pass through a network together. On a CPU one at a time is as fast as many.
_CHUNK_CELLS = {"cpu": 64, "cuda": 8192}
# Chunks that one thread takes at a time; and at least, where a chunk has several images: each part has its rests.
_PART, _LEAST_CHUNKS = 32, 8


class Engine(NamedTuple):
    """A device and the type to compute in there.

    Attributes
    ----------
    device : torch.device
    dtype : torch.dtype
        Of the training and of the model; other than float32 it is used under autocast.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def pick(cls, device: str | torch.device = "auto", precision: str = "auto") -> Engine:
        """What the parameters of these names ask for."""
        picked = pick_device(device)
        return cls(picked, native_precision(picked, precision))

    def autocast(self) -> torch.autocast:
        """Compute in the engine's type inside."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def resident(self, module: Module) -> Module:
        """A module on the device: the same one on a CPU, else a copy that stays there as long as the module lives.

        The module must not change any more.
        """
        return module if self.device.type == "cpu" else cast(Module, _kept(module, str(self.device), self._moved))

    def ready(self, module: nn.Module) -> nn.Module:
        """What gives the same as a model for less, see `AnomalyModel.ready`; made once while the model lives."""
        return _kept(module, f"ready on {self.device}", lambda m: cast(Any, self.resident(m)).ready())

    def free_memory(self) -> int:
        """Bytes that are free on the device; 0 where nobody tells."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def _moved(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to(self.device)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on a device for as long as it learns there; then it goes back to where it was."""
    home = next((p.device for p in module.parameters()), device)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def on_device(features: Any, device: torch.device) -> Any:
    """A tensor or a list of tensors on a device."""
    if isinstance(features, Tensor):
        return features.to(device, non_blocking=True)
    return [f.to(device, non_blocking=True) for f in features]


def ahead(load: Callable[[Any], Any], parts: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """``load(part)`` of each part; for another device than a CPU read one part ahead, into memory that it copies from.

    While the device computes, the host has nothing else to do.
    """
    if device.type == "cpu":
        yield from map(load, parts)
        return
    waiting: Future[Any] | None = None
    for part in parts:
        started = _started(lambda part: pinned(load(part), device), part)
        if waiting is not None:
            yield waiting.result()
        waiting = started
    if waiting is not None:
        yield waiting.result()


def _started(work: Callable[[Any], Any], part: Any) -> Future[Any]:
    """What becomes of ``work(part)``, begun in a thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(part))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="vqad-ahead", daemon=True).start()
    return future


def pinned(features: Any, device: torch.device) -> Any:
    """A tensor or a list of tensors in memory that a device reads while the host goes on."""
    if isinstance(features, Tensor):
        return features.pin_memory() if device.type == "cuda" and features.device.type == "cpu" else features
    return [pinned(f, device) for f in features]


_KEEPING = threading.Lock()
_KEPT: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def _kept(module: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What ``make`` makes of a module, once in its life."""
    with _KEEPING:
        found = _KEPT.get(module, {}).get(name)
    if found is None:
        made = make(module)
        with _KEEPING:
            found = _KEPT.setdefault(module, {}).setdefault(name, made)
    return found


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to work on; "auto" takes CUDA where there is one.

    Raises
    ------
    ValueError
        When the asked device is unknown or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is no torch device; use 'auto', 'cpu' or 'cuda'.") from error
    try:
        torch.zeros(1, device=picked).tolist()
    except torch.cuda.OutOfMemoryError:
        raise  # it is there, but full
    except (RuntimeError, AssertionError, ImportError) as error:
        here = f"torch sees no {str(picked).upper()} device here that computes"
        raise ValueError(f"device={device!r} was asked for, but {here}; use device='auto'. ({error})") from error
    return picked


def native_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """bfloat16 where the hardware multiplies in it natively, or where asked for; float32 elsewhere.

    Emulated bfloat16 is a hundred times slower than float32 on a CPU without AMX or AVX512-BF16.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        amx = torch.cpu.get_capabilities()
        return bool(amx.get("amx_bf16") or amx.get("amx_tile") or amx.get("avx512_bf16"))
    except AttributeError:  # torch < 2.10
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)


# ---- what belongs to the whole process -----------------------------------------------------------


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Run with gradients on and float32 as torch's default, and leave its modes and random state as they were found.

    One thread at a time may be in here, and none draws meanwhile from a state of its own.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with generator_place(), torch.random.fork_rng(devices=devices), _modes():
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run `undisturbed`, with the random state of the CPU and of ``device`` alone set from ``seed``."""
    with undisturbed(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":  # it was initialised to save its state
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        elif device.type != "cpu":
            getattr(torch, device.type).manual_seed(seed)
        yield


@contextmanager
def learning(seed: int, device: torch.device) -> Iterator[None]:
    """As `seeded`; but on a CPU any number of threads may be in here, each of which draws within `drawing`.

    The generator of another device is one for all threads.
    """
    if device.type != "cpu":
        with seeded(seed, device):
            yield
        return
    with own_draws(seed), _modes():
        yield


_learners, _dtype = 0, torch.float32


@contextmanager
def _modes() -> Iterator[None]:
    """Gradients on, float32 as torch's default, and as many threads as torch had before any `one_core_each`."""
    global _learners, _dtype
    with torch.inference_mode(False), torch.enable_grad():
        with _COUNTING:
            if not _learners:
                _dtype = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            _learners += 1
            if _pools:
                compute_with(_intended)
        try:
            yield
        finally:
            with _COUNTING:
                _learners -= 1
                if not _learners:
                    torch.set_default_dtype(_dtype)


_COUNTING = threading.Lock()
_pools, _intended = 0, 1


@contextmanager
def one_core_each() -> Iterator[int]:
    """For a pool of threads that compute with one core each, and set torch's count to 1: how many there may be.

    Torch gives that count to all threads that are born then, whoever starts them. So it is known here, of before the
    first of all pools that there are.
    """
    global _pools, _intended
    with _COUNTING:
        _intended = _intended if _pools else torch.get_num_threads()
        _pools += 1
        threads = _intended
    try:
        yield threads
    finally:
        with _COUNTING:
            _pools -= 1
            torch.set_num_threads(threads)


_HERE = threading.local()


def join_pool(threads: int) -> None:
    """What each of ``threads`` threads of a pool begins with that compute with one core each."""
    _HERE.threads = threads
    compute_with(1)


@contextmanager
def at_most_threads(threads: int | None) -> Iterator[None]:
    """Let what this thread starts side by side take no more threads than that, whatever torch is set to; None: any."""
    before = getattr(_HERE, "limit", None)
    _HERE.limit = threads
    try:
        yield
    finally:
        _HERE.limit = before


def threads_beside() -> int:
    """How many threads of a pool do what this one does, itself included."""
    return getattr(_HERE, "threads", 1)


def compute_with(threads: int) -> None:
    """Let torch compute with so many threads in this one.

    A thread takes over the process's count when it first asks for it, even if it was told another before.
    """
    torch.get_num_threads()
    torch.set_num_threads(threads)


def _unlock() -> None:
    """In a process that was forked off, nobody lets go of what other threads held, and their pools are not there."""
    global _COUNTING, _KEEPING, _pools, _learners
    _pools = _learners = 0
    _COUNTING, _KEEPING = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)


# ---- chunks and threads -------------------------------------------------------------------------


def chunk_size(device: torch.device, cells: int = 196) -> int:
    """Number of images of so many cells that pass through a network together on ``device``."""
    return max(1, _CHUNK_CELLS.get(device.type, 64) // cells)


def in_chunks(work: Callable[[Tensor, int], Any], rows: Tensor, size: int) -> Iterator[tuple[Tensor, Any]]:
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


def side_by_side(
    work: Callable[[np.ndarray], Any], rows: np.ndarray, device: torch.device, wanted: bool = True, chunk: int = 1
) -> Iterator[Any]:
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
        threads = min(threads, getattr(_HERE, "limit", None) or threads)
        n_parts = max(1, min(len(rows) // least, max(threads, math.ceil(len(rows) / (_PART * chunk)))))
        for held in _in_threads(holding_warnings(work), np.array_split(rows, n_parts), threads):
            yield from release_warnings(held)


def _in_threads(work: Callable[[np.ndarray], Any], parts: list[np.ndarray], threads: int) -> Iterator[Any]:
    """``map(work, parts)`` in so many threads, all of which have ended when this has, however that was.

    Not in a pool of ``concurrent.futures``, which takes no work once the main thread has ended.
    """
    done: list[Future[Any]] = [Future() for _ in parts]
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


def filled(n: int, size: int, device: torch.device) -> int:
    """To how many images a chunk of ``n`` is filled up, of ``size`` at most.

    A convolution's last bits depend on the size of the batch. On a CPU it is fixed, so that an image's features are the
    same alone and in company. On other devices, which only say that they are the same but for last bits, it is the next
    power of two: few sizes, and a single image does not wait for many.
    """
    return size if device.type == "cpu" else min(size, 1 << (n - 1).bit_length())


def pad_chunk(x: Tensor, size: int, device: torch.device) -> Tensor:
    """Fill a smaller chunk up by repeating its first image, see :func:`filled`."""
    size = filled(len(x), size, device)
    return x if len(x) == size else torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])
