"""Where and how to compute: the device, the precision, and what torch keeps for the whole process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


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


_MOVING = threading.Lock()
_USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def on_device(module: Module, device: torch.device) -> Iterator[Module]:
    """A module that rests on the CPU, where it is to work; it goes back with the last of those who use it."""
    if device.type == "cpu":
        yield module
        return
    with _MOVING:
        _USERS[module] = _USERS.get(module, 0) + 1
    try:
        with _MOVING:
            module.to(device)
        yield module
    finally:
        with _MOVING:
            _USERS[module] -= 1
            if not _USERS[module]:
                module.to("cpu")


# ---- what belongs to the whole process -----------------------------------------------------------


_ALONE = threading.RLock()


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Run with gradients on and float32 as torch's default, and leave its modes and random state as they were found.

    One thread at a time may be in here. It computes with as many threads as torch had before any `one_core_each`.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with _ALONE, torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        with _COUNTING:
            if _pools:
                compute_with(_intended)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


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
    global _ALONE, _COUNTING, _MOVING, _pools
    _pools = 0
    _ALONE, _COUNTING, _MOVING = threading.RLock(), threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)


def to_device(features: Tensor | Sequence[Tensor], device: torch.device) -> Tensor | Sequence[Tensor]:
    """Move one map or a list of maps."""
    if isinstance(features, Tensor):
        return features.to(device, non_blocking=True)
    return [f.to(device, non_blocking=True) for f in features]
