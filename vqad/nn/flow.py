r"""Conditional normalizing flows on feature maps: coupling blocks, a mixture component, a fusion of scales.

Each transform maps a feature map :math:`x` to a latent :math:`z` of the same shape, has a closed-form inverse, and
returns :math:`\log|\det \partial z / \partial x|`. Internally this log-determinant is kept per cell, (N, h, w); the
public ``forward`` sums it over the cells.

``forward`` and ``inverse`` take the condition; ``transform`` and ``restore`` take its contribution to each block's
first convolution (see :mod:`vqad.nn.condition`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqad.nn.condition import ConditionProjection, init_as_part


def random_rotation(channels: int) -> Tensor:
    """Draw a rotation from the uniform distribution on SO(c), (c, c) of the default dtype."""
    if torch.get_default_device().type == "meta":  # the shape alone is wanted
        return torch.empty(channels, channels)
    q, r = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[:, 0] = q[:, 0] * torch.linalg.det(q).sign()
    rotation: Tensor = q.to(torch.get_default_dtype())
    return rotation


def channel_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of every cell of an (N, C, h, w) map."""
    normed: Tensor = norm(x.permute(0, 2, 3, 1))
    return normed.permute(0, 3, 1, 2)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1×1 convolution of an (N, C, h, w) map, computed as a matrix product."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class CouplingSubnet(nn.Module):
    """3×3 convolution, LayerNorm over channels, ReLU, 3×3 convolution.

    Parameters
    ----------
    passive_channels, condition_channels : int
        Width of the input's two parts.
    out_channels : int
    hidden : int, optional
        Width of the hidden layer; the width of the input if left out.
    """

    def __init__(
        self, passive_channels: int, condition_channels: int, out_channels: int, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = passive_channels + condition_channels if hidden is None else hidden
        self.hidden = hidden
        # The condition's part of this convolution, and its bias, are passed to forward.
        self.conv1 = nn.Conv2d(passive_channels, hidden, 3, padding=1, bias=False)
        init_as_part(self.conv1.weight, passive_channels + condition_channels)
        self.norm = nn.LayerNorm(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 3, padding=1)

    def forward(self, passive: Tensor, projected: Tensor) -> Tensor:
        out: Tensor = self.conv2(channel_norm(self.conv1(passive) + projected, self.norm).relu_())
        return out


class CouplingBlock(nn.Module):
    r"""Affine coupling, then a scale and an offset for each channel, then a fixed rotation of the channels.

    With :math:`x = (x_1, x_2)` and :math:`a = 0.1\,\mathrm{subnet}(x_1, \text{condition})`:

    .. math:: s = \alpha \tanh(a_1), \quad u = (x_1,\; x_2 e^{s} + a_2), \quad
              z = R\,(g \odot u + \delta), \quad g = 0.1\,\mathrm{softplus}_{\beta=1/2}(\gamma)

    .. math:: \log|\det| = \sum s + \text{cells} \cdot \sum \log g

    Parameters
    ----------
    channels : int
        At least 2.
    condition_channels : int
    hidden : int, optional
        Width of the subnet; that of its input when left out.
    clamp : float, default=1.9
        :math:`\alpha`, the bound on log-scales.
    """

    rotation: Tensor

    def __init__(
        self, channels: int, condition_channels: int, *, hidden: int | None = None, clamp: float = 1.9
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"a coupling block splits its channels: expected at least 2, got {channels}.")
        self.clamp = clamp
        self.n_active = channels // 2
        self.n_passive = channels - self.n_active
        self.subnet = CouplingSubnet(self.n_passive, condition_channels, 2 * self.n_active, hidden)
        # softplus_{1/2}(γ) = 10, so that a new block keeps the scale of its input.
        self.global_scale = nn.Parameter(torch.full((channels,), 2 * math.log(math.expm1(5))))
        self.global_offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("rotation", random_rotation(channels))

    @property
    def gain(self) -> Tensor:
        """:math:`g`, positive, (channels,)."""
        return 0.1 * F.softplus(self.global_scale, beta=0.5)

    def coupling(self, passive: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the active half."""
        a = 0.1 * self.subnet(passive, projected).to(passive.dtype)
        log_scale, shift = a.chunk(2, 1)
        return self.clamp * log_scale.tanh(), shift

    def forward(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Transform ``x`` (N, C, h, w); also the log-determinant of each cell, (N, h, w)."""
        passive, active = torch.split(x, [self.n_passive, self.n_active], 1)
        log_scale, shift = self.coupling(passive, projected)
        u = torch.cat([passive, active * log_scale.exp() + shift], 1)
        gain = self.gain
        # Under autocast this product would round the latent itself.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.rotation * gain
            z = pointwise(u, weight, self.rotation @ self.global_offset)
        return z, log_scale.sum(1) + gain.log().sum()

    def inverse(self, z: Tensor, projected: Tensor) -> Tensor:
        """The ``x`` that ``forward`` maps to ``z``."""
        with torch.autocast(z.device.type, enabled=False):
            u = pointwise(z, self.rotation.mT)
        u = (u - self.global_offset.view(-1, 1, 1)) / self.gain.view(-1, 1, 1)
        passive, active = torch.split(u, [self.n_passive, self.n_active], 1)
        log_scale, shift = self.coupling(passive, projected)
        return torch.cat([passive, (active - shift) * (-log_scale).exp()], 1)


class ConditionalFlow(nn.Module):
    """A chain of coupling blocks that all see the same condition.

    Parameters
    ----------
    channels, condition_channels : int
    n_blocks : int
    hidden : int, optional
        Width of the subnets; that of their input when left out.
    clamp : float, default=1.9
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        n_blocks: int,
        *,
        hidden: int | None = None,
        clamp: float = 1.9,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CouplingBlock(channels, condition_channels, hidden=hidden, clamp=clamp) for _ in range(n_blocks)
        )
        self.project = ConditionProjection(
            condition_channels,
            [block.n_passive for block in self._typed_blocks()],
            [block.subnet.hidden for block in self._typed_blocks()],
        )

    def _typed_blocks(self) -> list[CouplingBlock]:
        return [cast(CouplingBlock, block) for block in self.blocks]

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Transform.

        Parameters
        ----------
        x : Tensor of shape (N, channels, h, w)
        condition : Tensor of shape (N, condition_channels, h, w)

        Returns
        -------
        z : Tensor of shape (N, channels, h, w)
        log_det : Tensor of shape (N,)
        """
        z, log_det = self.transform(x, self.project(condition))
        return z, log_det.flatten(1).sum(1)

    def inverse(self, z: Tensor, condition: Tensor) -> Tensor:
        """The ``x`` that ``forward`` maps to ``z``, (N, channels, h, w)."""
        return self.restore(z, self.project(condition))

    def transform(self, x: Tensor, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``forward`` from the projected condition, with the log-determinant of each cell, (N, h, w)."""
        log_det = x.new_zeros(x.shape[0], *x.shape[2:])
        for block, part in zip(self._typed_blocks(), projected):
            x, of_block = block(x, part)
            log_det = log_det + of_block
        return x, log_det

    def restore(self, z: Tensor, projected: Sequence[Tensor]) -> Tensor:
        """``inverse`` from the projected condition."""
        for block, part in zip(reversed(self._typed_blocks()), reversed(projected)):
            z = block.inverse(z, part)
        return z


class MixtureComponent(nn.Module):
    r"""Standardise a latent by the mean and scale of its concept: :math:`(z - \mu(\hat y)) / \sigma(\hat y)`.

    Both are linear in the concept before their constraint. Exact form: :math:`\log\sigma = b \tanh(r / b)` with
    :math:`r` linear, so that :math:`\sigma` is positive, and :math:`-\sum\log\sigma` is part of the log-determinant.
    Form of the release: :math:`\sigma = \sqrt{r^2 + 10^{-8}}` without log-determinant, which is not a density.

    Parameters
    ----------
    channels, d_concept : int
    exact : bool, default=True
    bound : float, default=3.0
        :math:`b`.
    """

    def __init__(self, channels: int, d_concept: int, *, exact: bool = True, bound: float = 3.0) -> None:
        super().__init__()
        self.exact = exact
        self.bound = bound
        self.mean = nn.Linear(d_concept, channels)
        self.scale = nn.Linear(d_concept, channels)
        if exact:
            # Every concept starts as the standard normal.
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
        else:
            nn.init.ones_(self.scale.bias)

    def moments(self, concept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and log-determinant per channel of each concept, all (N, channels)."""
        mean, raw = self.mean(concept), self.scale(concept)
        if not self.exact:
            return mean, (raw.square() + 1e-8).sqrt(), torch.zeros_like(raw)
        log_scale = self.bound * (raw / self.bound).tanh()
        return mean, log_scale.exp(), -log_scale

    def forward(self, z: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        """Standardise ``z`` (N, C, h, w); also returns the log-determinant, equal for all cells, (N,)."""
        mean, scale, log_det = (moment.to(z.dtype) for moment in self.moments(concept))
        return (z - mean[:, :, None, None]) / scale[:, :, None, None], log_det.sum(1)

    def inverse(self, z: Tensor, concept: Tensor) -> Tensor:
        """The latent that ``forward`` maps to ``z``."""
        mean, scale, _ = (moment.to(z.dtype) for moment in self.moments(concept))
        return z * scale[:, :, None, None] + mean[:, :, None, None]


class CrossScaleSubnet(nn.Module):
    """Log-scale and shift of every stage from the other half of all stages.

    Parameters
    ----------
    passive, active : sequence of int
        Channels of each stage in the passive half and in the half that is transformed.
    condition_channels : int
    hidden : int, optional
        Width at the coarsest grid; a quarter of the input's when left out.
    """

    def __init__(
        self,
        passive: Sequence[int],
        active: Sequence[int],
        condition_channels: int,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        total = sum(passive)
        hidden = (total + condition_channels) // 4 if hidden is None else hidden
        self.passive = list(passive)
        self.hidden = hidden
        self.conv1 = nn.Conv2d(total, hidden, 3, padding=1, bias=False)
        init_as_part(self.conv1.weight, total + condition_channels)
        self.norm = nn.LayerNorm(hidden)
        self.conv2 = nn.Conv2d(hidden, total, 3, padding=1)
        self.conv_s = nn.ModuleList(nn.Conv2d(p, a, 3, padding=1) for p, a in zip(passive, active))
        self.conv_t = nn.ModuleList(nn.Conv2d(p, a, 3, padding=1) for p, a in zip(passive, active))

    def forward(self, xs: Sequence[Tensor], projected: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From one half of every stage (N, C_k, h_k, w_k), log-scales (not yet clamped) and shifts."""
        grid = (projected.shape[2], projected.shape[3])
        pooled = torch.cat([F.adaptive_avg_pool2d(x, grid) for x in xs], 1)
        u = channel_norm(self.conv1(pooled) + projected, self.norm).relu_()
        shared = self.conv2(u).relu().split(self.passive, 1)
        log_scales, shifts = [], []
        for x, part, conv_s, conv_t in zip(xs, shared, self.conv_s, self.conv_t):
            seen = x + F.interpolate(part, size=x.shape[2:], mode="bilinear", align_corners=True)
            log_scales.append(conv_s(seen).to(x.dtype))
            shifts.append(conv_t(seen).to(x.dtype))
        return log_scales, shifts


class FusionFlow(nn.Module):
    r"""One coupling step, in two halves, over the latents of all stages jointly.

    A fixed random permutation of each stage's channels, then half 2 of all stages transforms half 1, then the
    new half 1 transforms half 2: :math:`x \mapsto x e^{s} + t`,
    :math:`s = 0.636\,\alpha \arctan(r / \alpha)`.

    Parameters
    ----------
    channels : sequence of int
        Of each stage, at least 2.
    condition_channels : int
    hidden : int, optional
        Width of the subnets; a quarter of their input's when left out.
    clamp : float, default=1.9
        :math:`\alpha`; log-scales stay below :math:`0.636\,\alpha\,\pi/2 \approx \alpha`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        condition_channels: int,
        *,
        hidden: int | None = None,
        clamp: float = 1.9,
    ) -> None:
        super().__init__()
        if min(channels) < 2:
            raise ValueError(f"the fusion splits every stage's channels: expected at least 2, got {channels}.")
        self.clamp = clamp
        self.first = [c // 2 for c in channels]
        self.second = [c - c // 2 for c in channels]
        for k, c in enumerate(channels):
            self.register_buffer(f"permutation_{k}", torch.randperm(c))
        self.subnet_1 = CrossScaleSubnet(self.first, self.second, condition_channels, hidden)
        self.subnet_2 = CrossScaleSubnet(self.second, self.first, condition_channels, hidden)
        self.project = ConditionProjection(
            condition_channels,
            [sum(self.first), sum(self.second)],
            [self.subnet_1.hidden, self.subnet_2.hidden],
        )

    def forward(self, xs: Sequence[Tensor], condition: Tensor) -> tuple[list[Tensor], Tensor]:
        """Transform.

        Parameters
        ----------
        xs : sequence of Tensor (N, C_k, h_k, w_k)
        condition : Tensor of shape (N, condition_channels, h, w)
            At the coarsest grid.

        Returns
        -------
        z : list of Tensor, shaped as ``xs``
        log_det : Tensor of shape (N,)
        """
        z, log_dets = self.transform(xs, self.project(condition))
        return z, torch.stack([log_det.flatten(1).sum(1) for log_det in log_dets]).sum(0)

    def inverse(self, z: Sequence[Tensor], condition: Tensor) -> list[Tensor]:
        """The ``xs`` that ``forward`` maps to ``z``."""
        return self.restore(z, self.project(condition))

    def transform(self, xs: Sequence[Tensor], projected: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``forward`` from the projected condition, with the log-determinant of each cell, (N, h_k, w_k)."""
        xs = [x[:, self.get_buffer(f"permutation_{k}")] for k, x in enumerate(xs)]
        first = [x[:, :n] for x, n in zip(xs, self.first)]
        second = [x[:, n:] for x, n in zip(xs, self.first)]
        s_1, t_1 = self._scale_and_shift(self.subnet_2, second, projected[1])
        first = [x * s.exp() + t for x, s, t in zip(first, s_1, t_1)]
        s_2, t_2 = self._scale_and_shift(self.subnet_1, first, projected[0])
        second = [x * s.exp() + t for x, s, t in zip(second, s_2, t_2)]
        z = [torch.cat(halves, 1) for halves in zip(first, second)]
        return z, [a.sum(1) + b.sum(1) for a, b in zip(s_1, s_2)]

    def restore(self, z: Sequence[Tensor], projected: Sequence[Tensor]) -> list[Tensor]:
        """``inverse`` from the projected condition."""
        first = [x[:, :n] for x, n in zip(z, self.first)]
        second = [x[:, n:] for x, n in zip(z, self.first)]
        s, t = self._scale_and_shift(self.subnet_1, first, projected[0])
        second = [(x - b) * (-a).exp() for x, a, b in zip(second, s, t)]
        s, t = self._scale_and_shift(self.subnet_2, second, projected[1])
        first = [(x - b) * (-a).exp() for x, a, b in zip(first, s, t)]
        xs = [torch.cat(halves, 1) for halves in zip(first, second)]
        return [x[:, self.get_buffer(f"permutation_{k}").argsort()] for k, x in enumerate(xs)]

    def _scale_and_shift(
        self, subnet: CrossScaleSubnet, xs: list[Tensor], projected: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        log_scales, shifts = subnet(xs, projected)
        return [0.636 * self.clamp * (s / self.clamp).atan() for s in log_scales], shifts
