"""Post-norm transformer layers whose position enters queries and keys only.

The layers compute what ``torch.nn.TransformerEncoderLayer`` and DETR's decoder layer compute, under the same
parameter names. The attention is spelt out where a gradient is needed on a CPU: there the backward pass of
torch's fused attention takes longer than the rest of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each element with probability ``p`` and scale the others by ``1 / (1 - p)``.

    What ``torch.nn.functional.dropout`` does, made cheap on a CPU, where random numbers and comparisons one
    element at a time cost more than the layer that they follow. One 64-bit draw gives four 16-bit numbers,
    and a large tensor uses each of them in eight blocks, every time in another place and with another random
    number added: any two elements of a mask are still independent of each other, and so are two masks.

    ``p`` is rounded so that the scale is exact in the type of ``x`` (to 2e-3 of ``1 - p`` in bfloat16) and
    to a multiple of 2**-16: the expectation is that of ``x`` to 2**-16.

    Parameters
    ----------
    x : Tensor
    p : float
        In [0, 1].
    training : bool, default=True
        When False, ``x`` is returned as it is.
    """
    if not training or p == 0:
        return x
    scale = torch.tensor(1 / (1 - p) if p < 1 else math.inf).to(x.dtype)
    threshold = round((1 - 1 / float(scale)) * 2**16)
    if x.device.type != "cpu" or not x.is_floating_point() or not 0 < threshold < 2**16:
        return F.dropout(x, p)
    # Comparing in place stays in 16-bit integers, which is ten times faster than making booleans.
    keep = _random_int16(x.numel()).ge_(threshold - 2**15).view(x.shape)
    if x.element_size() == 2:
        mask = keep.mul_(int(scale.view(torch.int16))).view(x.dtype)
    else:
        mask = keep.to(x.dtype).mul_(float(scale))
    return x * mask


def _random_int16(n: int) -> Tensor:
    """(n,) uniform 16-bit integers on the CPU, pairwise independent, from torch's default generator."""
    blocks = 8 if n >= 2**14 else 1
    length = -(-n // (4 * blocks)) * 4
    numbers = torch.empty(length // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    if blocks == 1:
        return numbers[:n]
    twice = numbers.repeat(2)
    start = torch.randint(length, (blocks,)).tolist()
    added = torch.randint(-(2**15), 2**15, (blocks,)).tolist()
    output = torch.empty(blocks, length, dtype=torch.int16)
    for block, i, shift in zip(output, start, added):
        torch.add(twice[i : i + length], shift, out=block)
    return output.view(-1)[:n]


class Attention(nn.Module):
    """Multi-head attention with one set of projections, named as in ``torch.nn.MultiheadAttention``.

    Parameters
    ----------
    dim : int
        Width of queries, keys and values (D), a multiple of ``n_heads``.
    n_heads : int
    dropout : float, default=0.0
        Probability with which an attention weight is dropped in training.
    """

    def __init__(self, dim: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"The width {dim} of an attention layer is not a multiple of its {n_heads} heads.")
        self.dim = dim
        self.n_heads = n_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_heads={self.n_heads}, dropout={self.dropout}"

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from every query to every key.

        Parameters
        ----------
        query : Tensor of shape (N, L, D)
        key : Tensor of shape (N, S, D)
            May be ``query`` itself: the two are then projected in one product.
        value : Tensor of shape (N, S, D)

        Returns
        -------
        Tensor of shape (N, L, D)
        """
        d = self.dim
        if key is query:
            w_qk, w_v = torch.split(self.in_proj_weight, [2 * d, d])
            b_qk, b_v = torch.split(self.in_proj_bias, [2 * d, d])
            q, k = self._heads(F.linear(query, w_qk, b_qk), 2)
        else:
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
            b_q, b_k, b_v = self.in_proj_bias.chunk(3)
            (q,) = self._heads(F.linear(query, w_q, b_q), 1)
            (k,) = self._heads(F.linear(key, w_k, b_k), 1)
        (v,) = self._heads(F.linear(value, w_v, b_v), 1)
        attended = self._attend(q, k, v)
        merged: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return merged

    def _heads(self, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(N, L, parts * D) to ``parts`` tensors (N, heads, L, D / heads)."""
        n, length, _ = projected.shape
        split = projected.view(n, length, parts, self.n_heads, self.dim // self.n_heads)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or not (torch.is_grad_enabled() or p):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        weights = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.mT).softmax(-1)
        return torch.matmul(dropout(weights, p), v)


class FeedForward(nn.Module):
    """Two linear maps with a ReLU between them; a base that gives its layers the names of torch's."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = self._drop(self.linear1(x).relu())
        output: Tensor = self.linear2(hidden)
        return output

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


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

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), at positions (L, D), to tokens of the same shape."""
        located = x + position.to(x.dtype)
        x = self.norm1(x + self._drop(self.self_attn(located, located, x)))
        output: Tensor = self.norm2(x + self._drop(self.feed_forward(x)))
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

    def forward(self, x: Tensor, memory: Tensor, position: Tensor) -> Tensor:
        """Map tokens (N, L, D), looking at memory (N, L, D) of the same positions (L, D), to (N, L, D)."""
        position = position.to(x.dtype)
        located = x + position
        x = self.norm1(x + self._drop(self.self_attn(located, located, x)))
        x = self.norm2(x + self._drop(self.cross_attn(x + position, memory + position, memory)))
        output: Tensor = self.norm3(x + self._drop(self.feed_forward(x)))
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
