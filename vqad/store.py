"""Storage of features: written once, read in batches and chunks."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqad.engine import chunk_size

# Files of control groups, versions 2 and 1, with the memory limit of a container.
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_memory_limit() -> int:
    """Bytes of features to hold in memory rather than on disk: a quarter of the memory of the machine or container."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**31
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            memory = min(memory, int(Path(path).read_text()))
    return memory // 4


class FeatureStore:
    """Feature maps of many images, written once and read in batches, in memory or on disk.

    Parameters
    ----------
    n : int
        Number of images.
    dtype : torch.dtype
        Type in which maps are stored.
    limit : int
        Bytes above which they are memory-mapped to a temporary file, which is deleted with the store; on a local disk
        of a POSIX system nothing is left even if the process is killed. None: see `free_memory_limit`.
    """

    is_shared = False

    def __init__(self, n: int, dtype: torch.dtype = torch.float32, limit: int | None = None):
        self.n = n
        self.dtype = dtype
        self.limit = free_memory_limit() if limit is None else limit
        self.maps: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.n

    @property
    def on_disk(self) -> bool:
        return self._folder is not None

    def write(self, rows: np.ndarray, maps: list[Tensor]) -> None:
        """Store the maps of the images ``rows``."""
        with self._lock:
            if not self.maps:
                self._allocate(maps)
        places = torch.as_tensor(rows)
        for kept, new in zip(self.maps, maps):
            kept[places] = new.to("cpu", self.dtype)

    def _allocate(self, maps: list[Tensor]) -> None:
        shapes = [(self.n, *m.shape[1:]) for m in maps]
        needed = sum(math.prod(s) for s in shapes) * self.dtype.itemsize
        if needed <= self.limit:
            self.maps = [torch.empty(s, dtype=self.dtype) for s in shapes]
            return
        # The files are sparse, and writing to a full disk would kill the process without a message.
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if needed > free:
            raise OSError(
                f"The features of {self.n} images take {needed / 1e9:.1f} GB, which is more than a quarter of the "
                f"memory and more than the {free / 1e9:.1f} GB that are free in {tempfile.gettempdir()!r}. Set the "
                "environment variable TMPDIR to a folder with more space, give fewer images, or use a smaller "
                "image_size."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="vqad-features-", ignore_cleanup_errors=True)
        for k, shape in enumerate(shapes):
            path, count = str(Path(self._folder.name) / f"{k}.bin"), math.prod(shape)
            self.maps.append(torch.from_file(path, shared=True, size=count, dtype=self.dtype).view(shape))
        if os.name == "posix":  # a deleted file exists as long as it is mapped, and no longer than the process
            self._folder.cleanup()

    def digest(self) -> str:
        """SHA-256 of all maps."""
        digest = hashlib.sha256()
        for m in self.maps:
            digest.update(f"{tuple(m.shape)} {m.dtype}".encode())
            for image in m:
                digest.update(image.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> list[Tensor]:
        """Float32 maps of some images."""
        indices = torch.as_tensor(indices)
        return [m[indices].float() for m in self.maps]

    def own_batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> list[Tensor]:
        """Float32 maps of images that this process holds; here the same as `batch`."""
        return self.batch(indices)


class FeatureArray:
    """Features given by the caller, (n, h, w, C); rows of features have h = w = 1."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    reads_in_threads = True

    def size(self, i: int) -> tuple[int, int]:
        return self.values.shape[1:3]

    def chunk_size(self, device: torch.device) -> int:
        return chunk_size(device, math.prod(self.values.shape[1:3]))

    def chunks(self, rows: np.ndarray, device: torch.device) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        size = self.chunk_size(device)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part, [torch.from_numpy(self.values[part]).permute(0, 3, 1, 2).to(device)]
