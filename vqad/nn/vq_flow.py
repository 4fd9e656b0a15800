r"""VQ-Flow: normalizing flows on feature maps, conditioned on a hierarchy of vector-quantised codes.

A concept code says what kind of object an image shows; pattern codes say what each of its cells should look
like. A flow for each stage, followed by one over all stages, gives the likelihood of the features given both.
It needs no labels.

References
----------
Zhou, Xu, Sun, Song, Cichocki, Shen: VQ-Flow: Taming Normalizing Flows for Multi-Class Anomaly Detection via
Hierarchical Vector Quantization, arXiv 2409.00942.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flow import ConditionalFlow, FusionFlow, MixtureComponent
from .hierarchy import CodeHierarchy, Codes
from .model import AnomalyModel, Batches, Term
from .noise import GaussianNoise
from .quantize import VectorQuantizer
from .stages import pooled_stages
from .vq_flow_output import Latents, VQFlowOutput, resize

_ADDED_BLOCKS = 2  # of an added category's own flow in each stage


class VQFlow(AnomalyModel):
    r"""Density of a frozen backbone's features, conditioned on codes quantised from the same features.

    .. math::

        \log p(h_1, h_2, h_3 \mid \text{codes}) = \sum_k -\tfrac12 \|z_k\|^2 - \tfrac{D_k}{2} \log 2\pi
        + \log|\det \partial z / \partial h|

    The loss is minus that plus the commitment of the encoders to their codes. The defaults are the published
    sizes.

    Parameters
    ----------
    channels : sequence of 4 int
        Channels of the stages :math:`h_1, \dots, h_4`, from the finest. Flows run on the first three.
    n_concepts, n_patterns : int
        Codes in the concept codebook, and in each of the four stages' pattern codebooks.
    d_concept, d_position : int
        Width of a concept, and of the positional encoding (a multiple of 4). A pattern has both.
    n_blocks : sequence of 3 int
        Coupling blocks of each stage's flow.
    hidden : int, optional
        Width of the coupling subnets; default: the width of their input, as published.
    clamp : float
        Largest log-scale of a coupling.
    likelihood : {"exact", "release"}
        Whether the log-determinant includes :math:`-\sum \log\sigma(\hat y)`. The public release leaves it out;
        its loss is a sum over the dimensions of an image, whereas ours is their mean, in nats per dimension.
    commitment_weight : float
    revive_threshold : float
        See :class:`vqad.nn.quantize.VectorQuantizer`. The release does not revive codes, which is 0.
    condition_path : {"table", "convolution"}
        How the condition reaches the subnets: looked up by code, or written out and convolved, for comparison.
    noise : float
        Standard deviation of the noise that training adds to each value of the pooled stages, see
        :class:`vqad.nn.noise.GaussianNoise`. The release adds none, which is 0.
    n_shared : int
        Number of categories, numbered from 0, that share all parameters.
    n_added : int
        Number of further categories with parameters of their own, see :meth:`add_category`.
    top_grid : (int, int), optional
        Grid to which the backbone's fourth map is resized; default: its own.
    """

    clip_norm = 2.0
    draws_apart = True

    def __init__(
        self,
        channels: Sequence[int],
        *,
        n_concepts: int = 32,
        n_patterns: int = 512,
        d_concept: int = 512,
        d_position: int = 64,
        n_blocks: Sequence[int] = (2, 5, 8),
        hidden: int | None = None,
        clamp: float = 1.9,
        likelihood: Literal["exact", "release"] = "exact",
        commitment_weight: float = 1.0,
        revive_threshold: float = 0.03,
        condition_path: Literal["table", "convolution"] = "table",
        noise: float = 0.0,
        n_shared: int = 1,
        n_added: int = 0,
        top_grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or len(n_blocks) != 3:
            raise ValueError(
                "VQ-Flow reads four stages and has flows on the first three: expected 4 channels and "
                f"3 n_blocks, got channels={tuple(channels)} and n_blocks={tuple(n_blocks)}."
            )
        self.channels = tuple(channels)
        self.likelihood = likelihood
        self.commitment_weight = commitment_weight
        self.condition_path = condition_path
        self.n_concepts, self.n_patterns = n_concepts, n_patterns
        self.d_concept, self.d_position = d_concept, d_position
        self.n_blocks = tuple(n_blocks)
        self.hidden = hidden
        self.clamp = clamp
        self.revive_threshold = revive_threshold
        self.n_shared = n_shared
        self.top_grid = None if top_grid is None else tuple(top_grid)
        self.noisy = GaussianNoise(noise)
        self.hierarchy = CodeHierarchy(
            channels,
            n_concepts=n_concepts,
            n_patterns=n_patterns,
            d_concept=d_concept,
            d_position=d_position,
            revive_threshold=revive_threshold,
        )
        width, exact = d_position + 2 * d_concept, likelihood == "exact"
        self.scale_flow = nn.ModuleList(
            ConditionalFlow(c, width, n, hidden=hidden, clamp=clamp) for c, n in zip(channels, n_blocks)
        )
        self.mixture = nn.ModuleList(MixtureComponent(c, d_concept, exact=exact) for c in channels[:3])
        self.added_flow, self.added_mixture = nn.ModuleList(), nn.ModuleList()
        self.fusion = FusionFlow(channels[:3], width, clamp=clamp)
        self._tables: dict[tuple[int, ...], Tensor] | None = None
        for _ in range(n_added):
            self.add_category()

    # ---- called by the modules above nn/

    def loss(self, features: Sequence[Tensor] | Tensor, category: Tensor | None = None) -> Tensor:
        """Minus the log-likelihood plus the commitment, a scalar.

        Parameters
        ----------
        features : sequence of 4 Tensor (N, C_k, H_k, W_k)
            The backbone's stages, from the finest, before any pooling.
        category : Tensor of shape (N,), int64, optional
            Category of each image; needed only when categories were added.
        """
        output: VQFlowOutput = self(features, category)
        return output.loss

    def anomaly_map(self, features: Sequence[Tensor] | Tensor, category: Tensor | None = None) -> dict[str, Tensor]:
        r"""Terms of the likelihood of every cell, higher = more anomalous; arguments as for :meth:`loss`.

        Returns
        -------
        dict of str to Tensor (N, h_k, w_k), for k = 1, 2, 3, each on its own stage's grid
            ``"log_likelihood_k"``: :math:`\frac{1}{2 C_k} \sum_c z_k^2`, the term of the published maps.
            ``"volume_k"``: :math:`-\frac{1}{C_k} \log|\det|` of the cell. The sum of the two and
            :math:`\frac12 \log 2\pi` is minus the exact log-density in nats per channel: summed over
            channels, cells and stages, minus :attr:`Latents.log_prob`.
        """
        output: VQFlowOutput = self(features, category)
        latents = output.latents
        terms = {f"log_likelihood_{k}": 0.5 * z.square().mean(1) for k, z in enumerate(latents.z, 1)}
        for k, (log_det, c) in enumerate(zip(latents.log_det_cells, self.channels), 1):
            terms[f"volume_{k}"] = -log_det / c
        return terms

    def initialise_codes(
        self,
        batches: Iterable[tuple[Sequence[Tensor] | Tensor, Tensor | None]],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise the codebooks from encoded features, by k-means++.

        Parameters
        ----------
        batches : iterable of (features, category)
            As for :meth:`loss`, of normal images, two or more in a batch. Read once. Only the codebooks of the
            categories that occur are initialised.
        generator : torch.Generator, optional
            CPU generator of all draws; torch's default generator when left out.
        """
        pooled = ((self.pool(features), self._group(category)) for features, category in batches)
        self.hierarchy.initialise(pooled, generator=generator)

    @torch.no_grad()
    def settle(self, batches: Iterable[tuple[Sequence[Tensor] | Tensor, Tensor | None]]) -> None:
        """Replace every concept code that no image of ``batches`` uses by the nearest one in use.

        Call it after training, with the training images. The flows never saw an unused concept: the likelihood of a
        new image assigned to one would mean nothing.

        Parameters
        ----------
        batches : iterable of (features, category)
            As for :meth:`loss`.
        """
        used = torch.unique(torch.cat([self.concept(features, category) for features, category in batches]))
        codebook = self.hierarchy.concept_codebook
        for g in torch.unique(used // codebook.n_codes).tolist():
            codes, own = codebook.embed[g], used[used // codebook.n_codes == g] % codebook.n_codes
            kept = codes[own]
            nearest = kept[torch.cdist(codes, kept).argmin(1)]
            nearest[own] = kept
            codebook.embed[g] = nearest

    def add_category(self) -> int:
        """Add a category with parameters of its own and return its number.

        It gets codebooks, to be initialised by :meth:`initialise_codes`, and for each stage a mixture component and a
        short flow on the latents of the shared flow. All existing parameters keep every bit.
        """
        self.hierarchy.add_group()
        like = self.hierarchy.concept_codebook.embed
        width, exact = self.fusion.project.weight.shape[1], self.likelihood == "exact"
        flows = [
            ConditionalFlow(c, width, _ADDED_BLOCKS, hidden=self.hidden, clamp=self.clamp) for c in self.channels[:3]
        ]
        mixtures = [MixtureComponent(c, like.shape[2], exact=exact) for c in self.channels[:3]]
        self.added_flow.append(nn.ModuleList(flows).to(like.device, like.dtype))
        self.added_mixture.append(nn.ModuleList(mixtures).to(like.device, like.dtype))
        return self.n_categories - 1

    @property
    def noise(self) -> float:
        """Standard deviation of the noise."""
        return self.noisy.std

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return self.n_shared + self.n_added

    @property
    def n_added(self) -> int:
        """Number of added categories."""
        return len(self.added_mixture)

    # ---- as an AnomalyModel

    def arrange(self, maps: Sequence[Tensor]) -> Sequence[Tensor] | Tensor:
        """Four stages; the fourth, from which the concept is read, is resized to ``top_grid`` if one is set."""
        if len(maps) == 1:
            return maps[0]
        *flowing, top = maps[:4]
        if self.top_grid is not None and tuple(top.shape[2:]) != self.top_grid:
            top = F.interpolate(top, self.top_grid, mode="bilinear", align_corners=False)
        return [*flowing, top]

    def fields(self, features: Sequence[Tensor] | Tensor, category: Tensor, gaussian: bool) -> dict[str, Tensor]:
        """Latents of the coarsest flow, the most stable with few images; or the published terms."""
        if gaussian:
            return {"latent": self(features, category).latents.z[-1]}
        raw = self.anomaly_map(features, category)
        grid = cast("tuple[int, int]", tuple(raw["log_likelihood_1"].shape[1:]))
        return {f"log_likelihood_{k}": resize(raw[f"log_likelihood_{k}"].float(), grid) for k in (1, 2, 3)}

    def terms(self, gaussian: bool) -> tuple[list[Term], float | None]:
        """Latents beside the features; or the likelihoods of the three stages."""
        if gaussian:
            return [Term("latent", 1.0, (0.0,), is_trained=True)], None
        return [Term(f"log_likelihood_{k}", 1.0, (), is_trained=True) for k in (1, 2, 3)], 0.03

    def codebooks(self) -> dict[str, VectorQuantizer]:
        """By the names "pattern_1" to "pattern_4" and "concept"."""
        patterns = cast("list[VectorQuantizer]", list(self.hierarchy.pattern_codebook))
        return {**{f"pattern_{k}": q for k, q in enumerate(patterns, 1)}, "concept": self.hierarchy.concept_codebook}

    def codes(self, features: Sequence[Tensor] | Tensor, category: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Index and distance of each cell's pattern at every stage, and of each image's concept."""
        codes, books = self.look_up(features, category), self.codebooks()
        found = {}
        for k, at in enumerate(codes.conditions, 1):
            distance = (at.distance * at.encoded.shape[1]).sqrt()
            found[f"pattern_{k}"] = at.index % books[f"pattern_{k}"].n_codes, distance
        concept = books["concept"]
        distance = (codes.concept_distance * concept.dim).sqrt()
        found["concept"] = (codes.concept_index % concept.n_codes).view(-1, 1, 1), distance.view(-1, 1, 1)
        return found

    def start(self, batches: Batches) -> None:
        """Initialise the codes."""
        self.initialise_codes(batches)

    def extend(self, n: int, batches: Batches) -> None:
        """Add ``n`` categories and initialise their codes."""
        for _ in range(n):
            self.add_category()
        self.initialise_codes(batches)

    def parts_of(self, categories: Sequence[int]) -> list[nn.Module]:
        """Modules that can be trained for these categories without changing any other; empty for shared categories.

        All codebooks are among them, because each learns only from images of its own group; so is the noise, which
        is only added in training.
        """
        own = [c - self.n_shared for c in categories if c >= self.n_shared]
        if not own:
            return []
        parts = [part for g in own for part in (self.added_flow[g], self.added_mixture[g])]
        return [self.noisy, *self.hierarchy.codebooks(), *parts]

    def group_of(self, category: Any) -> Any:
        """Group of each category: 0 for all that share their parameters."""
        return (category - self.n_shared + 1).clip(0)

    def check_export(self) -> None:
        """Raise a ValueError if categories were added: they have flows of their own."""
        if self.n_added:
            raise ValueError(
                "Categories added by partial_fit cannot be exported, because each has flows of its own: fit all "
                "categories together to export them."
            )

    @torch.no_grad()
    def concept(self, features: Sequence[Tensor] | Tensor, category: Tensor | None = None) -> Tensor:
        """Number of each image's concept code, (N,) int64: ``group * n_concepts + code``, the shared group being 0."""
        return self.hierarchy.concept(self.pool(features)[3], self._group(category))

    @torch.no_grad()
    def look_up(self, features: Sequence[Tensor] | Tensor, category: Tensor | None = None) -> Codes:
        """Codes of each image and cell, without running the flows. Arguments as for :meth:`loss`."""
        codes: Codes = self.hierarchy(self.pool(features), self._group(category))
        return codes

    def ready(self) -> VQFlow:
        """Return a view of this module, on the same parameters, that caches the tables of all codes.

        Use it for scoring, under ``torch.no_grad``. The tables are built when first needed, and the parameters must
        not change afterwards. This module itself computes, in every call, the tables of the codes that occur.
        """
        view = copy.copy(self)
        view._tables = {}
        return view

    # ---- the computation

    def forward(self, features: Sequence[Tensor] | Tensor, category: Tensor | None = None) -> VQFlowOutput:
        """Encode, quantise, transform; arguments as for :meth:`loss`."""
        stages = [self.noisy(stage) for stage in self.pool(features)]
        codes: Codes = self.hierarchy(stages, self._group(category))
        latents = self.transform(stages[:3], codes)
        objective, dimensions = -latents.log_prob.mean(), latents.n_dimensions
        if self.likelihood == "release":
            objective = objective - 0.5 * dimensions * math.log(2 * math.pi)
        else:
            objective = objective / dimensions
        return VQFlowOutput(codes, latents, objective + self.commitment_weight * codes.commitment)

    def pool(self, features: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The four pooled stages, the input of codes and flows; see :func:`pooled_stages`."""
        return pooled_stages(features, self.channels, self.hierarchy.concept_codebook.embed.dtype)

    def transform(self, stages: Sequence[Tensor], codes: Codes) -> Latents:
        """Pooled stages 1 to 3 to latents, given the codes."""
        flow_z, flow_cells, mixed, cells = [], [], [], []
        for k, (x, flow) in enumerate(zip(stages, self._flows())):
            z, of_flow = flow.transform(x, self._project(flow, k, codes))
            standard, of_own = self._standardise(k, z, codes)
            flow_z.append(z)
            flow_cells.append(of_flow)
            mixed.append(standard)
            cells.append(of_flow + of_own)
        z_all, of_fusion = self.fusion.transform(mixed, self._project(self.fusion, 3, codes))
        return Latents(flow_z, flow_cells, z_all, [a + b for a, b in zip(cells, of_fusion)])

    def restore(self, z: Sequence[Tensor], codes: Codes) -> list[Tensor]:
        """The pooled stages 1 to 3 that :meth:`transform` maps to ``z``, given the same codes."""
        stages = []
        mixed = self.fusion.restore(z, self._project(self.fusion, 3, codes))
        for k, (x, flow) in enumerate(zip(mixed, self._flows())):
            latent = torch.empty_like(x)
            for rows, g, own_codes in self._by_group(codes):
                part = self._mixture(g, k).inverse(x[rows], own_codes.concept)
                if g:
                    own = self._added_flow(g, k)
                    part = own.restore(part, self._project(own, k, own_codes))
                latent[rows] = part
            stages.append(flow.restore(latent, self._project(flow, k, codes)))
        return stages

    def _standardise(self, k: int, z: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        """Apply the groups' own flows and mixtures to stage k + 1: latents, and log-determinants (N, h, w)."""
        parts = []
        for rows, g, own_codes in self._by_group(codes):
            x, cells = z[rows], z.new_zeros(())
            if g:
                flow = self._added_flow(g, k)
                x, cells = flow.transform(x, self._project(flow, k, own_codes))
            x, of_mixture = self._mixture(g, k)(x, own_codes.concept)
            parts.append((rows, x, cells + of_mixture[:, None, None].expand(-1, *x.shape[2:])))
        if len(parts) == 1:
            return parts[0][1:]
        standard, log_det = torch.empty_like(z), z.new_empty(len(z), *z.shape[2:])
        for rows, x, cells in parts:
            standard[rows], log_det[rows] = x, cells
        return standard, log_det

    def _by_group(self, codes: Codes) -> list[tuple[Tensor | slice, int, Codes]]:
        """For each group of the batch: its images, its number and their codes."""
        numbers = codes.groups.numbers
        if len(numbers) == 1 or torch.compiler.is_exporting():
            return [(slice(None), numbers[0], codes)]
        return [(images, g, codes.of_group(g, images)) for g, images in zip(numbers, codes.groups.images())]

    def _group(self, category: Tensor | None) -> Tensor | None:
        """Group of each category: 0 if shared, 1, 2, ... if added."""
        return None if category is None or not self.n_added else (category.cpu() - self.n_shared + 1).clamp_min(0)

    def _flows(self) -> list[ConditionalFlow]:
        return [cast(ConditionalFlow, flow) for flow in self.scale_flow]

    def _mixture(self, g: int, k: int) -> MixtureComponent:
        return cast(MixtureComponent, (cast(nn.ModuleList, self.added_mixture[g - 1]) if g else self.mixture)[k])

    def _added_flow(self, g: int, k: int) -> ConditionalFlow:
        return cast(ConditionalFlow, cast(nn.ModuleList, self.added_flow[g - 1])[k])

    def _project(self, flow: ConditionalFlow | FusionFlow, k: int, codes: Codes) -> list[Tensor]:
        """Contribution of stage k + 1's condition to the first convolution of each of a flow's subnets."""
        condition, projection = codes.conditions[k], flow.project
        if self.condition_path == "convolution" or torch.compiler.is_exporting():  # tables depend on the data
            return cast(list[Tensor], projection(condition.dense()))
        if self._tables is None or torch.is_grad_enabled():
            return projection.from_codes(condition)
        if len(codes.groups.numbers) > 1:
            return projection.from_codes(condition)
        # Of each group alone: the last bits of a matrix product depend on how many rows there are.
        (one,) = codes.groups.numbers
        concepts = self.hierarchy.concept_codebook.embed[one]
        key = (id(projection), one, *condition.index.shape[1:])
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = projection.table(condition.codes, condition.position, concepts)
        return projection.from_table(table, condition, codes.concept_index - one * len(concepts))
