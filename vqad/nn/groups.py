"""The group of each image of a batch, on the host and on the device.

A group has its own parts, such as codebooks, a head or a flow. Which ones a batch needs is read on the host, without
synchronising with the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The groups of the N images of a batch, P of which are distinct.

    Attributes
    ----------
    numbers : list of int
        The distinct groups, ascending.
    counts : list of int
        Number of images in each.
    host : Tensor of shape (N,), int64
        Group of each image, on the host.
    of_image : Tensor of shape (N,), int64
        The same on the device.
    present : Tensor of shape (P,), int64
        ``numbers`` on the device.
    row : Tensor of shape (N,), int64
        Position of each image's group in ``present``, on the device.
    """

    numbers: list[int]
    counts: list[int]
    host: Tensor
    of_image: Tensor
    present: Tensor
    row: Tensor

    @classmethod
    def of(cls, group: Tensor, n_groups: int, device: torch.device) -> Groups:
        """Create it from the group of each image (N,), out of ``n_groups``."""
        if torch.compiler.is_exporting():  # a graph cannot branch on the groups
            every = torch.arange(n_groups, device=device)
            return cls(list(range(n_groups)), [], group, group, every, group)
        host = group.detach().to("cpu", torch.long)
        present, row, counts = torch.unique(host, return_inverse=True, return_counts=True)
        of_image, there, place = (_sent(t, device) for t in (host, present, row))
        return cls(present.tolist(), counts.tolist(), host, of_image, there, place)

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Concatenate the groups of several batches."""
        host = torch.cat([part.host for part in parts])
        return cls.of(host, max(part.numbers[-1] for part in parts) + 1, parts[0].of_image.device)

    def __len__(self) -> int:
        return len(self.host)

    def images(self) -> list[Tensor]:
        """The indices of the images of each distinct group, on the device."""
        return list(torch.split(_sent(self.host.argsort(stable=True), self.of_image.device), self.counts))

    def sorted_images(self) -> tuple[Tensor, Tensor]:
        """Indices of the images sorted by group, and the position of each image among them, on the device."""
        order = self.host.argsort(stable=True)
        return _sent(order, self.of_image.device), _sent(order.argsort(), self.of_image.device)


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """Copy to the device asynchronously, from pinned memory."""
    return t.to(device) if device.type != "cuda" else t.pin_memory().to(device, non_blocking=True)
