"""Post-norm transformer layers whose position enters queries and keys only.

The layers compute what ``torch.nn.TransformerEncoderLayer`` and DETR's decoder layer compute, under the same
parameter names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import Attention
from .dropout import add_dropped, bits, rounded, zero_at_random_
from .packed import PackedLinear, linear, product_type


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them; a base that gives its layers the names of torch's."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear1: nn.Linear | PackedLinear = nn.Linear(dim, dim_feedforward)
        self.linear2: nn.Linear | PackedLinear = nn.Linear(dim_feedforward, dim)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def pack(self, rows: int) -> None:
        """Lay the weights out for scoring on a CPU, with ``rows`` vectors an image."""
        self.linear1 = PackedLinear(self.linear1.weight, self.linear1.bias, rows, relu=True)
        self.linear2 = PackedLinear(self.linear2.weight, self.linear2.bias, rows)

    def feed_forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        if isinstance(self.linear1, PackedLinear):
            output: Tensor = self.linear2(self.linear1(x))
        elif x.device.type == "cpu" and torch.is_grad_enabled() and p < 1:
            # By their weights: what hooks are on the two maps is not called.
            first, second = self.linear1, self.linear2
            output = _FeedForward.apply(x, first.weight, first.bias, second.weight, second.bias, p)
        else:
            output = self.linear2(F.dropout(self.linear1(x).relu(), p))
        return output

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return add_dropped(x, branch, self.dropout, self.training)


class _FeedForward(torch.autograd.Function):
    """Linear map, ReLU, dropout, linear map of (N, L, D) for a CPU; the hidden layer says by itself what was dropped.

    What makes up for dropping is part of the second map, which is smaller than what it is applied to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, p: float
    ) -> Tensor:
        dtype = product_type(x)
        ctx.types = [t.dtype for t in (x, weight1, bias1, weight2, bias2)]
        ctx.scale = 1 / (1 - rounded(p))
        inputs, weight1, weight2 = x.to(dtype), weight1.to(dtype), (weight2 * ctx.scale).to(dtype)
        hidden = linear(inputs, weight1, bias1.to(dtype)).relu_()
        if p:
            zero_at_random_(hidden, p)
        ctx.save_for_backward(inputs, weight1, weight2, hidden)
        return linear(hidden, weight2, bias2.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2, hidden = ctx.saved_tensors
        g, rows = grad.flatten(0, 1), hidden.flatten(0, 1)
        g_hidden = g @ weight2
        # 0 where the hidden layer is.
        torch.ops.aten.threshold_backward(bits(g_hidden), bits(rows), 0, grad_input=bits(g_hidden))
        of_first = g_hidden.mT @ x.flatten(0, 1), g_hidden.sum(0)
        of_second = (g.mT @ rows).to(ctx.types[3]).mul_(ctx.scale), g.sum(0)
        grads = (g_hidden @ weight1).view(x.shape), *of_first, *of_second
        return *(t.to(dtype) for t, dtype in zip(grads, ctx.types)), None


class EncoderLayer(FeedForward):
    """Self-attention, then the feed-forward network; each added to its input and then normalised.

    Parameters
    ----------
    dim : int
        Width of the tokens (D).
    n_heads : int
    dim_feedforward : int
        Width of the hidden layer.
    dropout : float, default=0.1
        On attention weights, on the hidden layer and on both residual branches.
    """

    def __init__(self, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = Attention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def pack(self, rows: int) -> None:
        super().pack(rows)
        self.self_attn.pack(rows, crossing=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), at positions (L, D), to tokens of the same shape."""
        x = self.norm1(self._add(x, self.self_attn(x, position)))
        output: Tensor = self.norm2(self._add(x, self.feed_forward(x)))
        return output


class DecoderLayer(FeedForward):
    """Self-attention, attention to a memory, feed-forward network; each added to its input and normalised.

    Parameters
    ----------
    dim : int
        Width of the tokens and of the memory (D).
    n_heads : int
    dim_feedforward : int
        Width of the hidden layer.
    dropout : float, default=0.1
        On attention weights, on the hidden layer and on the three residual branches.
    """

    def __init__(self, dim: int, n_heads: int, dim_feedforward: int, dropout: float = 0.1) -> None:
        super().__init__(dim, dim_feedforward, dropout)
        self.self_attn = Attention(dim, n_heads, dropout)
        self.cross_attn = Attention(dim, n_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def pack(self, rows: int) -> None:
        super().pack(rows)
        self.self_attn.pack(rows, crossing=False)
        self.cross_attn.pack(rows, crossing=True)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), looking at memory (N, L, D) of the same positions (L, D), to (N, L, D)."""
        x = self.norm1(self._add(x, self.self_attn(x, position)))
        x = self.norm2(self._add(x, self.cross_attn(x, position, memory)))
        output: Tensor = self.norm3(self._add(x, self.feed_forward(x)))
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
    """A stack of :class:`DecoderLayer`, each with a memory of its own, and a final LayerNorm.

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
        """Start from ``memories[0]``; layer i looks at ``memories[i]``. (N, L, D) throughout."""
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
