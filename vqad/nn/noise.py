"""Noise on features in training: what keeps a model of few images from learning them by heart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draws import drawing


class GaussianNoise(nn.Module):
    """Add independent normal numbers in training; hand on what comes in otherwise.

    A density that is fitted to noisy data is that of the data, smoothed by a Gaussian of the same width [1]_: between
    few training images it cannot fall to nothing.

    Parameters
    ----------
    std : float, default=0.0
        Standard deviation of what is added; 0 adds nothing.

    References
    ----------
    .. [1] Rothfuss, Ferreira, Boehm, Walther, Ulrich, Asfour, Krause: Noise Regularization for Conditional Density
       Estimation, arXiv:1907.08982.
    """

    def __init__(self, std: float = 0.0) -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"std must be at least 0, got {std}.")
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.std:
            return x
        with drawing():
            noise = torch.randn_like(x)
        return torch.add(x, noise, alpha=self.std)

    def extra_repr(self) -> str:
        return f"std={self.std}"
