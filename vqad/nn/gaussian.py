"""Gaussians by location: how far vectors lie from where normal ones lie at the same place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDTH = 512
"""Directions of a vector that are looked at: the ones in which normal vectors reach farthest."""
FACTOR_NUMBERS = 3 * 2**18
"""Numbers in the factors of one category: 1.5 MiB in float16."""
RIDGE = 0.01
"""How far a covariance is pulled to a multiple of the identity at least."""
OWN_IMAGES = 60
"""Of so many images a location's own covariance counts as much as the one that all locations share."""
_WHITENING_VECTORS = 20_000
# Of subspace iteration: directions beyond those that are wanted, and steps.
_OVERSAMPLED, _ITERATIONS = 8, 4


class LocationGaussian(nn.Module):
    r"""Mahalanobis distance of vectors to the normal ones of the same category and place.

    For a vector :math:`x` of d numbers at location l, of a category with n normal images, it is

    .. math:: \sqrt{(W^\top r)^\top S_l^{-1} W^\top r}, \qquad r = x - \mu_l, \qquad
              S_l = \frac{n}{n + 60} M_l + \frac{60}{n + 60} I,

    where W whitens what all locations share: their deviations from :math:`\mu_l`, of a covariance shrunk after Ledoit
    and Wolf [2]_, by a hundredth at least; and :math:`M_l` is the second moment
    of the whitened deviations at l. Of :math:`M_l` the leading directions are kept, as many as fit into 1.5 MiB; in
    the others the variance is that of their mean. This is PaDiM [1]_ with a covariance that is pulled to the shared one
    where images are few. A single cell has the shared covariance alone.

    Parameters
    ----------
    dim : int
        Length of the vectors (d).
    grid : (int, int)
        Rows and columns of the maps.
    n_groups : int, default=1
        Categories.

    References
    ----------
    .. [1] Defard, Setkov, Loesch, Audigier: PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and
       Localization, ICPR 2020 workshops. arXiv:2011.08785.
    .. [2] Ledoit, Wolf: A well-conditioned estimator for large-dimensional covariance matrices, Journal of Multivariate
       Analysis 88, 2004.
    """

    mean: Tensor
    whitening: Tensor
    factor: Tensor
    tail: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], n_groups: int = 1) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid
        cells = math.prod(grid)
        width = min(dim, MAX_WIDTH)
        # A single cell shares its covariance with no other.
        rank = 1 if cells == 1 else max(1, min(width, FACTOR_NUMBERS // (cells * width)))
        self.register_buffer("mean", torch.zeros(n_groups, dim, *grid))
        self.register_buffer("whitening", torch.zeros(n_groups, dim, width))
        self.register_buffer("factor", torch.zeros(n_groups, cells, width, rank, dtype=torch.float16))
        self.register_buffer("tail", torch.ones(n_groups, cells))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, n_groups={len(self.mean)}, rank={self.factor.shape[-1]}"

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Distances (N, h, w) of the cells of maps (N, d, h, w), all of the category ``group``, a scalar."""
        with torch.autocast(x.device.type, enabled=False):
            deviation = (x.float() - self.mean[group]).flatten(2).permute(2, 0, 1).contiguous()
            white = deviation @ self.whitening[group]
            explained = white @ self.factor[group].float()
            squared = self.tail[group][:, None] * white.square().sum(-1) - explained.square().sum(-1)
            return squared.clamp_min(0.0).sqrt().mT.reshape(len(x), *self.grid)

    @torch.no_grad()
    def learn(self, group: int, x: Tensor, by_place: bool | None = None) -> None:
        """Learn a category anew from maps (n, d, h, w) of normal images; the others keep every bit.

        Parameters
        ----------
        by_place : bool, optional
            Whether each place has a mean of its own. One image or two say nothing of how images differ at a place:
            where left out, their cells stand for them, and with a single cell the length of a deviation counts.
        """
        n, d = x.shape[:2]
        by_place = n > 2 if by_place is None else by_place
        x = x.float()
        mean = x.mean(0) if by_place else x.mean((0, 2, 3))[:, None, None].expand_as(x[0])
        vectors = (x - mean).flatten(2).permute(2, 0, 1).contiguous()  # (L, n, d)
        known = vectors if by_place or len(vectors) > 1 else vectors[:, :0]
        whitening = _whitening(known.reshape(-1, d), self.whitening.shape[-1])
        white = vectors @ whitening
        own = n / (n + OWN_IMAGES) if by_place and len(vectors) > 1 else 0.0
        factor, tail = zip(*(_inverse(part, own, self.factor.shape[-1]) for part in torch.split(white, 256)))
        self.mean[group], self.whitening[group] = mean, whitening
        self.factor[group], self.tail[group] = torch.cat(factor).to(self.factor), torch.cat(tail)

    def cross_fitted(self, x: Tensor, fold: Sequence[int] | Tensor) -> Tensor:
        """Distances (n, h, w) of each of the maps (n, d, h, w), from what was learned of those of the other folds.

        Parameters
        ----------
        fold : sequence of int
            Of each map; where all are of one fold, each is measured by all.
        """
        fold = torch.as_tensor(fold)
        out = torch.empty(len(x), *self.grid)
        kinds = torch.unique(fold)
        for k in kinds:
            held = fold == k
            other = LocationGaussian(self.dim, self.grid).to(x.device)
            other.learn(0, x[~held] if len(kinds) > 1 else x, by_place=len(x) > 2)
            out[held] = other(x[held], torch.tensor(0)).cpu()
        return out

    def add_groups(self, n: int) -> None:
        """Append ``n`` categories without anything learned; the others keep every bit."""
        new = LocationGaussian(self.dim, self.grid, n)
        for name, buffer in new.named_buffers():
            setattr(self, name, torch.cat([getattr(self, name), buffer.to(getattr(self, name))]))


def _whitening(vectors: Tensor, width: int) -> Tensor:
    """A matrix (d, width) that brings deviations (n, d) to variance 1 in each of the directions that are kept."""
    d = vectors.shape[1]
    sample = vectors[:: max(1, len(vectors) // _WHITENING_VECTORS)].double()
    # Deviations of any size: their squares are numbers.
    size = sample.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(sample) else sample.new_ones(())
    sample = sample / size
    mean = float(sample.square().sum()) / max(1, sample.numel())
    if not mean > 0:  # vectors that are all the same: any deviation counts by its length
        return torch.eye(d, width, device=vectors.device)
    # The larger product has the same eigenvalues as the smaller one, and zeros.
    second = (sample.mT @ sample if len(sample) >= d else sample @ sample.mT) / len(sample)
    values, directions = torch.linalg.eigh(second)
    if len(sample) < d:
        values, directions = _of_larger(sample, values, directions, width)
    shrinkage = max(RIDGE, _ledoit_wolf(sample, second, mean))
    variance = (1.0 - shrinkage) * values[-width:].clamp_min(0.0) + shrinkage * mean
    kept: Tensor = directions[:, -width:] / variance.sqrt() / size
    return kept.float()


def _of_larger(sample: Tensor, values: Tensor, vectors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues (width,) and directions (d, width) of the second moment of fewer than d vectors.

    Of the directions in which none of them lies, any are taken.
    """
    is_seen = values > 1e-10 * values[-1]
    values, vectors = values[is_seen][-width:], vectors[:, is_seen][:, -width:]
    lead = sample.mT @ vectors / (len(sample) * values).sqrt()
    rest = width - len(values)
    any_other = torch.randn(len(lead), rest, generator=torch.Generator().manual_seed(0)).to(lead)
    basis = torch.linalg.qr(torch.cat([lead, any_other], 1))[0]
    return F.pad(values, (rest, 0)), torch.cat([basis[:, len(values) :], lead], 1)


def _ledoit_wolf(sample: Tensor, second: Tensor, mean: float) -> float:
    """How far the second moment of vectors (n, d) is to be pulled to ``mean`` times the identity, in 0..1.

    ``second`` is that moment, or the smaller product with the same eigenvalues.
    """
    n, d = sample.shape
    apart = float(second.square().sum()) - d * mean**2
    noise = (float(sample.square().sum(1).square().sum()) / n - float(second.square().sum())) / n
    return min(max(noise / apart, 0.0), 1.0) if apart > 0 else 1.0


def _inverse(white: Tensor, own: float, rank: int) -> tuple[Tensor, Tensor]:
    r"""F (L, d, rank) and t (L,) of :math:`S_l^{-1} = t I - F F^\top`, of whitened deviations (L, n, d)."""
    d = white.shape[2]
    if own == 0.0:
        return white.new_zeros(len(white), d, rank), white.new_ones(len(white))
    top, lead = _leading(white, rank)
    rest = d - top.shape[1]
    low = (_mean_square(white) - top.sum(1)).clamp_min(0.0) / rest if rest else torch.zeros_like(top[:, 0])
    inverse_low = 1.0 / (own * low + 1.0 - own)
    gain = (inverse_low[:, None] - 1.0 / (own * top + 1.0 - own)).clamp_min(0.0)
    factor = lead * gain.sqrt()[:, None, :]
    return F.pad(factor, (0, rank - factor.shape[2])), inverse_low


def _mean_square(white: Tensor) -> Tensor:
    return white.square().sum((1, 2)) / white.shape[1]


def _leading(white: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of the second moments of vectors (L, n, d), (L, k), and their directions (L, d, k).

    Where few are wanted of many they come from subspace iteration, which costs n·d·k a location in place of d³.
    """
    n, d = white.shape[1:]
    width = rank + _OVERSAMPLED
    if 2 * width >= min(n, d):
        if n < d:  # the eigenvectors of the smaller of both products
            values, vectors = torch.linalg.eigh(white @ white.mT / n)
            directions = white.mT @ vectors / (n * values.clamp_min(1e-6)[:, None, :]).sqrt()
        else:
            values, directions = torch.linalg.eigh(white.mT @ white / n)
        return values[:, -rank:].clamp_min(0.0), directions[:, :, -rank:]
    start = torch.randn(d, width, generator=torch.Generator().manual_seed(0)).to(white)
    basis = start.expand(len(white), -1, -1)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(white.mT @ (white @ basis))[0]
    seen = white @ basis
    values, turned = torch.linalg.eigh(seen.mT @ seen / n)
    return values[:, -rank:].clamp_min(0.0), (basis @ turned)[:, :, -rank:]
