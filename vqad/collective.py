"""Several processes that learn one model: which there are, and what they tell each other.

Each holds the features of its share of the images. All else is done by each of them in the same way, from the same
numbers: what is read of features is fetched from whoever has them, and a step of the training adds up what each found
in its part of the batch. In a training of one process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
        Number of this one; the first writes files.
    size : int
        How many there are.
    """

    rank: int
    size: int

    def owner(self, rows: Tensor) -> Tensor:
        """Which process has the features of some images, given by their numbers in the store."""
        return rows % self.size

    def own(self, rows: Tensor) -> Tensor:
        """Those of some images that this process has."""
        return rows[self.owner(rows) == self.rank]


_crew: Crew | None = None


def crew() -> Crew | None:
    """The processes that learn together; None where this one learns alone."""
    return _crew


@contextmanager
def learning_together() -> Iterator[Crew]:
    """Have each fit within be one of all processes that ``torchrun`` started.

    They must be given the same images in the same order, and parameters. Each reads its share of the images, and takes
    its part of each batch; in the end all have the same detector, which one of them saves. CPUs talk by gloo, GPUs by
    NCCL, each process with the GPU of its ``LOCAL_RANK``. A group of processes that is there is used, and stays.

    Yields
    ------
    Crew
        With the ``rank`` of this process and their number, ``size``.

    Raises
    ------
    RuntimeError
        Where `torchrun` did not start this process.

    Notes
    -----
    What is learned is what one process learns of the same batches, but for the last digits. Batches are as large as in
    one process, ``batch_size`` in all, and are drawn so that each process has about as much of each. A training that
    was killed is gone on with by as many processes.

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
            raise RuntimeError("this process is alone: start it as torchrun --nproc-per-node N script.py.")
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
    """What the first process has of a small value that pickles."""
    if _crew is None:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def of_all(value: T) -> list[T]:
    """What each process has of a value that pickles, in their order."""
    if _crew is None:
        return [value]
    held: list[Any] = [None] * _crew.size
    dist.all_gather_object(held, value)
    return held


@contextmanager
def adding_up() -> Iterator[None]:
    """Have `vqad.nn.ranks` add up over all processes, which draw apart meanwhile and go on alike afterwards."""
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
    """Features of many images, each kept by one process and read by all of them together.

    Parameters
    ----------
    own : FeatureStore
        Of every ``size``-th image, from that with the number of this process on.
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
        raise NotImplementedError("what is shared was written before")

    def digest(self) -> str:
        return fingerprint(*of_all(self.held.digest()))

    def own_batch(self, indices: Tensor) -> list[Tensor]:
        """Float32 maps of images that this process has; no other needs to ask."""
        return self.held.batch(torch.as_tensor(indices) // self.crew.size)

    def batch(self, indices: Any) -> list[Tensor]:
        """Float32 maps of some images, for which all processes ask."""
        indices = torch.as_tensor(indices)
        is_own = self.crew.owner(indices) == self.crew.rank
        found = []
        for kept, own in zip(self.maps, self.own_batch(indices[is_own])):
            out = torch.zeros(len(indices), *kept.shape[1:])
            out[is_own] = own
            dist.all_reduce(out)  # to all others' zeros: no bit changes
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
    """Give each parameter the gradient of all processes; none where no image of the batch had to do with it."""
    if not is_shared():
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    has = summed(torch.tensor([float(p.grad is not None) for p in learning]))
    learning = [p for p, n in zip(learning, has.tolist()) if n]
    total = summed(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]))
    for p, grad in zip(learning, torch.split(total, [p.numel() for p in learning])):
        p.grad = grad.view_as(p)


def in_turns(order: Tensor, crew: Crew) -> Tensor:
    """A pass in which images of all processes take turns, each process's in their order, as evenly as can be."""
    owner = crew.owner(order)
    queues = [order[owner == rank] for rank in range(crew.size)]
    turn = torch.cat([torch.arange(len(queue)) / max(1, len(queue)) for queue in queues])
    return torch.cat(queues)[turn.argsort(stable=True)]


def batches_of_all(order: Tensor, batch_size: int, crew: Crew) -> list[Tensor]:
    """What is left of a pass, cut into batches of which every process has something."""
    batches = list(torch.split(order, batch_size))
    while len(batches) > 1 and len(crew.owner(batches[-1]).unique()) < crew.size:
        last = batches.pop()
        batches[-1] = torch.cat([batches[-1], last])
    if len(crew.owner(batches[-1]).unique()) < crew.size:
        raise ValueError(
            f"{crew.size} processes learn together, and some has none of the {len(order)} images of a pass: give more "
            "images, or start fewer processes."
        )
    return batches
