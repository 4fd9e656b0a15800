"""Length of vectors as normal ones see it: Mahalanobis's distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_RIDGE = 0.01
"""Share of the mean variance that every direction has at least (docs/choices.md)."""


class Whitening(nn.Module):
    r"""Mean square of vectors, in which every direction counts by how little normal vectors reach into it.

    For a vector :math:`x` of group g, of C numbers, it is

    .. math:: \frac1C x^\top S_g^{-1} x, \qquad
              S_g = M_g + \left(0.01 + \frac{C}{n_g}\right) \frac{\operatorname{tr} M_g}{C} I,

    where :math:`M_g` is the second moment :math:`\frac{1}{n_g} \sum x x^\top` of the :math:`n_g` normal vectors of the
    group. Before anything is learned, :math:`S_g` is the identity, and the result the mean of the squares.

    It holds C² numbers a group.

    Parameters
    ----------
    dim : int
        Length of the vectors (C).
    n_groups : int, default=1
    """

    root: Tensor

    def __init__(self, dim: int, n_groups: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("root", torch.eye(dim).repeat(n_groups, 1, 1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_groups={len(self.root)}"

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Mean squares (N, h, w) of the cells of maps (N, C, h, w) of groups (N,), about 1 for normal ones if learned.

        Always in float32 or better, also under autocast.
        """
        with torch.autocast(x.device.type, enabled=False):
            cells = x.to(torch.promote_types(x.dtype, self.root.dtype)).flatten(2).mT
            squared: Tensor = (cells @ self.root[group].to(cells.dtype)).square().mean(-1)
        return squared.view(len(x), *x.shape[2:])

    @torch.no_grad()
    def learn(self, moments: Moments) -> None:
        """Take over the second moments of those groups that have any; the others keep every bit."""
        for g in moments.count.nonzero().flatten().tolist():
            second = moments.total[g] / moments.count[g]
            mean = second.trace() / self.dim
            if not mean > torch.finfo(torch.float32).tiny:
                continue  # nothing was ever missed: any direction counts alike
            ridge = (_RIDGE + self.dim / moments.count[g]) * mean
            values, vectors = torch.linalg.eigh(second)
            self.root[g] = (vectors / (values.clamp_min(0) + ridge).sqrt()).to(self.root)

    def add_groups(self, n: int) -> None:
        """Append ``n`` groups without anything learned; the others keep every bit."""
        self.root = torch.cat([self.root, Whitening(self.dim, n).root.to(self.root)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Of models of before there was this, every direction counts alike.
        state_dict.setdefault(f"{prefix}root", torch.eye(self.dim).repeat(len(self.root), 1, 1))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Moments:
    """Running second moments of the vectors of groups.

    Parameters
    ----------
    whitening : Whitening
        That is to learn from them: it says how long the vectors are and how many groups there are.

    Attributes
    ----------
    count : Tensor of shape (n_groups,), float64
    total : Tensor of shape (n_groups, C, C), float64
        Sum over the vectors of their products with themselves.
    """

    def __init__(self, whitening: Whitening) -> None:
        self.count = torch.zeros(len(whitening.root), dtype=torch.float64)
        self.total = torch.zeros(whitening.root.shape, dtype=torch.float64)

    def add(self, x: Tensor, group: Tensor) -> None:
        """Take in the cells (N, C, h, w) of images of groups (N,)."""
        with torch.autocast(x.device.type, enabled=False):
            for g in torch.unique(group).tolist():
                vectors = x[group == g].float().movedim(1, -1).flatten(0, -2)
                self.count[g] += len(vectors)
                self.total[g] += (vectors.mT @ vectors).cpu().double()


def learn_second_moments(whitenings: Sequence[Whitening], batches: Any) -> None:
    """Let each of some whitenings learn from its own maps.

    Parameters
    ----------
    whitenings : sequence of Whitening
    batches : iterable of (sequence of Tensor (N, C, h, w), group (N,))
        Of normal images: for every whitening the vectors that it is for.
    """
    moments = [Moments(whitening) for whitening in whitenings]
    for maps, group in batches:
        for each, x in zip(moments, maps, strict=True):
            each.add(x, group)
    for whitening, each in zip(whitenings, moments):
        whitening.learn(each)
