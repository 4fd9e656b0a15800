"""Attention whose position enters queries and keys only.

It is written out for a CPU, where the backward pass of torch's fused attention takes longer than the rest of a training
step. What counts there is the number of passes over memory: a few images at a time go through all steps of the
attention, in buffers that stay in the cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import random_signs, rounded
from .packed import PackedLinear

_CACHED = 2**20
"""Attention weights that are worked on at a time."""


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

    def pack(self, rows: int) -> None:
        """Lay the weights out for scoring on a CPU, with ``rows`` vectors an image."""
        parts = zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        self.packed = nn.ModuleList(PackedLinear(weight, bias, rows) for weight, bias in parts)
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
            ``x`` itself when left out: the projections are then one product.

        Returns
        -------
        Tensor of shape (N, L, D)
        """
        memory = x if memory is None else memory
        position = position.to(x.dtype)
        located = x + position
        key = located if memory is x else memory + position
        # Three products, though two would do: the gradient of a wide one takes longer than those of its parts.
        if self.packed is None:
            parts = zip((located, key, memory), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
            q, k, v = (F.linear(inputs, weight, bias) for inputs, weight, bias in parts)
        else:
            q, k, v = (packed(inputs) for packed, inputs in zip(self.packed, (located, key, memory)))
        p = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and (torch.is_grad_enabled() or p):
            attended: Tensor = _Attend.apply(q, k, v, self.n_heads, p)
        else:
            q, k, v = (_heads(t, self.n_heads) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        merged: Tensor = self.out_proj(attended)
        return merged


def _heads(x: Tensor, n_heads: int) -> Tensor:
    """(N, L, D) as (N, heads, L, D / heads), the same memory."""
    return x.view(*x.shape[:2], n_heads, -1).transpose(1, 2)


class _Attend(torch.autograd.Function):
    """Attention of all heads, (N, L, D) each, for a CPU; some images at a time, in buffers that stay in the cache.

    Kept for the backward pass are the weights before dropout, those that were dropped with a negative sign.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, n_heads: int, p: float) -> Tensor:
        output = torch.empty_like(q)
        q, k, v = (_heads(t, n_heads).contiguous() for t in (q, k, v))
        n, _, length, width = q.shape
        keep = any(ctx.needs_input_grad)
        alpha, step = 1 / math.sqrt(width), min(n, max(1, _CACHED // (n_heads * length**2)))
        scores = q.new_empty(step * n_heads, length, length)
        kept = q.new_empty(n if keep else step, n_heads, length, length)
        for i in range(0, n, step):
            some = slice(i, i + step)
            q_i, k_i, v_i = (t[some].flatten(0, 1) for t in (q, k, v))
            s, weights = scores[: len(q_i)], kept[some if keep else slice(0, n - i)].flatten(0, 1)
            torch.baddbmm(s, q_i, k_i.mT, beta=0, alpha=alpha, out=s)
            torch.softmax(s, -1, out=weights)
            if p:
                weights.copysign_(random_signs(weights.numel(), p).view(weights.shape))
                torch.clamp_min(weights, 0, out=s)
            attended = torch.bmm(s if p else weights, v_i).view(-1, *q.shape[1:])
            torch.mul(attended, _scale(p), out=_heads(output[some], n_heads))
        if keep:
            ctx.save_for_backward(q, k, v, kept)
            ctx.p, ctx.alpha, ctx.step = p, alpha, step
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept = ctx.saved_tensors
        n, n_heads, length, _ = q.shape
        g_q, g_k, g_v = grads = [torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(3)]
        g_q, g_k, g_v, grad = (_heads(t, n_heads) for t in (*grads, grad))
        first, second = grad.new_empty(2, ctx.step * n_heads, length, length)
        for i in range(0, n, ctx.step):
            some = slice(i, i + ctx.step)
            q_i, k_i, v_i, weights = (t[some].flatten(0, 1) for t in (q, k, v, kept))
            g = torch.mul(grad[some], _scale(ctx.p), out=torch.empty_like(q[some])).flatten(0, 1)
            a, b = first[: len(g)], second[: len(g)]
            torch.bmm(g, v_i.mT, out=a)
            if ctx.p:
                torch.clamp_min(weights, 0, out=b)
            g_v[some] = torch.bmm((b if ctx.p else weights).mT, g).view(-1, *q.shape[1:])
            if ctx.p:
                # Into the other buffer: in place the same takes longer.
                torch.ops.aten.threshold_backward(a, weights, 0, grad_input=b)
                a, weights = b, torch.abs(weights, out=a)
            torch.ops.aten._softmax_backward_data(a, weights, -1, a.dtype, grad_input=a)
            g_q[some] = torch.baddbmm(g, a, k_i, beta=0, alpha=ctx.alpha).view(-1, *q.shape[1:])
            g_k[some] = torch.baddbmm(g, a.mT, q_i, beta=0, alpha=ctx.alpha).view(-1, *q.shape[1:])
        return (*grads, None, None)


def _scale(p: float) -> float:
    """What makes up for dropping, which is done with a probability of a multiple of 2**-16."""
    return 1 / (1 - rounded(p))
