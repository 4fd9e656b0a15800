"""Training one model in several processes: which processes there are, and their communication.

Each process holds the features of its share of the images. Everything else each process does in the same way from the
same numbers: features are fetched from the process that holds them, and a training step adds up what each process
computed on its part of the batch. With a single process, nothing here has any effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqad.checkpoint import Checkpoint, fingerprint
from vqad.nn.draws import drawing, random_state, set_random_state
from vqad.nn.ranks import is_shared, summed, summing_over
from vqad.store import FeatureStore

T = TypeVar("T")


class Crew(NamedTuple):
    """The processes of one training.

    Attributes
    ----------
    rank : int
        Number of this process; process 0 writes files.
    size : int
        Number of processes.
    """

    rank: int
    size: int

    def owner(self, rows: Tensor) -> Tensor:
        """Rank of the process that has the features of each image; ``rows`` are numbers in the store."""
        return rows % self.size

    def own(self, rows: Tensor) -> Tensor:
        """The images among ``rows`` that this process has."""
        return rows[self.owner(rows) == self.rank]


_crew: Crew | None = None


def crew() -> Crew | None:
    """The processes that learn together; None if this one learns alone."""
    return _crew


@contextmanager
def learning_together() -> Iterator[Crew]:
    """Context in which all processes started by ``torchrun`` fit one model together.

    All processes must pass the same images, in the same order, and the same parameters. Each reads its share of the
    images and computes its part of each batch. At the end all have the same detector, which one of them saves. CPUs
    communicate by gloo, GPUs by NCCL; each process uses the GPU of its ``LOCAL_RANK``. A process group that is already
    initialised is used and kept.

    Yields
    ------
    Crew
        The ``rank`` of this process and the number of processes, ``size``.

    Raises
    ------
    RuntimeError
        When this process was not started by `torchrun`.

    Notes
    -----
    The result equals that of one process with the same batches, up to rounding. ``batch_size`` is the size of a batch
    over all processes, and each process has about the same share of it. A killed training must be resumed with the same
    number of processes.

    Examples
    --------
    In a file that ``torchrun --nproc-per-node 4 learn.py`` runs:

    >>> with learning_together() as crew:  # doctest: +SKIP
    ...     detector = HVQTransDetector(random_state=0).fit(images)
    ...     if crew.rank == 0:
    ...         vqad.save(detector, "model.safetensors")
    """
    global _crew
    begins = not dist.is_initialized()
    if begins:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RuntimeError("torchrun did not start this process: run torchrun --nproc-per-node N script.py.")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    here, before = Crew(dist.get_rank(), dist.get_world_size()), _crew
    _crew = here if here.size > 1 else None
    try:
        yield here
    finally:
        _crew = before
        if begins:
            dist.destroy_process_group()


def agreed(value: T) -> T:
    """The first process's value, sent to all; small and picklable."""
    if _crew is None:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def of_all(value: T) -> list[T]:
    """The values of all processes, in order of rank; picklable."""
    if _crew is None:
        return [value]
    held: list[Any] = [None] * _crew.size
    dist.all_gather_object(held, value)
    return held


@contextmanager
def adding_up() -> Iterator[None]:
    """Make `vqad.nn.ranks` sum over all processes, whose random states differ inside and are equal afterwards."""
    if _crew is None:
        yield
        return
    with drawing():
        seed = int(torch.randint(2**62, ()))
    set_random_state(torch.Generator().manual_seed(seed + _crew.rank).get_state())
    with summing_over(dist.group.WORLD):
        yield
    set_random_state(agreed(random_state()))


class SharedStore(FeatureStore):
    """Features of many images, each held by one process and read by all of them together.

    Parameters
    ----------
    own : FeatureStore
        Features of this process's images: every ``size``-th one, starting with number ``rank``.
    n : int
        Number of images.
    crew : Crew
    """

    is_shared = True

    def __init__(self, own: FeatureStore, n: int, crew: Crew) -> None:
        super().__init__(n, own.dtype, own.limit)
        self.held, self.crew, self.maps = own, crew, own.maps

    @property
    def on_disk(self) -> bool:
        return self.held.on_disk

    def write(self, rows: np.ndarray, maps: list[Tensor]) -> None:
        raise NotImplementedError("a shared store is read-only")

    def digest(self) -> str:
        return fingerprint(*of_all(self.held.digest()))

    def own_batch(self, indices: Tensor) -> list[Tensor]:
        """Float32 maps of images that this process has; the others need not take part."""
        return self.held.batch(torch.as_tensor(indices) // self.crew.size)

    def batch(self, indices: Any) -> list[Tensor]:
        """Float32 maps of some images; all processes must call this with the same indices."""
        indices = torch.as_tensor(indices)
        is_own = self.crew.owner(indices) == self.crew.rank
        found = []
        for kept, own in zip(self.maps, self.own_batch(indices[is_own])):
            out = torch.zeros(len(indices), *kept.shape[1:])
            out[is_own] = own
            dist.all_reduce(out)  # the others add zeros: no bit changes
            found.append(out)
        return found


class SharedCheckpoint:
    """A `Checkpoint` that the first process reads and writes, in a folder that the others need not see."""

    def __init__(self, folder: str | os.PathLike[str], name: str, seed: int, crew: Crew) -> None:
        self._kept = Checkpoint(folder, name, seed) if crew.rank == 0 else None
        held = None if self._kept is None else (self._kept.state, self._kept.seed)
        self.state, self.seed = agreed(held) or (None, seed)

    @property
    def finished(self) -> bool:
        return self.state is not None and bool(self.state["finished"])

    def remove(self) -> None:
        if self._kept is not None:
            self._kept.remove()

    def due(self, *, after_pass: bool) -> bool:
        return agreed(self._kept is not None and self._kept.due(after_pass=after_pass))

    def write(self, state: Mapping[str, Any], *, finished: bool = False) -> None:
        if self._kept is not None:
            self._kept.write(state, finished=finished)


AnyCheckpoint = Checkpoint | SharedCheckpoint


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients of all processes; a parameter that no process has a gradient for gets none."""
    if not is_shared():
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    has = summed(torch.tensor([float(p.grad is not None) for p in learning]))
    learning = [p for p, n in zip(learning, has.tolist()) if n]
    total = summed(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]))
    for p, grad in zip(learning, torch.split(total, [p.numel() for p in learning])):
        p.grad = grad.view_as(p)


def reader(source: Any) -> Callable[[Tensor], Any]:
    """The function that reads features of this process's images."""
    read: Callable[[Tensor], Any] = source.batch if _crew is None else source.own_batch
    return read


def own(indices: Tensor) -> Tensor:
    """The images that this process has."""
    return indices if _crew is None else _crew.own(indices)


def mine(of_each: list[T]) -> T:
    """This process's entry of what `of_all` returned."""
    return of_each[0 if _crew is None else _crew.rank]


def all_of(fits: bool) -> bool:
    """Whether the step fitted into memory in all processes."""
    return fits if _crew is None else not summed(torch.tensor([float(not fits)])).item()


def shuffled(order: Tensor) -> Tensor:
    """The order of a pass, drawn by the first process; `in_turns` if there are several."""
    return order if _crew is None else in_turns(agreed(order), _crew)


def batches(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """The rest of a pass, in batches; see `batches_of_all`."""
    return torch.split(order, batch_size) if _crew is None else batches_of_all(order, batch_size, _crew)


def in_turns(order: Tensor, crew: Crew) -> Tensor:
    """Interleave the images of all processes as evenly as possible, keeping the order of each process's own."""
    owner = crew.owner(order)
    queues = [order[owner == rank] for rank in range(crew.size)]
    turn = torch.cat([torch.arange(len(queue)) / max(1, len(queue)) for queue in queues])
    return torch.cat(queues)[turn.argsort(stable=True)]


def batches_of_all(order: Tensor, batch_size: int, crew: Crew) -> list[Tensor]:
    """The rest of a pass, cut into batches in which every process has an image."""
    batches = list(torch.split(order, batch_size))
    while len(batches) > 1 and len(crew.owner(batches[-1]).unique()) < crew.size:
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    if len(crew.owner(batches[-1]).unique()) < crew.size:
        raise ValueError(
            f"{crew.size} processes learn together, but one has none of the {len(order)} images of a pass: give more "
            "images, or start fewer processes."
        )
    return batches
