"""Output of VQ-Flow, and the published anomaly maps and scores computed from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .hierarchy import Codes


@dataclass(frozen=True)
class Latents:
    """Latents of the three stages and their log-determinants. All lists run over the stages.

    Attributes
    ----------
    flow_z : list of Tensor (N, C_k, h_k, w_k)
        Latents after each stage's own flow.
    flow_log_det_cells : list of Tensor (N, h_k, w_k)
        Log-determinant of each cell, up to ``flow_z``.
    z : list of Tensor (N, C_k, h_k, w_k)
        Latents after mixture and fusion: standard normal under the model.
    log_det_cells : list of Tensor (N, h_k, w_k)
        Log-determinant of each cell of the whole transform.
    """

    flow_z: list[Tensor]
    flow_log_det_cells: list[Tensor]
    z: list[Tensor]
    log_det_cells: list[Tensor]

    @property
    def flow_log_det(self) -> list[Tensor]:
        """Log-determinant of each stage's own flow, (N,) each."""
        return [cells.flatten(1).sum(1) for cells in self.flow_log_det_cells]

    @property
    def log_det(self) -> Tensor:
        """Log-determinant of the whole transform, (N,)."""
        return torch.stack([cells.flatten(1).sum(1) for cells in self.log_det_cells]).sum(0)

    @property
    def n_dimensions(self) -> int:
        """Number of dimensions of one image's latents."""
        return sum(z[0].numel() for z in self.z)

    @property
    def log_prob(self) -> Tensor:
        r"""Log-density of the features in nats, (N,); no density if ``likelihood="release"``."""
        square = torch.stack([z.square().flatten(1).sum(1) for z in self.z]).sum(0)
        return self.log_det - 0.5 * square - 0.5 * self.n_dimensions * math.log(2 * math.pi)


@dataclass(frozen=True)
class VQFlowOutput:
    """Result of one forward pass.

    Attributes
    ----------
    codes : Codes
    latents : Latents
    loss : Tensor, scalar
    """

    codes: Codes
    latents: Latents
    loss: Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, h, w) to another grid, bilinearly."""
    if x.shape[1:] == size:
        return x
    return F.interpolate(x[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def multiplicative_map(terms: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    r"""The published map for image scores: :math:`1 - P / \max P` with :math:`P = \prod_k p_k`.

    Parameters
    ----------
    terms : sequence of Tensor (N, h_k, w_k)
        :math:`-\log p_k`: the ``log_likelihood_k`` of :meth:`VQFlow.anomaly_map`.
    size : (int, int)
        Height and width of the map.

    Returns
    -------
    Tensor of shape (N, height, width), in 0..1
    """
    log_p = -torch.stack([resize(term, size) for term in terms]).sum(0)
    return 1 - (log_p - log_p.amax((1, 2), keepdim=True)).exp()


def additive_map(terms: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    r"""The published map for localisation: the maximum of :math:`s = \sum_k p_k / \max p_k` minus :math:`s`.

    Parameters and result as in :func:`multiplicative_map`; the range is 0 to the number of stages.
    """
    p = torch.stack([resize((term.amin((1, 2), keepdim=True) - term).exp(), size) for term in terms]).sum(0)
    return p.amax((1, 2), keepdim=True) - p


def density_map(terms: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    r"""Minus the log-density of every cell in nats per channel, summed over stages: one scale for all images.

    Parameters
    ----------
    terms : dict
        What :meth:`VQFlow.anomaly_map` returns.
    size : (int, int)
        Height and width of the map.

    Returns
    -------
    Tensor of shape (N, height, width)
    """
    stages = [terms[f"log_likelihood_{k}"] + terms[f"volume_{k}"] for k in (1, 2, 3)]
    constant = 0.5 * math.log(2 * math.pi) * len(stages)
    return torch.stack([resize(stage, size) for stage in stages]).sum(0) + constant


def image_score(anomaly_map: Tensor, fraction: float = 0.03) -> Tensor:
    """Mean of the largest ``fraction`` of a map's values, (N, height, width) to (N,)."""
    values = anomaly_map.flatten(1)
    return values.topk(max(1, int(values.shape[1] * fraction)), 1).values.mean(1)
