"""Noise on features in training, against overfitting with few images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draws import drawing


class GaussianNoise(nn.Module):
    """Add independent Gaussian noise in training; the identity otherwise.

    A density fitted to noisy data is the density of the data smoothed by a Gaussian of the same width [1]_, so it does
    not collapse onto a few training images.

    Parameters
    ----------
    std : float, default=0.0
        Standard deviation of the noise; 0 adds none.

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
