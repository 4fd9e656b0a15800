"""Where and how to compute: device, precision, threads, chunks, and models that stay on a device between calls."""

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

# Cells of the images that pass through a network together. On a CPU one image at a time is as fast as many.
_CHUNK_CELLS = {"cpu": 64, "cuda": 8192}
# Chunks that one thread takes at a time, and the least if a chunk has several images: each part may end with a partly
# filled chunk.
_PART, _LEAST_CHUNKS = 32, 8


class Engine(NamedTuple):
    """A device and the type to compute in.

    Attributes
    ----------
    device : torch.device
    dtype : torch.dtype
        Type of training and of the model; types other than float32 are used through autocast.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def pick(cls, device: str | torch.device = "auto", precision: str = "auto") -> Engine:
        """The engine for the parameters ``device`` and ``precision``."""
        picked = pick_device(device)
        return cls(picked, native_precision(picked, precision))

    def autocast(self) -> torch.autocast:
        """Context in which torch computes in the engine's type."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def resident(self, module: Module) -> Module:
        """The module on the device: itself on a CPU, else a copy that stays there as long as the module lives.

        The module must not change afterwards.
        """
        return module if self.device.type == "cpu" else cast(Module, _kept(module, str(self.device), self._moved))

    def ready(self, module: nn.Module) -> nn.Module:
        """The faster equivalent of a model, see `AnomalyModel.ready`; made once while the model lives."""
        return _kept(module, f"ready on {self.device}", lambda m: cast(Any, self.resident(m)).ready())

    def free_memory(self) -> int:
        """Free bytes on the device; 0 if unknown."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def _moved(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).to(self.device)


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to a device, and back at the end."""
    home = next((p.device for p in module.parameters()), device)
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def on_device(features: Any, device: torch.device) -> Any:
    """Move a tensor or a list of tensors to a device."""
    if isinstance(features, Tensor):
        return features.to(device, non_blocking=True)
    return [f.to(device, non_blocking=True) for f in features]


def ahead(load: Callable[[Any], Any], parts: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """``load(part)`` of each part; unless the device is a CPU, one part is loaded ahead into pinned memory.

    So the host reads while the device computes.
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
    """The future result of ``work(part)``, started in a thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(part))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="vqad-ahead", daemon=True).start()
    return future


def pinned(features: Any, device: torch.device) -> Any:
    """Copy a tensor or a list of tensors to pinned memory, which a CUDA device reads asynchronously."""
    if isinstance(features, Tensor):
        return features.pin_memory() if device.type == "cuda" and features.device.type == "cpu" else features
    return [pinned(f, device) for f in features]


_KEEPING = threading.Lock()
_KEPT: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()


def _kept(module: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """``make(module)``, computed once while the module lives."""
    with _KEEPING:
        found = _KEPT.get(module, {}).get(name)
    if found is None:
        made = make(module)
        with _KEEPING:
            found = _KEPT.setdefault(module, {}).setdefault(name, made)
    return found


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device for the parameter ``device``; "auto" is CUDA if there is a GPU, else the CPU.

    Raises
    ------
    ValueError
        When the device is unknown or not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a torch device; use 'auto', 'cpu' or 'cuda'.") from error
    try:
        torch.zeros(1, device=picked).tolist()
    except torch.cuda.OutOfMemoryError:
        raise  # it is there, but full
    except (RuntimeError, AssertionError, ImportError) as error:
        here = f"torch finds no working {str(picked).upper()} device"
        raise ValueError(f"device={device!r} is not available: {here}; use device='auto'. ({error})") from error
    return picked


def native_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The type for the parameter ``precision``; "auto" is bfloat16 if the hardware supports it natively, else float32.

    On a CPU without AMX or AVX512-BF16, emulated bfloat16 is a hundred times slower than float32.
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


# ---- state of the whole process ------------------------------------------------------------------


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Enable gradients and float32 as torch's default, and restore torch's modes and random state at the end.

    Only one thread at a time may be inside, and no other may draw from its own state meanwhile.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with generator_place(), torch.random.fork_rng(devices=devices), _modes():
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run `undisturbed`, with the random state of the CPU and of ``device`` alone set from ``seed``."""
    with undisturbed(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":  # already initialised, because its state was saved
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
        elif device.type != "cpu":
            getattr(torch, device.type).manual_seed(seed)
        yield


@contextmanager
def learning(seed: int, device: torch.device) -> Iterator[None]:
    """Like `seeded`, but on a CPU any number of threads may be inside, each of which draws within `drawing`.

    Other devices have one generator for all threads.
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
    """Enable gradients, float32 as torch's default, and as many threads as torch had before any `one_core_each`."""
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
    """For a pool of threads that set torch's thread count to 1 each: yields how many threads it may have.

    While such a pool runs, new threads inherit the count of 1 from torch, so the count from before the first pool is
    remembered here.
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
            # A thread of another pool, which opened this one, still computes with one core.
            torch.set_num_threads(1 if hasattr(_HERE, "threads") else threads)


_HERE = threading.local()


def join_pool(threads: int) -> None:
    """Initialise one of the ``threads`` threads of a pool, each of which computes with one core."""
    _HERE.threads = threads
    compute_with(1)


@contextmanager
def at_most_threads(threads: int | None) -> Iterator[None]:
    """Limit the threads that `side_by_side` starts from this thread; None: no limit beyond torch's count."""
    before = getattr(_HERE, "limit", None)
    _HERE.limit = threads
    try:
        yield
    finally:
        _HERE.limit = before


def threads_beside() -> int:
    """Number of threads in this thread's pool; 1 outside a pool."""
    return getattr(_HERE, "threads", 1)


def compute_with(threads: int) -> None:
    """Set torch's thread count for this thread.

    A thread adopts the process's count when it first reads it, overwriting a count set before; so it is read first.
    """
    torch.get_num_threads()
    torch.set_num_threads(threads)


def _unlock() -> None:
    """Reset locks and pools in a forked process, where the other threads no longer exist."""
    global _COUNTING, _KEEPING, _pools, _learners
    _pools = _learners = 0
    _COUNTING, _KEEPING = threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)


# ---- chunks and threads -------------------------------------------------------------------------


def chunk_size(device: torch.device, cells: int = 196) -> int:
    """Number of images of ``cells`` cells each that pass through a network together on ``device``."""
    return max(1, _CHUNK_CELLS.get(device.type, 64) // cells)


def in_chunks(work: Callable[[Tensor, int], Any], rows: Tensor, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield each part of ``size`` rows (the last may be smaller) with ``work(part, size)``.

    If the device runs out of memory, the size is halved with a warning; the last bits of results may then differ.
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
                f"Out of device memory: continuing with {size} images at a time. Scores may differ in the last digits."
            )
        else:
            yield part, done
            start += len(part)


def side_by_side(
    work: Callable[[np.ndarray], Any], rows: np.ndarray, device: torch.device, wanted: bool = True, chunk: int = 1
) -> Iterator[Any]:
    """Concatenate the lists ``work(part)`` of consecutive parts of ``rows``, computed in torch's number of threads.

    Unless ``wanted``, and on devices other than a CPU, this is just ``work(rows)``. A part has several of the chunks of
    ``chunk`` images into which ``work`` divides it.

    A single image does not use several cores well, so each thread works on its own images with one core. The number of
    threads does not change a bit of the results.
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
    """``map(work, parts)`` in several threads, which have all ended when this ends, whatever the reason.

    A pool of ``concurrent.futures`` would accept no work after the main thread has ended.
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
            if worker.ident is not None:  # started
                worker.join()


def filled(n: int, size: int, device: torch.device) -> int:
    """Size to which a chunk of ``n`` images is padded, at most ``size``.

    A convolution's last bits depend on the batch size. On a CPU it is fixed, so that an image's features do not depend
    on the other images. On other devices, where results may differ in the last bits, it is the next power of two: there
    are few different sizes, and a single image stays cheap.
    """
    return size if device.type == "cpu" else min(size, 1 << (n - 1).bit_length())


def pad_chunk(x: Tensor, size: int, device: torch.device) -> Tensor:
    """Pad a smaller chunk by repeating its first image, see :func:`filled`."""
    size = filled(len(x), size, device)
    return x if len(x) == size else torch.cat([x, x[:1].expand(size - len(x), *x.shape[1:])])
