"""The published maps and scores of VQ-Flow, made of the terms that :meth:`VQFlow.anomaly_map` gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) on another grid."""
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
    r"""The published map for localisation: :math:`\sum_k p_k / \max p_k`, taken from its maximum.

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
