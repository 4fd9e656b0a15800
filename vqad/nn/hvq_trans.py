"""HVQ-Trans: a transformer that reconstructs features from hierarchically quantised ones.

Lu et al., Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly Detection, NeurIPS 2023. The
decoder only sees codes of normal images, so it cannot reconstruct anomalies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fields import averaged, merge_maps
from .groups import Groups
from .hvq_trans_output import HVQTransOutput, Level
from .model import AnomalyModel, Batches, Term
from .quantize import SAMPLE_NUMBERS, VectorQuantizer
from .sample import CellSample, principal_directions
from .transformer import Decoder, Encoder, LearnedPosition
from .transport import KINDS, TransportKind, transport_cost


class HVQTrans(AnomalyModel):
    r"""Encoder, one codebook per level and category, decoder, one head per category.

    With tokens :math:`E_0` (1x1 convolution of the features), encoder states :math:`E_1 \dots E_n`, and
    :math:`VQ_{cj}` the quantiser of category c on level j:

    .. math:: q_n = VQ_{cn}(E_n), \quad q_j = VQ_{cj}([E_j ; q_n]) \; (j < n), \quad
              \hat f = W_c \, \mathrm{Decoder}(q_{n-1}; [q_{n-1}, \dots, q_0]) + b_c

    Parameters
    ----------
    in_channels : int
        Channels of the features (C).
    grid : (int, int)
        Rows and columns of the features (h, w).
    n_categories : int
    d_model : int, default=256
        Width of the encoder (d); the decoder is twice as wide.
    n_layers : int, default=4
        Layers of the encoder and of the decoder (n).
    n_heads : int, default=8
    dim_feedforward : int, default=1024
    dropout : float, default=0.1
    n_codes : int, default=512
        Codes per codebook (K).
    decay : float, default=0.99
        Decay of the codebooks' moving averages.
    commitment_weight : float, default=0.25
        Weight of the commitment in the loss.
    transport : {"conditional", "nearest", "sinkhorn", "exact"}, default="conditional"
        Cost of the transport terms, see :mod:`vqad.nn.transport`. The release uses "conditional".
    transport_weight : float, default=0.0
        Weight of the transport cost, averaged over cells and levels, in the loss. The release has no such term.
    revive_threshold : float, default=0.03
        See :class:`VectorQuantizer`; the release does not revive codes, as with 0.
    patch_size : int, default=1
        Cells along each side of the patch that forms a token. More than 1 gives finer maps at the same cost of
        attention. The release has 1.
    n_maps : int or None, default=None
        Number of the backbone's maps that are reconstructed, the first ones; None: all.
    """

    clip_norm = 0.1
    draws_apart = True

    def __init__(
        self,
        in_channels: int,
        grid: tuple[int, int],
        n_categories: int,
        *,
        d_model: int = 256,
        n_layers: int = 4,
        n_heads: int = 8,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        n_codes: int = 512,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        transport: TransportKind = "conditional",
        transport_weight: float = 0.0,
        revive_threshold: float = 0.03,
        patch_size: int = 1,
        n_maps: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or grid[0] % patch_size or grid[1] % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide the grid of {grid[0]} x {grid[1]} cells.")
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}.")
        if transport not in KINDS:
            raise ValueError(f"transport must be one of {', '.join(map(repr, KINDS))}; got {transport!r}.")
        if transport_weight and transport == "exact":
            raise ValueError("transport='exact' has no gradient; use 'sinkhorn' with a transport_weight.")
        self.in_channels = in_channels
        self.grid = (int(grid[0]), int(grid[1]))
        self.patch_size = patch_size
        self.n_maps = n_maps
        self.n_heads = n_heads
        self.dim_feedforward = dim_feedforward
        self.dropout = dropout
        self.n_codes = n_codes
        self.decay = decay
        self.revive_threshold = revive_threshold
        self.token_grid = (grid[0] // patch_size, grid[1] // patch_size)
        token_width = in_channels * patch_size**2
        self.d_model = d_model
        self.n_layers = n_layers
        self.commitment_weight = commitment_weight
        self.transport: TransportKind = transport
        self.transport_weight = transport_weight
        width = 2 * d_model
        self.input_projection = nn.Linear(token_width, d_model)
        self.position = LearnedPosition(self.token_grid, d_model)
        self.encoder = Encoder(n_layers, d_model, n_heads, dim_feedforward, dropout)
        self.codebook = nn.ModuleList(
            VectorQuantizer(
                n_codes,
                width if level < n_layers else d_model,
                n_groups=n_categories,
                decay=decay,
                revive_threshold=revive_threshold,
            )
            for level in range(n_layers + 1)
        )
        self.decoder = Decoder(n_layers, width, n_heads, dim_feedforward, dropout)
        self.output_projection = nn.ModuleList(nn.Linear(width, token_width) for _ in range(n_categories))

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return len(self.output_projection)

    @property
    def quantizers(self) -> list[VectorQuantizer]:
        """The quantisers of levels 0, 1, ..., n_layers."""
        return cast("list[VectorQuantizer]", list(self.codebook))

    def forward(self, features: Tensor, category: Tensor) -> HVQTransOutput:
        """Reconstruct the features.

        Parameters
        ----------
        features : Tensor of shape (N, C, h, w)
        category : Tensor of shape (N,), int64
        """
        cells = self._tokens(features)
        rebuilt, commitment, levels = self._forward(cells, self._groups(category, cells))
        return HVQTransOutput(self._untokenise(rebuilt), commitment, levels)

    def loss(self, features: Tensor, category: Tensor) -> Tensor:
        """Training loss, a scalar: squared error, commitment, and transport cost if it has a weight.

        Parameters
        ----------
        features : Tensor of shape (N, C, h, w)
        category : Tensor of shape (N,), int64
        """
        cells = self._tokens(features)
        groups = self._groups(category, cells)
        rebuilt, commitment, levels = self._forward(cells, groups)
        loss = F.mse_loss(rebuilt.to(cells.dtype), cells) + self.commitment_weight * commitment.mean()
        if self.transport_weight:
            codes = self._codes(groups, range(len(levels)))
            costs = [self._transport(level, codes[j]).mean() for j, level in enumerate(levels)]
            loss = loss + self.transport_weight * torch.stack(costs).mean()
        return loss

    @torch.no_grad()
    def anomaly_map(self, features: Tensor, category: Tensor, levels: Sequence[int] | None = None) -> dict[str, Tensor]:
        r"""Terms of the published anomaly map, each (N, h, w), higher = more anomalous.

        ``reconstruction`` is :math:`\|\hat f - f\|_2` over the channels; ``transport_J`` is the cost of transporting
        the cell's input of level J to the codes of its category. The release uses
        ``reconstruction + 80 * transport_0``.

        Parameters
        ----------
        features : Tensor of shape (N, C, h, w)
        category : Tensor of shape (N,), int64
        levels : sequence of int, optional
            Levels of the transport terms; all if left out.
        """
        error, costs = self._errors(features, category, range(self.n_layers + 1) if levels is None else levels)
        return {"reconstruction": torch.linalg.vector_norm(error, dim=1), **costs}

    @torch.no_grad()
    def deviations(self, features: Tensor, category: Tensor) -> dict[str, Tensor]:
        r"""The reconstruction error as vectors, and the transport costs; arguments as for :meth:`anomaly_map`.

        Returns
        -------
        dict of str to Tensor
            ``error``: :math:`\hat f - f`, averaged over 3 x 3 cells and then over the cells of each token, (N, C, rows,
            columns of tokens). Averaging cancels random errors and keeps errors that extend over several cells.
            ``transport_J``: as in :meth:`anomaly_map`.
        """
        error, costs = self._errors(features, category, range(self.n_layers + 1))
        # A CPU averages channels last ten times faster.
        smooth = averaged(error.contiguous(memory_format=torch.channels_last))
        return {"error": smooth if self.patch_size == 1 else F.avg_pool2d(smooth, self.patch_size), **costs}

    def _errors(self, features: Tensor, category: Tensor, levels: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction error, (N, C, h, w), and the transport costs on the grid of the features."""
        cells = self._tokens(features)
        groups = self._groups(category, cells)
        codes = self._codes(groups, levels)
        rebuilt, _, passed = self._forward(cells, groups, learns=False)
        costs = {}
        for j in levels:
            cost = self._transport(passed[j], codes[j]).view(-1, *self.token_grid)
            costs[f"transport_{j}"] = F.interpolate(cost[:, None], self.grid, mode="bilinear")[:, 0]
        return self._untokenise(rebuilt.to(cells.dtype) - cells), costs

    @torch.no_grad()
    def look_up(self, features: Tensor, category: Tensor) -> tuple[Level, ...]:
        """Quantise the tokens on levels 0, 1, ..., n_layers, without decoding.

        Parameters
        ----------
        features : Tensor of shape (N, C, h, w)
        category : Tensor of shape (N,), int64
        """
        states = self.encoder(self.input_projection(self._tokens(features)), self.position())
        return self._quantise(states, self._groups(category, states[0]), learns=False)[0]

    @torch.no_grad()
    def initialise_projection(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Initialise the input projection with the principal components of the tokens, scaled to mean variance 1.

        So distances between tokens, which decide on their codes, are meaningful from the first step. If tokens have
        fewer channels than the model's width, the remaining rows keep their random initialisation. If tokens are many
        and wide, a random subset is used.

        Parameters
        ----------
        batches : sequence of (features (N, C, h, w), category (N,))
        """
        tokens = (self._tokens(features).flatten(0, 1) for features, _ in batches)
        mean, values, vectors = principal_directions(tokens, len(batches))
        k = min(self.d_model, len(mean))
        components = vectors[:, -k:].mT.flip(0) / values[-k:].mean().clamp_min(1e-12).sqrt()
        self.input_projection.weight[:k] = components.to(self.input_projection.weight)
        self.input_projection.bias[:k] = -(components @ mean).to(self.input_projection.bias)

    @torch.no_grad()
    def initialise_codes(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        generator: torch.Generator | None = None,
        max_vectors: int | None = None,
    ) -> None:
        """Initialise the codebooks of the categories in ``batches`` from the encoder's outputs.

        The top level comes first, because the levels below quantise its codes together with their own states. The
        codebooks of other categories do not change.

        Parameters
        ----------
        batches : iterable of (features (N, C, h, w), category (N,))
            Iterated twice: a list or a data loader, not a generator.
        generator : torch.Generator, optional
            CPU generator; torch's default generator if left out.
        max_vectors : int, optional
            Largest number of cells of a category in use, a random subset; 16 per code if left out, and fewer if these
            would need too much memory.
        """
        if iter(batches) is batches:
            raise TypeError("batches is iterated twice: pass a list or a data loader, not an iterator.")
        d, n, cells = self.d_model, self.n_layers, self.token_grid[0] * self.token_grid[1]
        n_codes = self.n_codes
        room = SAMPLE_NUMBERS // (self.n_categories * (n + 1) * d)
        limit = max_vectors or max(2 * n_codes, min(16 * n_codes, room))
        training = self.training
        self.eval()
        try:
            for c, vectors in self._sample(batches, True, limit, generator):
                self.quantizers[n].initialise(vectors, c, generator=generator, max_vectors=limit, update_size=cells)
            for c, vectors in self._sample(batches, False, limit, generator):
                *states, top = torch.split(vectors, d, -1)
                for quantizer, state in zip(self.quantizers, states):
                    joined = torch.cat([state, top], -1)
                    quantizer.initialise(joined, c, generator=generator, max_vectors=limit, update_size=cells)
        finally:
            self.train(training)

    def _sample(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        top: bool,
        limit: int,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each category (1,) the vectors of random cells (1, V, ·): E_n, or [E_0; ...; E_{n-1}; q_n]."""
        n, sample = self.n_layers, CellSample(limit, generator)
        for features, category in batches:
            *states, last = self.encoder(self.input_projection(self._tokens(features)), self.position())
            if top:
                sample.add(last, category)
            else:
                sample.add(torch.cat([*states, self.quantizers[n](last, category).quantized], -1), category)
        return sample.drawn()

    # ---------------------------------------------------------------- as an AnomalyModel

    def arrange(self, maps: Sequence[Tensor]) -> Tensor:
        """The maps that are reconstructed, concatenated on one grid, (N, C, h, w)."""
        return maps[0] if len(maps) == 1 else merge_maps(list(maps[: self.n_maps]), self.grid)

    def fields(self, features: Tensor, category: Tensor, gaussian: bool) -> dict[str, Tensor]:
        """The reconstruction error, as vectors or as their lengths, and the transport costs."""
        return self.deviations(features, category) if gaussian else self.anomaly_map(features, category)

    def terms(self, gaussian: bool) -> tuple[list[Term], float | None]:
        """Error and transport with ``gaussian``; otherwise reconstruction and transport with half the weight each.

        With ``gaussian`` the transport only enters the map, where it outlines missing parts (docs/choices.md).
        """
        levels = range(self.n_layers + 1)
        transport = [Term(f"transport_{j}", 1.0 / len(levels), (), is_trained=True) for j in levels]
        if gaussian:
            return [Term("error", 1.0, (0.0,), is_trained=True), *transport], None
        return [Term("reconstruction", 1.0, (), is_trained=True), *transport], 0.01

    def codebooks(self) -> dict[str, VectorQuantizer]:
        """The codebooks by the names "level_0", "level_1", ..."""
        return {f"level_{j}": quantizer for j, quantizer in enumerate(self.quantizers)}

    def codes(self, features: Tensor, category: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For each level, the codes of the tokens and their distances."""
        found = {}
        for j, level in enumerate(self.look_up(features, category)):
            distance = (level.input.float() - level.quantized.float()).norm(dim=-1)
            index, away = (cells.view(-1, *self.token_grid) for cells in (level.indices, distance))
            found[f"level_{j}"] = index, away
        return found

    def start(self, batches: Batches) -> None:
        """Initialise the projection and the codes."""
        self.initialise_projection(batches)
        self.initialise_codes(batches)

    def extend(self, n: int, batches: Batches) -> None:
        """Initialise codes of new categories from data, and their heads with the mean of the known heads."""
        known = cast("list[nn.Linear]", list(self.output_projection))
        for _ in range(n):
            new = cast(nn.Linear, self.output_projection[self.add_category()])
            with torch.no_grad():
                new.weight.copy_(torch.stack([head.weight for head in known]).mean(0))
                new.bias.copy_(torch.stack([head.bias for head in known]).mean(0))
        self.initialise_codes(batches)

    def parts_of(self, categories: Sequence[int]) -> list[nn.Module]:
        """All codebooks, each of which learns only from images of its own category, and the categories' heads."""
        return [*self.codebook, *(self.output_projection[c] for c in categories)]

    def check_export(self) -> None:
        """Raise for transport plans that are solved per image."""
        if self.transport in ("sinkhorn", "exact"):
            raise ValueError(
                f"transport={self.transport!r} cannot be exported because it solves for a plan per image: fit with "
                "transport='nearest' or 'conditional'."
            )

    def add_category(self) -> int:
        """Append a head and codebooks for another category; returns its number.

        Everything else keeps every bit. Initialise the new codebooks with :meth:`initialise_codes`.
        """
        old = cast(Tensor, self.output_projection[0].weight)
        token_width = self.in_channels * self.patch_size**2
        self.output_projection.append(nn.Linear(2 * self.d_model, token_width).to(old.device, old.dtype))
        for quantizer in self.quantizers:
            quantizer.add_groups(1)
        return self.n_categories - 1

    def _tokens(self, features: Tensor) -> Tensor:
        """From (N, C, h, w) to one vector per token, (N, L, C * patch_size²), row by row."""
        folded = features if self.patch_size == 1 else F.pixel_unshuffle(features, self.patch_size)
        return folded.flatten(2).mT.contiguous()

    def _untokenise(self, cells: Tensor) -> Tensor:
        """The inverse of `_tokens`."""
        maps = cells.mT.reshape(len(cells), -1, *self.token_grid)
        return maps if self.patch_size == 1 else F.pixel_shuffle(maps, self.patch_size)

    def _groups(self, category: Tensor, x: Tensor) -> Groups:
        return Groups.of(category, self.n_categories, x.device)

    def _forward(self, cells: Tensor, groups: Groups, learns: bool = True) -> tuple[Tensor, Tensor, tuple[Level, ...]]:
        """From (N, L, C) to the reconstruction (N, L, C), the commitment (N,) and the levels.

        Without ``learns``, codes are only looked up: no updates, no gradients, a commitment of 0.
        """
        position = self.position()
        levels, commitment = self._quantise(self.encoder(self.input_projection(cells), position), groups, learns)
        memories = [level.quantized for level in reversed(levels[:-1])]
        decoded = self.decoder(memories, torch.cat([position, position], 1))
        return self._head(decoded, groups), commitment, levels

    def _quantise(self, states: list[Tensor], groups: Groups, learns: bool = True) -> tuple[tuple[Level, ...], Tensor]:
        *below, last = self.quantizers
        commitment = states[0].new_zeros(len(states[0]), dtype=torch.promote_types(states[0].dtype, torch.float32))

        def quantise(quantizer: VectorQuantizer, x: Tensor) -> Level:
            nonlocal commitment
            if not learns:
                return Level(x, *quantizer.look_up(x, groups))
            quantized, indices, loss = quantizer(x, groups)
            commitment = commitment + loss
            return Level(x, quantized, indices)

        top = quantise(last, states[-1])
        levels = [quantise(q, torch.cat([state, top.quantized], -1)) for q, state in zip(below, states)]
        return (*levels, top), commitment

    def _head(self, decoded: Tensor, groups: Groups) -> Tensor:
        """Apply to each image the head of its category; other heads are not part of the autograd graph."""
        heads = [cast(nn.Linear, self.output_projection[c]) for c in groups.numbers]
        if len(heads) == 1:
            return cast(Tensor, heads[0](decoded))
        if decoded.device.type == "cpu" and not torch.compiler.is_exporting():
            order, place = groups.sorted_images()
            parts = torch.split(decoded.index_select(0, order), groups.counts)
            return torch.cat([head(part) for head, part in zip(heads, parts)]).index_select(0, place)
        # One product for all images: few kernels matter more here than copying weights.
        weight = torch.stack([head.weight for head in heads])[groups.row]
        bias = torch.stack([head.bias for head in heads])[groups.row]
        return decoded @ weight.mT + bias[:, None]

    def _codes(self, groups: Groups, levels: Iterable[int]) -> dict[int, tuple[Tensor, Tensor] | None]:
        """Codes and their shares for each image on the given levels; None if the look-up itself is the plan."""
        if self.transport == "nearest":
            return dict.fromkeys(levels)
        quantizers = self.quantizers
        return {j: (quantizers[j].codes(groups), quantizers[j].weights(groups)) for j in levels}

    def _transport(self, level: Level, codes: tuple[Tensor, Tensor] | None) -> Tensor:
        # A cost is a small difference of large numbers: never in half precision.
        z = level.input.to(torch.promote_types(level.input.dtype, torch.float32))
        if codes is None:
            return (z - level.quantized.detach()).square().sum(-1)
        with torch.autocast(z.device.type, enabled=False):
            return transport_cost(self.transport, z, codes[0].to(z.dtype), codes[1])
