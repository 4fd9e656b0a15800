"""Where and how to compute: the device, the precision, and what torch keeps for the whole process."""

from __future__ import annotations

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
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, but torch sees no CUDA device here; use device='auto'.")
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
        module.to(device)
    try:
        yield module
    finally:
        with _MOVING:
            _USERS[module] -= 1
            if not _USERS[module]:
                module.to("cpu")


_SEEDED = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's random state set from ``seed``, gradients on and float32 its default; leave all as it was found.

    These belong to the whole process, so that one thread at a time may be in here.
    """
    devices = [device] if device.type == "cuda" else []
    with _SEEDED, torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def to_device(features: Tensor | Sequence[Tensor], device: torch.device) -> Tensor | Sequence[Tensor]:
    """Move one map or a list of maps."""
    if isinstance(features, Tensor):
        return features.to(device, non_blocking=True)
    return [f.to(device, non_blocking=True) for f in features]
