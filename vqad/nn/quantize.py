"""Vector quantisation with exponential-moving-average codebooks, one codebook per group.

A group is whatever has a codebook of its own: an object category in HVQ-Trans, the whole data set in VQ-Flow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_NUMBERS = 2**28
"""What is kept of a model's outputs to start its codes from, in numbers (1 GiB)."""


class Quantized(NamedTuple):
    """What a quantiser returns.

    Attributes
    ----------
    quantized : Tensor of shape (N, L, D)
        The nearest code of every vector; gradients pass straight through to the input.
    indices : Tensor of shape (N, L), int64
        Which code that was.
    loss : Tensor of shape (N,)
        Commitment of each image: the mean over its elements of ``(sg[code] - input) ** 2``.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    r"""Nearest-code look-up, and codes that follow the mean of what was assigned to them.

    For an input vector :math:`x` of group :math:`g` the output is the code :math:`e_{gk}` with the smallest
    :math:`\|x - e_{gk}\|_2^2`. In training mode, after the look-up, the codebooks of the groups that are
    present in the batch follow an exponential moving average of counts and sums:

    .. math:: n_k \leftarrow \gamma n_k + (1-\gamma) c_k, \quad
              m_k \leftarrow \gamma m_k + (1-\gamma) \sum_{x \to k} x, \quad
              e_k = m_k / \tilde n_k, \quad
              \tilde n_k = \frac{n_k + \epsilon}{\sum_j n_j + K \epsilon} \sum_j n_j

    All groups of a batch are looked up and updated at once, whatever the number of groups that exist.

    Codes start as standard normal vectors with zero counts. :meth:`initialise` starts them from data instead.

    Parameters
    ----------
    n_codes : int
        Codes in each codebook (K).
    dim : int
        Width of a code (D).
    n_groups : int, default=1
        Number of codebooks.
    decay : float, default=0.99
        :math:`\gamma` of the moving average.
    eps : float, default=1e-5
        :math:`\epsilon` of the Laplace smoothing of the counts.
    revive_threshold : float, default=0.0
        A code whose count fell below this fraction of its codebook's mean count is dead: it is placed anew on
        a vector of the batch that the codebook represents badly. 0 leaves dead codes dead.
    revive_every : int, default=16
        Updates of a codebook between two looks for dead codes.

    Attributes
    ----------
    embed : Tensor of shape (n_groups, K, D)
        The codes :math:`e`.
    cluster_size : Tensor of shape (n_groups, K)
        The moving averages :math:`n` of the number of vectors that an update assigns to each code.
    embed_avg : Tensor of shape (n_groups, K, D)
        The moving averages :math:`m` of the sums of those vectors.
    n_updates : Tensor of shape (n_groups,), int64
        Updates that each codebook has seen.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, NeurIPS 2017, appendix A.1.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    n_updates: Tensor

    def __init__(
        self,
        n_codes: int,
        dim: int,
        *,
        n_groups: int = 1,
        decay: float = 0.99,
        eps: float = 1e-5,
        revive_threshold: float = 0.0,
        revive_every: int = 16,
    ) -> None:
        super().__init__()
        self.n_codes = n_codes
        self.dim = dim
        self.decay = decay
        self.eps = eps
        self.revive_threshold = revive_threshold
        self.revive_every = revive_every
        embed = torch.randn(n_groups, n_codes, dim)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_groups, n_codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("n_updates", torch.zeros(n_groups, dtype=torch.long))

    @property
    def n_groups(self) -> int:
        """Number of codebooks."""
        return self.embed.shape[0]

    def extra_repr(self) -> str:
        return f"n_codes={self.n_codes}, dim={self.dim}, n_groups={self.n_groups}, decay={self.decay}"

    def codes(self, group: Tensor) -> Tensor:
        """Codebook of each image: (N,) group numbers to (N, K, D); of a single one, but in training, without a copy."""
        one = len(group) == 1 and not self.training and not torch.compiler.is_exporting()
        return self.embed[int(group[0])][None] if one else self.embed[group]

    def weights(self, group: Tensor) -> Tensor:
        """How often each code is used: (N,) group numbers to (N, K), positive, every row of sum 1."""
        size = self.cluster_size[group] + self.eps
        return size / size.sum(-1, keepdim=True)

    def perplexity(self) -> Tensor:
        """Effective number of codes in use, the exponential of the entropy of the counts: (n_groups,).

        Between 1 (one code takes everything) and K (all are used equally); 0 for a codebook without counts.
        """
        total = self.cluster_size.sum(-1, keepdim=True)
        share = self.cluster_size / total.clamp_min(torch.finfo(total.dtype).tiny)
        perplexity: Tensor = torch.special.entr(share).sum(-1).exp() * (total.squeeze(-1) > 0)
        return perplexity

    def forward(self, x: Tensor, group: Tensor | None = None) -> Quantized:
        """Quantise ``x``, and in training mode update the codebooks.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64, optional
            Codebook of each image; all zero when left out.
        """
        if group is None:
            group = x.new_zeros(x.shape[0], dtype=torch.long)
        code, indices = self.look_up(x, group)
        if torch.compiler.is_exporting():
            return Quantized(code, indices, x.new_zeros(x.shape[0]))
        quantized, loss = _StraightThrough.apply(x, code)
        if self.training:
            present, flat = torch.unique(group), indices + group[:, None] * self.n_codes
            self._update(x.detach(), flat, present)
            if self.revive_threshold > 0:
                due = present[self.n_updates[present] % self.revive_every == 0]
                for g in due.tolist():
                    image = group == g
                    self._revive(g, x.detach()[image].flatten(0, 1), code[image].flatten(0, 1))
        return Quantized(quantized, indices, loss)

    @torch.no_grad()
    def look_up(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code (N, L, D), in the type of ``x``, and its index (N, L); neither gradients nor updates."""
        indices = self.nearest(x, group)
        if torch.compiler.is_exporting():  # by row: gathering along an axis would take an index for every number
            return self.embed[group][0][indices], indices
        flat = indices + group[:, None] * self.n_codes
        return F.embedding(flat, self.embed.flatten(0, 1)).to(x.dtype), indices

    @torch.no_grad()
    def nearest(self, x: Tensor, group: Tensor) -> Tensor:
        """Index of the nearest code of every vector, (N, L, D) to (N, L), int64."""
        if torch.compiler.is_exporting():  # a graph does not branch on which groups there are
            present, row = torch.arange(self.n_groups), group
        else:
            present, row = torch.unique(group, return_inverse=True)
        centre, codes, bias = (t[row] for t in self._centred(present, x.dtype))
        # max finds what argmax does, on a CPU in a quarter of the time.
        return torch.baddbmm(bias, x - centre, codes.mT).max(-1).indices

    def _centred(self, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of some codebooks the middle (n, 1, D), the codes seen from there (n, K, D), and their bias (n, 1, K)."""
        codes = self.embed if len(present) == self.n_groups else self.embed.index_select(0, present)
        # Seen from the middle of the codebook the products are as small as the distances that decide, so that
        # rounding (under autocast, to 8 bits) hardly changes which code is nearest.
        centre = codes.mean(1, keepdim=True).to(dtype)
        codes = codes - centre
        # |x|^2 is the same for every code: it does not change which one is nearest.
        bias = torch.linalg.vector_norm(codes, dim=-1).square_().mul_(-0.5).unsqueeze(1)
        return centre, codes.to(dtype), bias.to(dtype)

    @torch.no_grad()
    def _update(self, x: Tensor, flat: Tensor, present: Tensor) -> None:
        index, gain = flat.flatten(), 1 - self.decay
        # In place, group by group: copies of the codebooks would cost more than the rest of the update.
        for g in present.tolist():
            self.cluster_size[g].mul_(self.decay)
            self.embed_avg[g].mul_(self.decay)
        one = torch.ones_like(index, dtype=self.embed.dtype)
        self.cluster_size.view(-1).index_add_(0, index, one, alpha=gain)
        vectors = x.flatten(0, 1).to(self.embed.dtype)
        self.embed_avg.view(-1, self.dim).index_add_(0, index, vectors, alpha=gain)
        for g in present.tolist():
            torch.div(self.embed_avg[g], self._smoothed(self.cluster_size[g])[:, None], out=self.embed[g])
        self.n_updates[present] += 1

    def _smoothed(self, size: Tensor) -> Tensor:
        n = size.sum(-1, keepdim=True)
        return (size + self.eps) / (n + self.n_codes * self.eps) * n

    @torch.no_grad()
    def revive(self, x: Tensor, group: Tensor, generator: torch.Generator | None = None) -> int:
        """Place the dead codes of the groups in ``group`` on badly represented vectors of ``x``.

        The vectors are drawn as in k-means++, with probabilities proportional to their squared distance to
        the nearest code, and no more than one in eight of them. A revived code starts with the mean count.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64
        generator : torch.Generator, optional
            Source of the draws; torch's default generator when left out.

        Returns
        -------
        int
            How many codes were revived.
        """
        indices = self.nearest(x, group)
        revived = 0
        for g in torch.unique(group).tolist():
            image = group == g
            code = self.embed[g][indices[image].flatten()]
            revived += self._revive(g, x[image].flatten(0, 1), code, generator)
        return revived

    def _revive(self, g: int, x: Tensor, code: Tensor, generator: torch.Generator | None = None) -> int:
        size = self.cluster_size[g]
        mean = size.mean()
        dead = (size < self.revive_threshold * mean).nonzero().squeeze(1)
        x = x.to(self.embed.dtype)
        distance = (x - code.to(x.dtype)).square().sum(-1)
        n_revived = min(len(dead), len(x) // 8, int(distance.count_nonzero()))
        if not n_revived:
            return 0
        dead = dead[size[dead].argsort(stable=True)[:n_revived]]
        drawn = _draw_far_apart(x, distance, n_revived, generator)
        size[dead] = mean
        self.embed[g, dead] = x[drawn]
        self.embed_avg[g, dead] = x[drawn] * self._smoothed(size)[dead, None]
        return n_revived

    @torch.no_grad()
    def initialise(
        self,
        x: Tensor,
        group: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        n_iter: int = 4,
        max_vectors: int | None = None,
        update_size: float | None = None,
    ) -> None:
        """Start the codebooks of the groups in ``group`` from data: k-means, seeded as k-means++.

        The counts become what an update would assign to each code in the mean, and the sums fit to codes and
        counts, so that the first updates continue from here. Other groups stay as they are.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64, optional
            Codebook of each image; all zero when left out.
        generator : torch.Generator, optional
            Source of the draws; torch's default generator when left out.
        n_iter : int, default=4
            Lloyd's iterations after seeding.
        max_vectors : int, optional
            Vectors of a group that are looked at, a random subset of all; 16 * n_codes when left out.
        update_size : float, optional
            Vectors of a group that an update is expected to bring; those of one image (L) when left out.

        References
        ----------
        Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007.
        Bahmani et al.: Scalable k-means++, VLDB 2012 (several draws a round).
        """
        if group is None:
            group = x.new_zeros(x.shape[0], dtype=torch.long)
        limit = max_vectors or 16 * self.n_codes
        for g in torch.unique(group).tolist():
            vectors = x[group == g].flatten(0, 1)
            if len(vectors) > limit:
                chosen = torch.randperm(len(vectors), generator=generator, device=_device(x, generator))
                vectors = vectors[chosen[:limit].to(x.device)]
            vectors = vectors.to(self.embed.dtype)
            codes, count = _k_means(vectors, self.n_codes, n_iter, generator)
            size = count * ((update_size or x.shape[1]) / count.sum())
            self.embed[g] = codes
            self.cluster_size[g] = size
            self.embed_avg[g] = codes * self._smoothed(size).unsqueeze(-1)
            self.n_updates[g] = 0

    def add_groups(self, n: int) -> None:
        """Append ``n`` new codebooks (standard normal, zero counts); the others keep every bit."""
        fresh = VectorQuantizer(self.n_codes, self.dim, n_groups=n).to(self.embed)
        for name in ("embed", "cluster_size", "embed_avg", "n_updates"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(fresh, name)]))


class _StraightThrough(torch.autograd.Function):
    """Hand on the code, and hand its gradient back to the input; together with the commitment."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        offset = x - code
        ctx.save_for_backward(offset)
        exact = torch.promote_types(x.dtype, torch.float32)
        loss = torch.linalg.vector_norm(offset.flatten(1), dim=1, dtype=exact).square() / offset[0].numel()
        return code.view_as(code), loss

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor, grad_loss: Tensor) -> tuple[Tensor, None]:
        (offset,) = ctx.saved_tensors
        pull = (grad_loss * (2 / offset[0].numel())).to(offset.dtype)
        return torch.addcmul(grad_quantized, offset, pull[:, None, None]), None


def _device(x: Tensor, generator: torch.Generator | None) -> torch.device:
    return x.device if generator is None else generator.device


def _sums(vectors: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Count and sum of the vectors (V, D) of each index: (n,) and (n, D)."""
    count = torch.bincount(index, minlength=n).to(vectors.dtype)
    total = vectors.new_zeros(n, vectors.shape[1]).index_add_(0, index, vectors)
    return count, total


def _assign(vectors: Tensor, codes: Tensor) -> Tensor:
    """Nearest code of each vector, (V, D) and (K, D) to (V,)."""
    return torch.addmm(codes.square().sum(-1), vectors, codes.T, alpha=-2).argmin(-1)


def _k_means(vectors: Tensor, n_codes: int, n_iter: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Codes (K, D) of the vectors (V, D), and how many vectors each has (K,), at least one."""
    if len(vectors) <= n_codes:
        extra = _draw(vectors.new_ones(len(vectors)), n_codes - len(vectors), True, generator)
        copies = vectors[extra]
        # Two equal codes would never part: the first takes every vector.
        noise = torch.randn(copies.shape, generator=generator, device=_device(vectors, generator))
        spread = vectors.std(0, correction=0).mean()
        codes = torch.cat([vectors, copies + 0.01 * spread * noise.to(copies)])
        return codes, codes.new_ones(n_codes)
    centre = vectors.mean(0)
    vectors = vectors - centre
    codes = _seed(vectors, n_codes, generator)
    count = codes.new_ones(n_codes)
    for _ in range(n_iter):
        count, total = _sums(vectors, _assign(vectors, codes), n_codes)
        codes = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], codes)
    return codes + centre, count.clamp_min(1)


def _seed(vectors: Tensor, n_codes: int, generator: torch.Generator | None) -> Tensor:
    """k-means++ seeds (K, D) out of the vectors (V, D)."""
    first = _draw(vectors.new_ones(len(vectors)), 1, False, generator)
    distance = (vectors - vectors[first]).square().sum(-1)
    others = _draw_far_apart(vectors, distance, n_codes - 1, generator)
    return vectors[torch.cat([first, others])]


def _draw_far_apart(vectors: Tensor, distance: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` of the vectors (V, D) in the manner of k-means++.

    The probabilities are proportional to the squared distance to the nearest code, at first ``distance``
    (V,), and those drawn count as codes from the next round on. A round draws an eighth more.
    """
    distance, norm = distance.clone(), vectors.square().sum(-1)
    # Where only copies of the codes are left, they are drawn like any other.
    least = 1e-12 * float(norm.mean()) + 1e-30
    drawn = torch.zeros(0, dtype=torch.long, device=vectors.device)
    while len(drawn) < n:
        weight = distance.clamp_min(least)
        weight[drawn] = 0
        chosen = _draw(weight, min(n - len(drawn), max(1, len(drawn) // 8)), False, generator)
        new = vectors[chosen]
        squared = torch.addmm(new.square().sum(-1), vectors, new.T, alpha=-2).amin(-1) + norm
        distance = torch.minimum(distance, squared.clamp_min_(0))
        drawn = torch.cat([drawn, chosen])
    return drawn


def _draw(weight: Tensor, n: int, replacement: bool, generator: torch.Generator | None) -> Tensor:
    """``n`` indices drawn with probabilities proportional to ``weight``."""
    if not n:
        return torch.zeros(0, dtype=torch.long, device=weight.device)
    here = weight.to(_device(weight, generator))
    return torch.multinomial(here, n, replacement, generator=generator).to(weight.device)
