"""Attention whose position enters queries and keys only.

It is written out for a CPU, where the backward pass of torch's fused attention takes longer than the rest of a training
step. What counts there is the number of passes over memory, and what an element costs in each: some images at a time go
through all steps of the attention, and dropping is arithmetic on the sign bits of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import bits, negate_at_random_, rounded
from .packed import PackedLinear, linear, product_type

_AT_A_TIME = 2**22
"""Attention weights that are worked on together, or those of one image if they are more."""
_Parts = tuple[tuple[int, int], ...]
_SELF: _Parts = ((0, 2), (2, 3))
_CROSS: _Parts = ((0, 1), (1, 2), (2, 3))
"""Which of queries (0), keys (1) and values (2) are made of each source: from the first of them to the end."""


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
        self.out_proj: nn.Linear | PackedLinear = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.packed: nn.ModuleList | None = None

    def pack(self, rows: int, crossing: bool) -> None:
        """Lay the weights out for scoring on a CPU, with ``rows`` vectors an image; ``crossing``: with a memory."""
        maps = self._maps(_CROSS if crossing else _SELF)
        self.packed = nn.ModuleList(PackedLinear(weight, bias, rows) for weight, bias in maps)
        self.out_proj = PackedLinear(self.out_proj.weight, self.out_proj.bias, rows)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, n_heads={self.n_heads}, dropout={self.dropout}"

    def forward(self, x: Tensor, position: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from ``x + position`` to ``memory + position``, with values from ``memory``.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        position : Tensor of shape (L, D)
        memory : Tensor of shape (N, L, D), optional
            ``x`` itself when left out.

        Returns
        -------
        Tensor of shape (N, L, D)
        """
        p = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and (torch.is_grad_enabled() or p):
            heads = _Project.apply(x, memory, position, self.in_proj_weight, self.in_proj_bias, self.n_heads)
            attended: Tensor = _Attend.apply(heads, p)
        else:
            sources, parts = _sources(x, memory, position.to(x.dtype))
            if self.packed is None:
                products = [F.linear(t, weight, bias) for t, (weight, bias) in zip(sources, self._maps(parts))]
            else:
                products = [packed(t) for packed, t in zip(self.packed, sources)]
            q, k, v = (h for product in products for h in _heads(product, self.n_heads, product.shape[-1] // self.dim))
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        merged: Tensor = self.out_proj(attended)
        return merged

    def _maps(self, parts: _Parts) -> list[tuple[Tensor, Tensor]]:
        slices = [slice(i * self.dim, j * self.dim) for i, j in parts]
        return [(self.in_proj_weight[some], self.in_proj_bias[some]) for some in slices]


def _sources(x: Tensor, memory: Tensor | None, position: Tensor) -> tuple[list[Tensor], _Parts]:
    """What queries, keys and values are made of, and which of these are made of each."""
    if memory is None:
        return [x + position, x], _SELF
    return [x + position, memory + position, memory], _CROSS


def _heads(x: Tensor, n_heads: int, parts: int = 1) -> Tensor:
    """(N, L, parts * D) as (parts, N, heads, L, D / heads), the same memory."""
    return x.view(*x.shape[:2], parts, n_heads, -1).permute(2, 0, 3, 1, 4)


class _Project(torch.autograd.Function):
    """Queries, keys and values of all heads, (3, N, heads, L, D / heads), of (N, L, D) at positions (L, D)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, memory: Tensor | None, position: Tensor, weight: Tensor, bias: Tensor, n_heads: int
    ) -> Tensor:
        dtype = product_type(x)
        ctx.types = [None if t is None else t.dtype for t in (x, memory, position, weight, bias)]
        (n, length, dim), weight, bias = x.shape, weight.to(dtype), bias.to(dtype)
        memory = None if memory is None else memory.to(dtype)
        sources, ctx.parts = _sources(x.to(dtype), memory, position.to(dtype))
        heads = weight.new_empty(3, n, n_heads, length, dim // n_heads)
        for (i, j), source in zip(ctx.parts, sources):
            some = slice(i * dim, j * dim)
            heads[i:j] = _heads(linear(source, weight[some], bias[some]), n_heads, j - i)
        ctx.save_for_backward(weight, *sources)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        n, length, dim = sources[0].shape
        of_weight, of_bias, of_sources = torch.empty_like(weight), weight.new_empty(3 * dim), []
        for (i, j), source in zip(ctx.parts, sources):
            some, rows = slice(i * dim, j * dim), source.flatten(0, 1)
            g = grad[i:j].permute(1, 3, 0, 2, 4).reshape(n * length, -1)
            torch.mm(g.mT, rows, out=of_weight[some])
            torch.sum(g, 0, out=of_bias[some])
            if j < 3:
                # With "out", which autocast leaves alone: it may be on here though it was off before.
                of_sources.append(torch.mm(g, weight[some], out=torch.empty_like(rows)))
            else:  # the values, whose source is the one before without its position
                of_position = torch.stack([t.view(n, length, dim).sum(0) for t in of_sources]).sum(0)
                torch.addmm(of_sources[-1], g, weight[some], out=of_sources[-1])
        of_sources = [t.view(n, length, dim) for t in of_sources]
        of_x, of_memory = (*of_sources, None)[:2]
        grads = of_x, of_memory, of_position, of_weight, of_bias
        return *(g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.types)), None


class _Attend(torch.autograd.Function):
    """Attention of all heads, (3, N, heads, L, D / heads) to (N, L, D), for a CPU.

    Kept for the backward pass are the weights before dropout, those that were dropped with a negative sign.
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, p: float) -> Tensor:
        _, n, n_heads, length, width = heads.shape
        q, k, v = heads
        output: Tensor = q.new_empty(n, length, n_heads * width)
        keep = any(ctx.needs_input_grad)
        alpha, step = 1 / math.sqrt(width), min(n, max(1, _AT_A_TIME // (n_heads * length**2)))
        scores = q.new_empty(step * n_heads, length, length)
        kept = q.new_empty(n if keep else step, n_heads, length, length)
        for i in range(0, n, step):
            some = slice(i, i + step)
            q_i, k_i, v_i = (t[some].flatten(0, 1) for t in (q, k, v))
            s, weights = scores[: len(q_i)], kept[some if keep else slice(0, n - i)].flatten(0, 1)
            torch.baddbmm(s, q_i, k_i.mT, beta=0, alpha=alpha, out=s)
            torch.softmax(s, -1, out=weights)
            if p:
                negate_at_random_(weights, p)
                torch.clamp_min(bits(weights), 0, out=bits(s))
            attended = torch.bmm(s if p else weights, v_i).view(-1, *q.shape[1:])
            torch.mul(attended, _scale(p), out=_heads(output[some], n_heads)[0])
        if keep:
            ctx.save_for_backward(heads, kept)
            ctx.p, ctx.alpha, ctx.step = p, alpha, step
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, kept = ctx.saved_tensors
        q, k, v = heads
        n, n_heads, length, _ = q.shape
        grads = torch.empty_like(heads)
        grad = _heads(grad.contiguous(), n_heads)[0]
        first, second = grad.new_empty(2, ctx.step * n_heads, length, length)
        for i in range(0, n, ctx.step):
            some = slice(i, i + ctx.step)
            q_i, k_i, v_i, weights = (t[some].flatten(0, 1) for t in (q, k, v, kept))
            g_q, g_k, g_v = (t[some].flatten(0, 1) for t in grads)
            g = torch.mul(grad[some], _scale(ctx.p), out=torch.empty_like(q[some])).flatten(0, 1)
            a, b = first[: len(g)], second[: len(g)]
            torch.bmm(g, v_i.mT, out=a)
            if ctx.p:
                torch.clamp_min(bits(weights), 0, out=bits(b))
            torch.bmm((b if ctx.p else weights).mT, g, out=g_v)
            if ctx.p:
                # Into the other buffer: in place the same takes longer.
                torch.ops.aten.threshold_backward(bits(a), bits(weights), 0, grad_input=bits(b))
                a, weights = b, torch.abs(weights, out=a)
            torch.ops.aten._softmax_backward_data(a, weights, -1, a.dtype, grad_input=a)
            torch.baddbmm(g, a, k_i, beta=0, alpha=ctx.alpha, out=g_q)
            torch.baddbmm(g, a.mT, q_i, beta=0, alpha=ctx.alpha, out=g_k)
        return grads, None


def _scale(p: float) -> float:
    """What makes up for dropping, which is done with a probability of a multiple of 2**-16."""
    return 1 / (1 - rounded(p))
