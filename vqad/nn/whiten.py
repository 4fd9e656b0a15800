"""Length of vectors as normal ones see it: Mahalanobis's distance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_RIDGE = 0.01
"""Share of the mean variance that every direction has at least (docs/choices.md)."""
_WIDE = 1024
"""Numbers of a vector from which on an image is left out by its own vectors: a new inverse takes C³ steps an image."""
_OUTWEIGHS = 1e10
"""An image whose second moments are this many times those of all others together cannot be left out: a difference of
float64 has no digits of these any more."""


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
        self._moments: dict[int, tuple[Tensor, int]] = {}
        self._bases: dict[int, tuple[Tensor, Tensor]] = {}
        self._leaves_out = False

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_groups={len(self.root)}"

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Mean squares (N, h, w) of the cells of maps (N, C, h, w) of groups (N,).

        Learned from many vectors, it is about 1 for normal ones. Autocast does not touch it.
        """
        with torch.autocast(x.device.type, enabled=False):
            cells = x.to(torch.promote_types(x.dtype, self.root.dtype)).flatten(2).mT
            if self._leaves_out:
                squared = self._without_own(x, cells, group)
            else:
                # One matrix for all where there is one group: a copy for each image may not fit into memory.
                root = self.root[group[0]] if bool((group == group[0]).all()) else self.root[group]
                squared = (cells @ root.to(cells.dtype)).square().mean(-1)
        return squared.view(len(x), *x.shape[2:])

    @torch.no_grad()
    def learn(self, group: int, total: Tensor, count: int) -> None:
        """Set a group's :math:`S_g`; the others keep every bit.

        Parameters
        ----------
        group : int
        total : Tensor of shape (C, C), float64
            Sum of the :func:`second_moments` of all images.
        count : int
            Number of vectors in it.
        """
        self.root[group] = _inverse_root(total, count).to(self.root)
        self._moments[group] = total, count
        if self.dim >= _WIDE and bool(total.isfinite().all()):
            self._bases[group] = torch.linalg.eigh(total)

    def forget(self) -> None:
        """Keep only what :meth:`forward` needs: from now on nothing can be left out."""
        self._moments, self._bases = {}, {}

    def _without_own(self, x: Tensor, cells: Tensor, group: Tensor) -> Tensor:
        """Mean squares (N, L) of the cells (N, L, C) of each image by what would have been learned without it."""
        squared: list[Tensor] = []
        for i, g in enumerate(group.tolist()):
            if i and g == int(group[0]) and torch.equal(x[i], x[0]):  # what fills up a chunk
                squared.append(squared[0])
                continue
            total, count = self._moments.get(g, (None, 0))
            root, rest = self.root[g], count - cells.shape[1]
            # The only image of its group leaves nothing behind: what was learned from it stays.
            if total is not None and rest > 0:
                lengths = None
                if g in self._bases:
                    lengths = _lengths_without_own(*self._bases[g], rest, cells[i].cpu().double())
                if lengths is not None:
                    squared.append(lengths.to(cells))
                    continue
                own = second_moments(x[i : i + 1].cpu())[0].double()  # as they were summed up, to the last bit
                left = total - own
                if float(own.trace()) < _OUTWEIGHS * float(left.trace()) or not bool(own.isfinite().all()):
                    root = _inverse_root(left, rest).to(root)
            squared.append((cells[i] @ root.to(cells.dtype)).square().mean(-1))
        return torch.stack(squared)

    def add_groups(self, n: int) -> None:
        """Append ``n`` groups without anything learned; the others keep every bit."""
        self.root = torch.cat([self.root, Whitening(self.dim, n).root.to(self.root)])


def second_moments(x: Tensor) -> Tensor:
    """Of maps (N, C, h, w) the sums over cells of their vectors' products with themselves, (N, C, C) in float32."""
    with torch.autocast(x.device.type, enabled=False):
        cells = x.float().flatten(2).contiguous()  # the last bits depend on the layout
        return cells @ cells.mT


def total_second_moments(x: Tensor) -> Tensor:
    """Sum over images of :func:`second_moments`, (C, C) in float64.

    Image by image: what is taken away again to leave one out must be what was added, to the last bit.
    """
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for image in torch.split(x, 1):
        total += second_moments(image)[0]
    return total


@contextmanager
def leaving_out(model: nn.Module) -> Iterator[None]:
    """Inside, all whitenings of a model see each image as if they had not learned from it.

    It must be one of those that they learned from, and nothing may have been forgotten yet. The lengths are then about
    those that a new image like it would have.
    """
    try:
        for whitening in whitenings(model):
            whitening._leaves_out = True
        yield
    finally:
        for whitening in whitenings(model):
            whitening._leaves_out = False


def whitenings(model: nn.Module) -> list[Whitening]:
    """All that a model has, in its order."""
    return [module for module in model.modules() if isinstance(module, Whitening)]


def _lengths_without_own(values: Tensor, vectors: Tensor, rest: int, cells: Tensor) -> Tensor | None:
    r"""Mean squares (L,) of the vectors ``cells`` (L, C) by what would have been learned without them.

    Of the sum T of all second moments the eigenvalues and eigenvectors are known. With :math:`A = T + \mu I` and
    :math:`X^\top` the cells, the quadratic forms are the diagonal of

    .. math:: X^\top (A - X X^\top)^{-1} X = (I - M)^{-1} M, \qquad M = X^\top A^{-1} X,

    by the identity of Sherman, Morrison and Woodbury. ``rest`` is the number of vectors that are left. None where the
    cells outweigh these: T was summed up in float32, and what rounding left of them in it would count.
    """
    dim, own = len(values), float(cells.square().sum())
    left = float(values.sum()) - own
    if not max(own, torch.finfo(torch.float32).tiny * rest * dim) < left:
        return None
    turned = cells @ vectors
    m = (turned / (values.clamp_min(0) + (_RIDGE + dim / rest) * left / dim)) @ turned.mT
    lower, failed = torch.linalg.cholesky_ex(torch.eye(len(m), dtype=m.dtype) - m)
    return None if failed else torch.cholesky_solve(m, lower).diagonal() * (rest / dim)


def _inverse_root(total: Tensor, count: int) -> Tensor:
    """A matrix R with R R^T = S^-1; the identity where no vector was longer than 0, or one too long for a number."""
    dim = len(total)
    second = total / count
    mean = float(second.trace()) / dim
    if not torch.finfo(torch.float32).tiny < mean < math.inf:
        return torch.eye(dim)
    second.diagonal().add_((_RIDGE + dim / count) * mean)
    lower = torch.linalg.cholesky(second)
    root: Tensor = torch.linalg.solve_triangular(lower, torch.eye(dim, dtype=second.dtype), upper=False).mT
    return root
