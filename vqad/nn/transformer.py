"""Post-norm transformer layers whose position enters queries and keys only.

The layers compute what ``torch.nn.TransformerEncoderLayer`` and DETR's decoder layer compute, under the same
parameter names.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .draws import Dropout, drawing


class FeedForward(nn.Module):
    """Feed-forward network of a layer, under torch's parameter names: two linear maps with a ReLU in between."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def feed_forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear2(self.dropout(self.linear1(x).relu()))
        return output


def _attention(dim: int, n_heads: int, dropout: float) -> nn.MultiheadAttention:
    if dim % n_heads:
        raise ValueError(f"The width of an attention layer must be a multiple of its {n_heads} heads, got {dim}.")
    return nn.MultiheadAttention(dim, n_heads, dropout, batch_first=True)


def _attend(attention: nn.MultiheadAttention, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
    """Attend from ``x + position`` to ``memory + position``, with values from ``memory``."""
    with drawing() if attention.training and attention.dropout else nullcontext():
        attended: Tensor = attention(x + position, memory + position, memory, need_weights=False)[0]
    return attended


class EncoderLayer(FeedForward):
    """Self-attention, then the feed-forward network; each added to its input and then normalised.

    Parameters
    ----------
    dim : int
        Width of the tokens (D), a multiple of ``n_heads``.
    n_heads : int
    dim_feedforward : int
        Width of the hidden layer.
    dropout : float, default=0.1
        On attention weights, on the hidden layer and on both residual branches.
    """

    def __init__(self, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = _attention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), at positions (L, D), to tokens of the same shape."""
        x = self.norm1(x + self.dropout(_attend(self.self_attn, x, x, position)))
        output: Tensor = self.norm2(x + self.dropout(self.feed_forward(x)))
        return output


class DecoderLayer(FeedForward):
    """Self-attention, attention to a memory, feed-forward network; each added to its input and normalised.

    Parameters
    ----------
    dim : int
        Width of the tokens and of the memory (D), a multiple of ``n_heads``.
    n_heads : int
    dim_feedforward : int
        Width of the hidden layer.
    dropout : float, default=0.1
        On attention weights, on the hidden layer and on the three residual branches.
    """

    def __init__(self, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = _attention(dim, n_heads, dropout)
        self.cross_attn = _attention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), attending to memory (N, L, D) at the same positions (L, D), to (N, L, D)."""
        x = self.norm1(x + self.dropout(_attend(self.self_attn, x, x, position)))
        x = self.norm2(x + self.dropout(_attend(self.cross_attn, x, memory, position)))
        output: Tensor = self.norm3(x + self.dropout(self.feed_forward(x)))
        return output


class Encoder(nn.Module):
    """A stack of :class:`EncoderLayer` that returns every intermediate state.

    Parameters
    ----------
    n_layers, dim, n_heads, dim_feedforward : int
    dropout : float, default=0.1
    """

    def __init__(self, n_layers: int, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, n_heads, dim_feedforward, dropout) for _ in range(n_layers))

    def forward(self, tokens: Tensor, position: Tensor) -> list[Tensor]:
        """Return [E_0 = tokens, E_1, ..., E_n], each (N, L, D)."""
        states = [tokens]
        for layer in self.layers:
            states.append(layer(states[-1], position))
        return states


class Decoder(nn.Module):
    """A stack of :class:`DecoderLayer`, each attending to its own memory, and a final LayerNorm.

    Parameters
    ----------
    n_layers, dim, n_heads, dim_feedforward : int
    dropout : float, default=0.1
    """

    def __init__(self, n_layers: int, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, n_heads, dim_feedforward, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, memories: Sequence[Tensor], position: Tensor) -> Tensor:
        """Start from ``memories[0]``; layer i attends to ``memories[i]``. (N, L, D) throughout."""
        x = memories[0]
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, memory, position)
        output: Tensor = self.norm(x)
        return output


class LearnedPosition(nn.Module):
    """Learned embedding of the cells of a grid: one half for the column, one for the row.

    Parameters
    ----------
    grid : (int, int)
        Rows and columns (h, w).
    dim : int
        Width (D), even.
    """

    def __init__(self, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"The width of a two-dimensional position must be even, got {dim}.")
        self.row = nn.Parameter(torch.rand(grid[0], dim // 2))
        self.col = nn.Parameter(torch.rand(grid[1], dim // 2))

    def forward(self) -> Tensor:
        """Positions of all cells, (h * w, D), row by row: cell (y, x) is [col[x], row[y]]."""
        h, w = len(self.row), len(self.col)
        return torch.cat([self.col.repeat(h, 1), self.row.repeat_interleave(w, 0)], 1)
