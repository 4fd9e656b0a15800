"""Outputs of HVQ-Trans."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Level(NamedTuple):
    """One level of the hierarchy, J = 0 (the tokens) to n_layers (the encoder's last state).

    Attributes
    ----------
    input : Tensor of shape (N, L, width)
        Input of the quantiser: E_n on the top level, [E_J ; q_top] below.
    quantized : Tensor of shape (N, L, width)
    indices : Tensor of shape (N, L), int64
    """

    input: Tensor
    quantized: Tensor
    indices: Tensor


class HVQTransOutput(NamedTuple):
    """Output of :class:`HVQTrans`.

    Attributes
    ----------
    reconstruction : Tensor of shape (N, C, h, w)
    commitment : Tensor of shape (N,)
        Summed over the levels.
    levels : tuple of Level
        Levels 0, 1, ..., n_layers.
    """

    reconstruction: Tensor
    commitment: Tensor
    levels: tuple[Level, ...]
