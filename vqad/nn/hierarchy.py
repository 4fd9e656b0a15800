"""The hierarchy of codes of VQ-Flow: one concept per image, one pattern per cell of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqad.nn.condition import Condition
from vqad.nn.groups import Groups
from vqad.nn.quantize import SAMPLE_NUMBERS, Quantized, VectorQuantizer
from vqad.nn.ranks import BatchNorm1d, is_shared


def positional_encoding(width: int, h: int, w: int) -> Tensor:
    """Fixed 2-D sinusoidal encoding, (width, h, w) float64: first half by column, second half by row.

    In each half sine and cosine alternate, at frequencies from 1 to 1/10000.
    """
    half = width // 2
    frequency = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(1e4) / half))

    def along(n: int) -> Tensor:
        angle = frequency[:, None] * torch.arange(n, dtype=torch.float64)
        return torch.stack([angle.sin(), angle.cos()], 1).flatten(0, 1)

    x, y = along(w)[:, None, :].expand(-1, h, -1), along(h)[:, :, None].expand(-1, -1, w)
    return torch.cat([x, y])


@lru_cache(maxsize=32)
def _position_on(device: torch.device, dtype: torch.dtype, width: int, h: int, w: int) -> Tensor:
    """A positional encoding that stays on its device."""
    with torch.inference_mode(False):
        return positional_encoding(width, h, w).to(device, dtype)


@dataclass(frozen=True)
class Codes:
    """The codes of a batch of images.

    Attributes
    ----------
    concept : Tensor of shape (N, d_concept)
        ŷ, with straight-through gradients to its encoder.
    concept_index : Tensor of shape (N,), int64
        Number of its code, counted over groups: ``group * n_concepts + code``.
    concept_distance : Tensor of shape (N,)
        Mean squared difference between the encoded concept and its code.
    conditions : list of 4 Condition
        Patterns and concept of each stage.
    commitment : Tensor, scalar
        Sum of the commitment of the concept and of the four stages' patterns, averaged over images.
    groups : Groups
        The group of each image.
    """

    concept: Tensor
    concept_index: Tensor
    concept_distance: Tensor
    conditions: list[Condition]
    commitment: Tensor
    groups: Groups

    def of_group(self, number: int, images: Tensor) -> Codes:
        """The codes of the ``images`` (n,), which are all images of one group; the commitment is that of the batch."""
        own = {name: getattr(self, name)[images] for name in ("concept", "concept_index", "concept_distance")}
        groups = Groups.of(torch.full((len(images),), number), number + 1, images.device)
        place = self.groups.numbers.index(number)
        conditions = [condition.of_group(place, len(self.groups.numbers), images) for condition in self.conditions]
        return replace(self, **own, conditions=conditions, groups=groups)


class CodeHierarchy(nn.Module):
    r"""Encoders and codebooks of the concept and of the four stages' patterns.

    .. math::

        \hat y &= \mathrm{VQ}(\mathrm{MLP}(\text{average of } h_4)), \qquad b = [\text{position} ; \hat y] \\
        g_k &= \mathrm{MLP}_k(h_k) + \mathrm{Up}_k(\mathrm{proj}(h_4)) \quad (k \le 3), \qquad
        g_4 = \mathrm{MLP}_4(h_4) \\
        \text{pattern}_k &= b + \mathrm{VQ}_k(g_k - b)

    There is one group of codebooks, and one more for each call of :meth:`add_group`.

    Parameters
    ----------
    channels : sequence of 4 int
    n_concepts, n_patterns : int
        Codes of a group in the concept codebook, and in each stage's pattern codebook.
    d_concept, d_position : int
        Width of a concept, and of the positional encoding (a multiple of 4). A pattern has both.
    revive_threshold : float
        See :class:`VectorQuantizer`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        n_concepts: int,
        n_patterns: int,
        d_concept: int,
        d_position: int,
        revive_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if d_position % 4:
            raise ValueError(
                f"d_position: expected a multiple of 4 (sine and cosine of row and column), got {d_position}."
            )
        self.d_position = d_position
        d_pattern, top = d_position + d_concept, channels[3]
        self.concept_encoder = nn.Sequential(*_linear(top, d_concept), *_linear(d_concept, d_concept))
        # 1×1 convolutions, as linear layers over the cells.
        self.top_projection = nn.Sequential(*_linear(top, d_pattern))
        self.upsampler = nn.ModuleList(nn.Linear(d_pattern, d_pattern) for _ in range(3))
        self.pattern_encoder = nn.ModuleList(
            nn.Sequential(*_linear(c, d_pattern), *_linear(d_pattern, d_pattern)) for c in channels
        )
        self.concept_codebook = VectorQuantizer(n_concepts, d_concept, revive_threshold=revive_threshold)
        self.pattern_codebook = nn.ModuleList(
            VectorQuantizer(n_patterns, d_pattern, revive_threshold=revive_threshold) for _ in channels
        )

    def forward(self, stages: Sequence[Tensor], group: Tensor | None = None) -> Codes:
        """Encode and quantise the four pooled stages, (N, C_k, h_k, w_k), each image with the codes of its group."""
        encoded = self._encode_concept(stages[3])
        groups = self.concept_codebook.groups(group, encoded)
        concept, index, loss = _quantise(self.concept_codebook, encoded[:, None], groups)
        concept, commitment = concept[:, 0], loss.mean()
        distance = (concept - encoded).detach().square().mean(1)
        conditions = []
        for quantizer, g in zip(self._pattern_codebooks(), self._encode_patterns(stages)):
            n, d, h, w = g.shape
            position = self._position(h, w, concept)
            tokens = _residual(g.permute(0, 2, 3, 1), position.permute(1, 2, 0), concept[:, None, None])
            code, of_cell, loss = _quantise(quantizer, tokens.flatten(1, 2), groups)
            commitment = commitment + loss.mean()
            conditions.append(
                Condition(
                    pattern=code.view(n, h, w, d).permute(0, 3, 1, 2),
                    index=(of_cell + groups.row[:, None] * quantizer.n_codes).view(n, h, w),
                    encoded=tokens.detach().permute(0, 3, 1, 2),
                    codes=quantizer.books(groups).flatten(0, 1),
                    position=position,
                    concept=concept,
                )
            )
        of_concept = index[:, 0] + groups.of_image * self.concept_codebook.n_codes
        return Codes(concept, of_concept, distance, conditions, commitment, groups)

    def concept(self, top: Tensor, group: Tensor | None = None) -> Tensor:
        """Number of each image's concept code (N,) from its coarsest stage (N, C_4, h, w)."""
        encoded = self._encode_concept(top)[:, None]
        groups = self.concept_codebook.groups(group, encoded)
        return self.concept_codebook.nearest(encoded, groups)[:, 0] + groups.of_image * self.concept_codebook.n_codes

    def add_group(self) -> None:
        """Append a group of codebooks, to be initialised by :meth:`initialise`; the others keep every bit."""
        for quantizer in self.codebooks():
            quantizer.add_groups(1)

    def codebooks(self) -> list[VectorQuantizer]:
        """The concept codebook and each stage's pattern codebook."""
        return [self.concept_codebook, *self._pattern_codebooks()]

    def perplexity(self) -> dict[str, Tensor]:
        """Effective number of codes in use by the first group, for concepts and for the patterns of each stage."""
        of_patterns = {f"pattern_{k}": q.perplexity()[0] for k, q in enumerate(self._pattern_codebooks(), 1)}
        return {"concept": self.concept_codebook.perplexity()[0], **of_patterns}

    def _pattern_codebooks(self) -> list[VectorQuantizer]:
        return [quantizer for quantizer in self.pattern_codebook if isinstance(quantizer, VectorQuantizer)]

    def _position(self, h: int, w: int, like: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return positional_encoding(self.d_position, h, w).to(like)
        return _position_on(like.device, like.dtype, self.d_position, h, w)

    def _encode_concept(self, top: Tensor) -> Tensor:
        return _encode(self.concept_encoder, top.mean((2, 3)))

    def _encode_patterns(self, stages: Sequence[Tensor]) -> list[Tensor]:
        cells = [x.permute(0, 2, 3, 1) for x in stages]
        top = _encode(self.top_projection, cells[3].flatten(0, 2)).view(*cells[3].shape[:3], -1)
        encoded = []
        for k, (encoder, x) in enumerate(zip(self.pattern_encoder, cells)):
            g = _encode(encoder, x.flatten(0, 2)).view(*x.shape[:3], -1).permute(0, 3, 1, 2)
            if k < 3:
                # Upsampling, then a 1×1 convolution, in the cheaper order: bilinear weights add up to one.
                part = self.upsampler[k](top).permute(0, 3, 1, 2)
                if part.shape[2:] != g.shape[2:]:
                    part = F.interpolate(part, size=g.shape[2:], mode="bilinear", align_corners=False)
                g = g + part
            encoded.append(g)
        return encoded

    @torch.no_grad()
    def initialise(
        self,
        batches: Iterable[tuple[Sequence[Tensor], Tensor | None]],
        *,
        generator: torch.Generator | None = None,
        cells_per_image: int = 64,
    ) -> None:
        """Initialise the codebooks of the groups in ``batches`` from the encoders' outputs.

        For the first group the encoders normalise by batch statistics, as in the first training step, and keep their
        running statistics. For added groups, whose encoders are frozen, they use the running statistics.

        Parameters
        ----------
        batches : iterable of (stages, group)
            Four Tensor (N, C_k, h_k, w_k), and the group of each image (N,); None is the first group. Read once.
        generator : torch.Generator, optional
            CPU generator; torch's default generator if left out.
        cells_per_image : int, default=64
            Number of cells drawn from each image and stage; fewer, down to one, if all together would exceed 1 GiB.
        """
        concepts: list[Tensor] = []
        groups: list[Tensor] = []
        tokens: list[list[Tensor]] = [[] for _ in self.pattern_codebook]
        positions: list[list[Tensor]] = [[] for _ in self.pattern_codebook]
        cells: list[int] = [0 for _ in self.pattern_codebook]
        n_batches = 0
        with _statistics(self, of_batch=self.concept_codebook.n_groups == 1):
            for stages, group in batches:
                n_batches += 1
                concepts.append(self._encode_concept(stages[3]))
                groups.append(concepts[-1].new_zeros(len(concepts[-1])).long() if group is None else group)
                for k, g in enumerate(self._encode_patterns(stages)):
                    n, _, h, w = g.shape
                    drawn = [torch.randperm(h * w, generator=generator)[:cells_per_image] for _ in range(n)]
                    cell = torch.stack(drawn).to(g.device)
                    grid = self._position(h, w, g).flatten(1).mT
                    tokens[k].append(g.permute(0, 2, 3, 1).flatten(1, 2).take_along_dim(cell[..., None], 1))
                    positions[k].append(grid[cell])
                    cells[k] += n * h * w
                if cells_per_image > 1 and sum(t.numel() for of_stage in tokens for t in of_stage) > SAMPLE_NUMBERS:
                    cells_per_image //= 2  # the first of those drawn are a draw too
                    for kept in (*tokens, *positions):
                        kept[:] = [t[:, :cells_per_image].clone() for t in kept]
        if not n_batches:
            raise ValueError("codes are initialised from features: expected at least one batch, got none.")
        encoded, of_image = torch.cat(concepts)[:, None], torch.cat(groups).to(concepts[0].device)
        for g in torch.unique(of_image).tolist():
            rows = of_image == g
            share, group, own = float(rows.float().mean()), of_image[rows], encoded[rows]
            self.concept_codebook.initialise(own, group, generator=generator, update_size=len(own) / n_batches)
            concept = F.embedding(self.concept_codebook.nearest(own, group), self.concept_codebook.embed[g])
            for k, quantizer in enumerate(self._pattern_codebooks()):
                residual = _residual(torch.cat(tokens[k])[rows], torch.cat(positions[k])[rows], concept)
                quantizer.initialise(residual, group, generator=generator, update_size=share * cells[k] / n_batches)


def _linear(width_in: int, width: int) -> list[nn.Module]:
    return [nn.Linear(width_in, width), BatchNorm1d(width), nn.ReLU(inplace=True)]


def _encode(encoder: nn.Module, rows: Tensor) -> Tensor:
    """Encode (n, D) rows; a single row, which has no batch statistics, with the running ones."""
    if len(rows) > 1 or is_shared():
        encoded: Tensor = encoder(rows)
        return encoded
    for layer in encoder.children():
        if isinstance(layer, nn.BatchNorm1d):
            rows = F.batch_norm(rows, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        else:
            rows = layer(rows)
    return rows


def _residual(tokens: Tensor, position: Tensor, concept: Tensor) -> Tensor:
    """Tokens minus base = [position ; ŷ], along the last axis."""
    d_position = position.shape[-1]
    return torch.cat([tokens[..., :d_position] - position, tokens[..., d_position:] - concept], -1)


def _quantise(quantizer: VectorQuantizer, x: Tensor, groups: Groups) -> Quantized:
    """Quantise in full precision: rounding would change which code is nearest."""
    with torch.autocast(x.device.type, enabled=False):
        quantized: Quantized = quantizer(x.to(quantizer.embed.dtype), groups)
    return quantized


@contextmanager
def _statistics(module: nn.Module, of_batch: bool) -> Iterator[None]:
    """Make batch norms use batch statistics or running ones, without updating the latter."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    before = [(m.training, m.track_running_stats) for m in norms]
    try:
        for m in norms:
            m.training, m.track_running_stats = of_batch, not of_batch
        yield
    finally:
        for m, (training, track) in zip(norms, before):
            m.training, m.track_running_stats = training, track
