"""From vectors and numbers of every cell to the map and the score of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gaussian import OWN_IMAGES, LocationGaussian
from .model import Configured, Term

# A category's own statistics count as much as the prior ones when it has this many images.
PRIOR_IMAGES = 5
# At a place with this many images its own mean and spread count as much as those of all places.
PLACE_IMAGES = 20
# The share of normal images that the spread of scores is measured at, and where it lies in standard deviations.
HIGH, HIGH_SPREAD = 0.9, 1.2816
# Least spread of a term, as a share of its mean.
LEAST_SPREAD = 0.02
# Bound on maps and scores, also for vectors that overflow when squared.
LARGEST = 1e6
# Smallest number of held-out images of a category that calibrate a trained model's terms on their own.
HELD_OUT_IMAGES = 5
# The spread of a trained model's terms comes from few held-out images: it counts as 1 + CAUTION / sqrt(n) times what n
# of them show, one and a half standard errors of a spread that is read off a 90th percentile. An underestimate would
# let the term drown all others.
CAUTION = 2.0
# The field, beside those that are measured, that says which share of each cell is looked at, (N, h, w).
SEEN = "seen"


class Judged(NamedTuple):
    """What the scorer makes of some images.

    Attributes
    ----------
    score : Tensor of shape (N,)
        Higher is more anomalous; 0 is the typical normal image of the category, the unit a standard deviation of these.
    map : Tensor of shape (N, h, w)
        On the finest grid of the terms that it is made of.
    terms : dict of str to Tensor (N, h_k, w_k)
        Each on its own grid, as measured.
    standard : dict of str to Tensor (N, h_k, w_k)
        The same in standard deviations of normal images at that place; 0 where nothing is looked at.
    contributions : dict of str to Tensor (N, h, w)
        What each term of the map adds to it.
    """

    score: Tensor
    map: Tensor
    terms: dict[str, Tensor]
    standard: dict[str, Tensor]
    contributions: dict[str, Tensor]


class TermScorer(Configured):
    r"""Measures, standardises and adds up the terms of the anomaly map and of the image score.

    A term is a distance that a `LocationGaussian` measures of a field of vectors, or what the model gives as a number.
    Of category c at cell x it becomes :math:`z(x) = (t(x) - \mu_c(x)) / \sigma_c(x)`, mean and standard deviation over
    normal images at that place. The map is the weighted mean of terms on one grid. For the image score each term's
    highest cells are averaged, standardised over normal images, and added up by

    .. math:: s = \log \sum_{k=1}^{K} w_k e^{z_k}, \qquad \sum_k w_k = 1,

    which lies between their mean and their maximum: different faults show in different terms. The weights are equal,
    but that of a trained term is n / (n + 60) of the others' with n images: a model fits few images by heart. The sum
    is standardised once more. All statistics are those of cross-fitted distances: every image is measured by what was
    learned without it.

    Parameters
    ----------
    terms : sequence of Term
        Those without a shape are left out.
    shapes : dict of str to (int, int, int)
        Of each term the length of its vectors, 0 where it is a number, and its grid.
    n_categories : int
    map_peak : float or None, default=None
        Share of the highest cells of the map that make the image score; None where terms have peaks of their own.
    """

    peak_center: Tensor
    peak_scale: Tensor
    peak_weight: Tensor
    ends: Tensor

    def __init__(
        self,
        terms: Sequence[Term],
        shapes: dict[str, tuple[int, int, int]],
        n_categories: int,
        map_peak: float | None = None,
    ) -> None:
        super().__init__()
        every = (Term(name, weight, tuple(peaks), trained) for name, weight, peaks, trained in terms)
        self.terms = tuple(t for t in every if t.name in shapes)
        shares = [share for t in self.terms for share in t.peaks]
        for share in shares if map_peak is None else [map_peak]:
            if not 0 <= share <= 1:
                raise ValueError(f"shares of the highest cells must lie in [0, 1]; got {share}.")
        self.shapes = {name: (int(d), int(h), int(w)) for name, (d, h, w) in shapes.items()}
        self.map_peak = map_peak
        self.measures = nn.ModuleDict(
            {name: LocationGaussian(d, (h, w), 0) for name, (d, h, w) in self.shapes.items() if d}
        )
        weight = sum(t.weight for t in self.terms)
        self.weight = {t.name: t.weight / weight for t in self.terms if t.weight}
        self.grid = max((self.shapes[name][1:] for name in self.weight), key=math.prod)
        for name, (_, *grid) in self.shapes.items():
            for kind in ("mean", "spread"):
                self.register_buffer(f"{kind}_{name}", torch.empty(0, *grid))
        n_peaks = 1 if map_peak is not None else sum(len(t.peaks) for t in self.terms)
        for name, n in {"peak_center": n_peaks, "peak_scale": n_peaks, "peak_weight": n_peaks, "ends": 2}.items():
            self.register_buffer(name, torch.empty(0, n, dtype=torch.float64))
        self.add_categories(n_categories)

    def config(self) -> dict[str, Any]:
        """Arguments that make one of the same parts and shapes."""
        return {**super().config(), "terms": [tuple(term) for term in self.terms]}

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return len(self.ends)

    def add_categories(self, n: int) -> None:
        """Append ``n`` categories without anything learned; the others keep every bit."""
        for name in self.measures:
            self._measure(name).add_groups(n)
        for name, buffer in list(self.named_buffers(recurse=False)):
            fill = 0.0 if "mean" in name or "center" in name else 1.0
            setattr(self, name, torch.cat([buffer, buffer.new_full((n, *buffer.shape[1:]), fill)]))
        if n:
            self.ends[-n:, 0] = 0.0

    # ---------------------------------------------------------------- judging

    def forward(self, fields: dict[str, Tensor], category: Tensor) -> Judged:
        """Judge images that are all of one category.

        Parameters
        ----------
        fields : dict of str to Tensor
            Of each term its vectors (N, d, h, w), or its numbers (N, h, w); and as "seen", where parts of images are
            ignored, the share of each cell of any grid that is not (N, h, w).
        category : Tensor, scalar, int64
        """
        seen = fields.get(SEEN)
        terms = {t.name: self._measured(t.name, fields[t.name], category) for t in self.terms}
        moments = {name: (getattr(self, f"mean_{name}"), getattr(self, f"spread_{name}")) for name in terms}
        standard = {name: self._standard(term, *(m[category] for m in moments[name])) for name, term in terms.items()}
        standard = {name: _where_seen(z, seen) for name, z in standard.items()}
        contributions = self.contributions(standard, seen)
        combined = torch.stack(list(contributions.values())).sum(0)
        peaks = (self._peaks(standard, combined) - self.peak_center[category]) / self.peak_scale[category]
        center, scale = self.ends[category]
        score = (_fused(peaks, self.peak_weight[category]) - center) / scale
        return Judged(score, combined, terms, standard, contributions)

    def contributions(self, standard: dict[str, Tensor], seen: Tensor | None = None) -> dict[str, Tensor]:
        """What each term adds to the map, (N, h, w) each on its grid."""
        on_grid = {name: self._on_grid(standard[name]) for name in self.weight}
        return {name: weight * _where_seen(on_grid[name], seen) for name, weight in self.weight.items()}

    def _measure(self, name: str) -> LocationGaussian:
        return cast(LocationGaussian, self.measures[name])

    def _measured(self, name: str, field: Tensor, category: Tensor) -> Tensor:
        measured: Tensor = self.measures[name](field, category) if name in self.measures else field.float()
        return measured

    def _standard(self, term: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        return ((term - mean) / spread).clamp(-LARGEST, LARGEST)

    def _on_grid(self, z: Tensor) -> Tensor:
        if tuple(z.shape[1:]) == tuple(self.grid):
            return z
        return F.interpolate(z[:, None], tuple(self.grid), mode="bilinear", align_corners=False)[:, 0]

    def _peaks(self, standard: dict[str, Tensor], combined: Tensor) -> Tensor:
        """Means of the highest cells, (N, n_peaks) in float64."""
        if self.map_peak is not None:
            return _highest(combined, self.map_peak)[:, None]
        return torch.stack([_highest(standard[t.name], share) for t in self.terms for share in t.peaks], 1)

    # ---------------------------------------------------------------- learning

    @torch.no_grad()
    def learn(self, category: int, fields: dict[str, Tensor], fold: Tensor, is_held: Tensor) -> tuple[Tensor, Tensor]:
        """Learn a category from normal images; the others keep every bit.

        Parameters
        ----------
        category : int
        fields : dict of str to Tensor
            As for :meth:`forward`.
        fold : Tensor of shape (n,), int64
            Images of one fold are measured by what was learned of the others.
        is_held : Tensor of shape (n,), bool
            Images that the model was not trained on.

        Returns
        -------
        score : Tensor of shape (n,)
            Of each image as if it had taken no part.
        peak : Tensor of shape (n,)
            Highest value of its map, likewise.
        """
        standard, shares = {}, fields.get(SEEN)
        for t in self.terms:
            x = fields[t.name].float()
            seen = None if shares is None else _is_seen(shares, (x.shape[-2], x.shape[-1]))
            if t.name in self.measures:
                x = self._measure(t.name).learn(category, x, fold, seen)
            rows = is_held if t.is_trained and int(is_held.sum()) >= PLACE_IMAGES else torch.ones_like(is_held)
            mean, spread = _place_statistics(x.double(), rows, seen)
            getattr(self, f"mean_{t.name}")[category] = mean[0]
            getattr(self, f"spread_{t.name}")[category] = spread[0]
            without = _place_statistics(x.double(), rows, seen, leave_out=True)
            standard[t.name] = _where_seen(self._standard(x, *(s.float() for s in without)), shares)
        combined = torch.stack(list(self.contributions(standard, shares).values())).sum(0)
        raw = self._peaks(standard, combined)
        trained = [t.is_trained for t in self.terms for _ in t.peaks] if self.map_peak is None else [False]
        z = torch.empty_like(raw)
        for k, is_trained in enumerate(trained):
            rows = is_held if is_trained and int(is_held.sum()) >= HELD_OUT_IMAGES else torch.ones_like(is_held)
            caution = 1.0 + CAUTION / math.sqrt(int(rows.sum())) if is_trained else 1.0
            center, scale = _center_and_scale(raw[rows, k])
            self.peak_center[category, k], self.peak_scale[category, k] = center, caution * scale
            z[:, k] = _left_out(raw[:, k], rows) / caution
            self.peak_weight[category, k] = len(raw) / (len(raw) + OWN_IMAGES) if is_trained else 1.0
        fused = _fused(z, self.peak_weight[category])
        self.ends[category] = torch.stack(_center_and_scale(fused))
        return _left_out(fused, torch.ones_like(is_held)), combined.flatten(1).amax(1)

    @torch.no_grad()
    def rescale(self, category: int, score: Tensor) -> Tensor:
        """Let images with these scores (n,) be the typical ones of a category from now on.

        Returns
        -------
        score : Tensor of shape (n,)
            Of each image as if it had taken no part.
        """
        center, scale = _center_and_scale(score)
        before = self.ends[category].clone()
        self.ends[category] = torch.stack([before[0] + before[1] * center, before[1] * scale])
        return _left_out(score, torch.ones(len(score), dtype=torch.bool))


def _highest(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest ``share`` of the cells of maps (N, h, w), at least one, (N,) in float64."""
    flat = maps.flatten(1)
    n = max(1, round(share * flat.shape[1]))
    return flat.amax(1).double() if n == 1 else flat.topk(n, 1).values.double().mean(1)


def _fused(z: Tensor, weight: Tensor) -> Tensor:
    """Log of the weighted mean of the exponentials along the last axis."""
    return torch.logsumexp(z + weight.log(), -1) - weight.sum().log()


def _is_seen(share: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which cells of a grid are not ignored as a whole, (N, *grid), by shares (N, h, w) of the cells of another."""
    rows, columns = (_overlaps(*pair).to(share) for pair in zip(grid, share.shape[1:]))
    return rows @ share @ columns.mT > 1e-6


def _overlaps(n: int, k: int) -> Tensor:
    """By how much each of ``n`` equal parts of a side overlaps with each of ``k``, (n, k), in parts of ``n``."""
    start, other = torch.arange(n)[:, None] / n, torch.arange(k) / k
    common = torch.minimum(start + 1 / n, other + 1 / k) - torch.maximum(start, other)
    return torch.where(common > 1e-6, common * n, 0.0)


def _where_seen(z: Tensor, share: Tensor | None) -> Tensor:
    """Standardised values (N, h, w), those of a typical normal image where all is ignored."""
    return z if share is None else torch.where(_is_seen(share, (z.shape[1], z.shape[2])), z, 0.0)


def _place_statistics(
    x: Tensor, rows: Tensor, seen: Tensor | None = None, leave_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by place, averaged over 3 x 3 cells and shrunk to those of all places.

    Of those maps of (n, h, w) that the mask ``rows`` names, and of their cells that are ``seen``; (1, h, w) each, or,
    with ``leave_out``, (n, h, w): for each image without it.
    """
    counts = torch.ones_like(x[:1]) if seen is None else seen.to(x)
    weight = rows.to(x).view(-1, 1, 1) * counts
    n = weight.sum(0, keepdim=True)
    first, second = (weight * x).sum(0, keepdim=True), (weight * x.square()).sum(0, keepdim=True)
    if leave_out and int(rows.sum()) > 1:
        n, first, second = n - weight, first - weight * x, second - weight * x.square()
    count = n.clamp_min(1.0)
    mean = first / count
    variance = (second / count - mean.square()).clamp_min(0.0)
    of_all = n.sum((1, 2), keepdim=True).clamp_min(1.0)

    def over_places(values: Tensor) -> Tensor:
        return (n * values).sum((1, 2), keepdim=True) / of_all

    flat_mean = over_places(mean)
    flat = over_places(variance) + over_places((mean - flat_mean).square())
    flat = torch.maximum(flat, (10 * LEAST_SPREAD * flat_mean).square() / n.amax((1, 2), keepdim=True).clamp_min(1.0))
    keep = n / (n + PLACE_IMAGES)
    mean = keep * _averaged(mean, n) + (1 - keep) * flat_mean
    # A tenth of the overall variance always stays: where normal images happen to agree, nothing would divide.
    variance = keep * (0.9 * _averaged(variance, n) + 0.1 * flat) + (1 - keep) * flat
    return mean, torch.maximum(variance.sqrt(), LEAST_SPREAD * flat_mean.abs()).clamp_min(1e-12)


def _averaged(x: Tensor, n: Tensor) -> Tensor:
    """Mean over 3 x 3 cells, of which each counts ``n`` times."""
    total, count = (F.avg_pool2d(each[:, None], 3, 1, 1, count_include_pad=False)[:, 0] for each in (n * x, n))
    return total / count.clamp_min(1e-12)


def _center_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Median of numbers (n,), and spread above it, pulled towards 1 where they are few.

    The spread is that of a normal distribution with the same 90th percentile: thresholds are about that side, and a few
    odd images among the normal ones, which reach far, do not move it.
    """
    n = len(x)
    center, high = torch.quantile(x, torch.tensor([0.5, HIGH], dtype=x.dtype))
    return center, (n * (high - center) / HIGH_SPREAD + PRIOR_IMAGES) / (n + PRIOR_IMAGES)


def _left_out(x: Tensor, rows: Tensor) -> Tensor:
    """Each number (n,) in units of those of the mask ``rows``, without itself."""
    out = torch.empty_like(x)
    for i in range(len(x)):
        others = rows.clone()
        others[i] = False
        center, scale = _center_and_scale(x[others] if others.any() else x[rows])
        out[i] = (x[i] - center) / scale
    return out
