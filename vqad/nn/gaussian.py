"""Gaussians by location: Mahalanobis distance of vectors to normal ones at the same location."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDTH = 512
"""Largest number of directions of a vector in use: those of the largest variance."""
FACTOR_NUMBERS = 1_200_000
"""Numbers in the factors of one category, a byte each."""
RIDGE = 0.01
"""Smallest shrinkage of a covariance towards a multiple of the identity."""
OWN_IMAGES = 60
"""Number of images at which a location's own covariance and the shared one have equal weights."""
_WHITENING_VECTORS = 20_000
# Subspace iteration: extra directions, and number of steps.
_OVERSAMPLED, _ITERATIONS = 8, 4


class LocationGaussian(nn.Module):
    r"""Mahalanobis distance of vectors to the normal ones of the same category and location.

    For a vector :math:`x` of d numbers at location l, of a category with n normal images, it is

    .. math:: \sqrt{(W^\top r)^\top S_l^{-1} W^\top r}, \qquad r = x - \mu_l, \qquad
              S_l = \frac{n}{n + 60} M_l + \frac{60}{n + 60} I,

    where W whitens the deviations from :math:`\mu_l` over all locations, whose covariance has Ledoit-Wolf shrinkage
    [2]_ of at least a hundredth, and :math:`M_l` is the second moment of the whitened deviations at l. The leading
    directions of :math:`M_l` are kept, as many as fit into 1.2 MB; in the others the variance is their mean. This is
    PaDiM [1]_ with shrinkage towards a shared covariance if there are few images. A single cell has only the shared
    covariance.

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
    step: Tensor
    tail: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], n_groups: int = 1) -> None:
        super().__init__()
        self.dim, self.grid = dim, grid
        cells = math.prod(grid)
        width = min(dim, MAX_WIDTH)
        # A single cell needs no factor: it has only the shared covariance.
        rank = 1 if cells == 1 else max(1, min(width, FACTOR_NUMBERS // (cells * width)))
        self.register_buffer("mean", torch.zeros(n_groups, dim, *grid))
        self.register_buffer("whitening", torch.zeros(n_groups, dim, width))
        # In steps of the largest number of each column over 127: ranks bring more than digits do.
        self.register_buffer("factor", torch.zeros(n_groups, cells, width, rank, dtype=torch.int8))
        self.register_buffer("step", torch.zeros(n_groups, cells, rank, dtype=torch.float16))
        self.register_buffer("tail", torch.ones(n_groups, cells))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, n_groups={len(self.mean)}, rank={self.factor.shape[-1]}"

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Distances (N, h, w) of the cells of maps (N, d, h, w), all of the category ``group``, a scalar."""
        with torch.autocast(x.device.type, enabled=False):
            deviation = (x.float() - self.mean[group]).flatten(2).permute(2, 0, 1).contiguous()
            return self._distance(deviation, group).mT.reshape(len(x), *self.grid)

    def _distance(self, deviation: Tensor, group: Tensor | int) -> Tensor:
        """Distances (L, N) of deviations (L, N, d) from the means of their locations."""
        white = deviation @ self.whitening[group]
        explained = white @ self.factor[group].float() * self.step[group][:, None]
        squared = self.tail[group][:, None] * white.square().sum(-1) - explained.square().sum(-1)
        return squared.clamp_min(0.0).sqrt()

    @torch.no_grad()
    def learn(self, group: int, x: Tensor, fold: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Learn a category from maps (n, d, h, w) of normal images; the others keep every bit.

        One or two images do not show how images vary at a location, so the covariance over their cells is used instead,
        and with a single cell the Euclidean length of a deviation.

        Parameters
        ----------
        group : int
            Number of the category.
        x : Tensor of shape (n, d, h, w)
        fold : Tensor of shape (n,), int64, optional
            Folds for cross-fitting: each map is measured by Gaussians learned from the other folds, or from all maps if
            there is a single fold.
        seen : Tensor of shape (n, h, w), bool, optional
            The cells to learn from; all if left out.

        Returns
        -------
        Tensor of shape (n, h, w)
            Cross-fitted distances; empty without ``fold``.
        """
        cells, by_place = x.float().flatten(2).permute(2, 0, 1).contiguous(), len(x) > 2  # (L, n, d)
        counts = None if seen is None else seen.flatten(1).mT.to(cells)  # (L, n)
        lead = self._learn(group, cells, by_place, counts=counts)
        kinds = torch.unique(fold) if fold is not None else torch.empty(0)
        distance = torch.empty(cells.shape[:2])
        for k in kinds:
            held = fold == k
            other = LocationGaussian(self.dim, self.grid).to(x.device)
            rest = ~held if len(kinds) > 1 else torch.ones_like(held)
            other._learn(0, cells[:, rest], by_place, lead, None if counts is None else counts[:, rest])
            mean = other.mean[0].flatten(1).mT[:, None]
            distance[:, held] = other._distance(cells[:, held] - mean, 0).cpu()
        return distance.mT.reshape(len(x), *self.grid) if fold is not None else distance[:0]

    def _learn(
        self,
        group: int,
        cells: Tensor,
        by_place: bool,
        start: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor | None:
        """Learn vectors (L, n, d); returns the leading directions, a good ``start`` for similar vectors.

        Vectors with ``counts`` (L, n) of 0 are set to the mean, and the others are scaled to compensate.
        """
        n, d = cells.shape[1:]
        mean = cells.mean(1, keepdim=True) if by_place else cells.mean((0, 1), keepdim=True).expand(len(cells), 1, d)
        if counts is None:
            vectors = cells - mean
        else:
            mean = _counted_mean(cells, counts[..., None], by_place, mean)
            vectors = (cells - mean) * (n * counts / counts.sum(1, keepdim=True).clamp_min(1.0)).sqrt()[..., None]
        known = vectors if by_place or len(vectors) > 1 else vectors[:, :0]
        known = known if counts is None else known[counts.amax(1) > 0]
        whitening = _whitening(known.reshape(-1, d), self.whitening.shape[-1])
        white = vectors @ whitening
        own = n / (n + OWN_IMAGES) if by_place and len(vectors) > 1 else 0.0
        factor, tail, lead = _inverse(white, own, self.factor.shape[-1], start)
        self.mean[group], self.whitening[group] = mean[:, 0].mT.reshape(d, *self.grid), whitening
        step = (factor.abs().amax(1) / 127.0).to(self.step)
        whole = factor / step.float().clamp_min(1e-7)[:, None]
        self.factor[group] = whole.round().clamp(-127, 127).to(torch.int8)
        self.step[group], self.tail[group] = step, tail
        return lead

    def add_groups(self, n: int) -> None:
        """Append ``n`` categories that have learned nothing; the others keep every bit."""
        new = LocationGaussian(self.dim, self.grid, n)
        for name, buffer in new.named_buffers():
            setattr(self, name, torch.cat([getattr(self, name), buffer.to(getattr(self, name))]))


def _counted_mean(cells: Tensor, counts: Tensor, by_place: bool, without: Tensor) -> Tensor:
    """Mean (L, 1, d) of the vectors (L, n, d) that count; if none does, the mean ``without`` counting."""
    dims = 1 if by_place else (0, 1)
    total = counts.sum(dims, keepdim=True)
    return torch.where(total > 0, (counts * cells).sum(dims, keepdim=True) / total.clamp_min(1.0), without)


def _whitening(vectors: Tensor, width: int) -> Tensor:
    """Whitening matrix (d, width) of deviations (n, d), for the directions that are kept.

    It is symmetric if all are kept, so that similar vectors have similar matrices.
    """
    d = vectors.shape[1]
    sample = vectors[:: max(1, len(vectors) // _WHITENING_VECTORS)]
    # Scale deviations, so that their squares do not overflow.
    size = sample.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(sample) else sample.new_ones(())
    sample = sample / size
    mean = float(sample.square().sum()) / max(1, sample.numel())
    if not mean > 0:  # all vectors are equal: measure deviations by their length
        return torch.eye(d, width, device=vectors.device)
    # Both products have the same nonzero eigenvalues, so use the smaller one.
    is_wide = len(sample) >= d
    second = (sample.mT @ sample if is_wide else sample @ sample.mT).double() / len(sample)
    values, directions = torch.linalg.eigh(second)
    shrinkage = max(RIDGE, _ledoit_wolf(sample, second, mean))
    least = shrinkage * mean
    if not is_wide:
        is_seen = values > 1e-6 * values[-1]
        values = values[is_seen]
        directions = sample.mT.double() @ directions[:, is_seen] / (len(sample) * values).sqrt()
    values, directions = values[-width:].clamp_min(0.0), directions[:, -width:]
    gain = ((1.0 - shrinkage) * values + least).rsqrt()
    if width == d:  # directions without any vector have the smallest variance
        kept = directions * (gain - least**-0.5) @ directions.mT
        kept.diagonal().add_(least**-0.5)
    else:
        rest = width - len(values)
        any_other = torch.randn(d, rest, generator=torch.Generator().manual_seed(0)).to(directions)
        basis = torch.linalg.qr(torch.cat([directions, any_other], 1))[0][:, len(values) :]
        kept = torch.cat([basis * least**-0.5, directions * gain], 1)
    whitening: Tensor = (kept / size).float()
    return whitening


def _ledoit_wolf(sample: Tensor, second: Tensor, mean: float) -> float:
    """Ledoit-Wolf shrinkage of the second moment of vectors (n, d) towards ``mean`` times the identity, in 0..1.

    ``second`` is that moment, or the smaller product with the same nonzero eigenvalues.
    """
    n, d = sample.shape
    apart = float(second.square().sum()) - d * mean**2
    noise = (float(sample.square().sum(1).square().sum()) / n - float(second.square().sum())) / n
    return min(max(noise / apart, 0.0), 1.0) if apart > 0 else 1.0


def _inverse(white: Tensor, own: float, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""F (L, d, rank) and t (L,) of :math:`S_l^{-1} = t I - F F^\top`, for whitened deviations (L, n, d).

    Also returns the leading directions (L, d, k), whose search may ``start`` from similar ones.
    """
    n, d = white.shape[1:]
    if own == 0.0:
        return white.new_zeros(len(white), d, rank), white.new_ones(len(white)), None
    top, lead = _leading(white, rank, start)
    rest = d - top.shape[1]
    total = white.square().sum((1, 2)) / n
    low = (total - top.sum(1)).clamp_min(0.0) / rest if rest else torch.zeros_like(top[:, 0])
    inverse_low = 1.0 / (own * low + 1.0 - own)
    gain = (inverse_low[:, None] - 1.0 / (own * top + 1.0 - own)).clamp_min(0.0)
    factor = lead * gain.sqrt()[:, None, :]
    return F.pad(factor, (0, rank - factor.shape[2])), inverse_low, lead


def _leading(white: Tensor, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (L, k) of the second moments of vectors (L, n, d), and their directions (L, d, k).

    If few of many are needed, subspace iteration finds them in n·d·k operations per location instead of d³.
    """
    n, d = white.shape[1:]
    width = rank + _OVERSAMPLED
    if 2 * width >= min(n, d):
        if n < d:  # use the eigenvectors of the smaller product
            values, vectors = torch.linalg.eigh(white @ white.mT / n)
            directions = white.mT @ vectors / (n * values.clamp_min(1e-6)[:, None, :]).sqrt()
        else:
            values, directions = torch.linalg.eigh(white.mT @ white / n)
        return values[:, -rank:].clamp_min(0.0), directions[:, :, -rank:]
    generator = torch.Generator().manual_seed(0)
    basis, steps = torch.randn(d, width, generator=generator).to(white).expand(len(white), -1, -1), _ITERATIONS
    if start is not None and start.shape[2] == rank:
        basis, steps = torch.cat([start, basis[:, :, rank:]], 2), 1
    for _ in range(steps):
        basis = torch.linalg.qr(white.mT @ (white @ basis))[0]
    seen = white @ basis
    values, turned = torch.linalg.eigh(seen.mT @ seen / n)
    return values[:, -rank:].clamp_min(0.0), (basis @ turned)[:, :, -rank:]
