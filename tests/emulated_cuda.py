"""CUDA where there is none: tensors on the CPU whose memory is marked as lying on a device.

All values are real, so that every branch goes as it would; forward and backward passes and optimisers run. What CUDA
would refuse is refused: operations that mix devices, numpy arrays of device memory. What it would wait for is counted
(:attr:`Emulated.waits`), and so are copies and kernels. It knows nothing of time, of last bits and of memory.

What is counted as waiting: reading a value on the host, results whose shape depends on values, copies to the host, and
copies from memory that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vqad.engine
from vqad.nn.hierarchy import _position_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Their results' shapes depend on values, or the host reads a value.
WAITING = {
    "_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal",
    "bincount", "_linalg_eigh", "repeat_interleave", "multinomial",
}  # fmt: skip
# They start no kernel.
FREE = {"detach", "alias", "empty_like", "new_empty", "empty", "empty_strided", "new_empty_strided", "_unsafe_view"}


class MixedDevices(RuntimeError):
    """What CUDA raises for an operation on tensors of two devices."""


class Marks:
    """Storages that are marked, as long as they live."""

    def __init__(self):
        self._known = {}

    def add(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage)
        return t

    def discard(self, t: Tensor) -> Tensor:
        self._known.pop(t.untyped_storage()._cdata, None)
        return t

    def __contains__(self, t: Tensor) -> bool:
        found = self._known.get(t.untyped_storage()._cdata)
        return found is not None and not found.expired()


class Emulated:
    """What was counted since the last :meth:`reset`, by kind and by the line of vqad that asked for it."""

    def __init__(self):
        self.on_device, self.pinned = Marks(), Marks()
        self.reset()

    def reset(self):
        self.waits, self.copies, self.kernels = Counter(), Counter(), Counter()
        return self


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        _, found, name = frame.f_code.co_filename.rpartition("/vqad/")
        if found and "site-packages" not in frame.f_code.co_filename:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Operations(TorchDispatchMode):
    """Looks at every operation, those of the backward pass too."""

    def __init__(self, state: Emulated):
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, here = kwargs or {}, self.state.on_device
        name = func._schema.name.split("::")[1]
        inputs = list(_tensors([*args, *kwargs.values()]))
        if not any(t in here for t in inputs):
            return func(*args, **kwargs)
        self._check(name, args, inputs)
        out = func(*args, **kwargs)
        if name == "_local_scalar_dense" or (name == "copy_" and args[0] not in here):
            return out
        for t in _tensors([out]):
            here.add(t)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.state.kernels[name, _line()] += 1
        return out

    def _check(self, name, args, inputs):
        here, waits = self.state.on_device, self.state.waits
        if name == "copy_":
            target, source = args[:2]
            if (target in here) != (source in here):
                self.state.copies[name, _line()] += 1
                if target not in here or source not in self.state.pinned:
                    waits[name, _line()] += 1
            return
        allowed = []
        if name.startswith(("index", "_index", "_unsafe_index")) and name not in ("index_select", "index_add_"):
            allowed = list(_tensors(args[1:2]))  # CUDA takes indices on the host, and waits for their copy
            for t in allowed:
                if t.dtype in (torch.bool, torch.uint8):
                    waits[f"boolean {name}", _line()] += 1
                elif t not in here and t.dim():
                    waits[f"{name} by host indices", _line()] += 1
        others = [t for t in inputs if t not in here and t.dim() and not any(t is a for a in allowed)]
        if others or (allowed and args[0] not in here):
            raise MixedDevices(f"{name}: {[tuple(t.shape) for t in others]} on the host, at {_line()}")
        if name in WAITING:
            waits[name, _line()] += 1


class _Devices(TorchFunctionMode):
    """Says where a tensor is, and moves it."""

    def __init__(self, state: Emulated):
        super().__init__()
        self.state = state

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, here = dict(kwargs or {}), self.state.on_device
        if func == Tensor.device.__get__:
            return CUDA if args[0] in here else CPU
        if func == Tensor.is_cuda.__get__:
            return args[0] in here
        if func is Tensor.pin_memory:
            return self.state.pinned.add(args[0].clone())
        if func in (Tensor.numpy, Tensor.__array__) and args[0] in here:
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy, at {_line()}")
        if func is Tensor.tolist and args[0] in here:
            self.state.waits["tolist", _line()] += 1
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        if func is torch.nn.functional.embedding_bag and args[0] in here:  # whose offsets are made unseen
            rows, table = args[:2]
            offsets = here.add(torch.arange(0, rows.numel(), rows.shape[1]))
            return torch.embedding_bag(table, here.add(rows.reshape(-1)), offsets, False, 0, False, None, False)[0]
        device = kwargs.get("device")
        if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
            out = func(*args, **{**kwargs, "device": CPU})
            if getattr(func, "__name__", "") in ("tensor", "as_tensor"):
                self.state.waits["copy of a value", _line()] += 1
            return here.add(out)
        return func(*args, **kwargs)

    def _move(self, func, args, kwargs):
        x, here = args[0], self.state.on_device
        given = [*args[1:], *kwargs.values()]
        like = next((a for a in given if isinstance(a, Tensor)), None)
        target = next((torch.device(a) for a in given if isinstance(a, str | torch.device)), None)
        dtype = next((a for a in given if isinstance(a, torch.dtype)), None if like is None else like.dtype)
        if func in (Tensor.cpu, Tensor.cuda):
            target = CPU if func is Tensor.cpu else CUDA
        elif target is None:
            target = CUDA if (x if like is None else like) in here else CPU  # the mode is off in here
        layout = {key: value for key, value in kwargs.items() if key == "memory_format"}
        if (x in here) == (target.type == "cuda"):
            return Tensor.to(x, dtype or x.dtype, **layout)
        moved = Tensor.to(x, dtype or x.dtype, copy=True, **layout)
        to_device = target.type == "cuda"
        self.state.copies["to the device" if to_device else "to the host", _line()] += 1
        if not to_device or x not in self.state.pinned:
            self.state.waits["to the device" if to_device else "to the host", _line()] += 1
        return here.add(moved) if to_device else here.discard(moved)


@contextmanager
def emulated_cuda(monkeypatch):
    """``device="cuda"`` works inside; gives what is counted."""
    state, fork = Emulated(), torch.random.fork_rng
    with monkeypatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", lambda devices=None, **options: fork(devices=[], **options))
        patch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_, **__: True)
        patch.setattr(torch.cuda, "default_generators", [torch.Generator()], raising=False)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34))
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
        # The modes are of one thread.
        patch.setattr(vqad.engine, "_started", _at_once)
        patch.setattr(vqad.engine, "_in_threads", lambda work, parts, threads: map(work, parts))
        _position_on.cache_clear()  # of other emulations
        with _Operations(state), _Devices(state):
            yield state
        _position_on.cache_clear()


def _at_once(work, part):
    future = Future()
    future.set_result(work(part))
    return future
