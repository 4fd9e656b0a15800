"""Vector quantisation with exponential-moving-average codebooks, one codebook per group.

A group is whatever has a codebook of its own: an object category in HVQ-Trans, the whole data set in VQ-Flow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Groups
from .k_means import device_of, draw_far_apart, k_means
from .ranks import gathered, is_shared, of_first, summed

SAMPLE_NUMBERS = 2**28
"""Largest number of values that are held to initialise a model's codes (1 GiB)."""


class Quantized(NamedTuple):
    """Output of a quantiser.

    Attributes
    ----------
    quantized : Tensor of shape (N, L, D)
        The nearest code of each vector; gradients pass straight through to the input.
    indices : Tensor of shape (N, L), int64
        Index of that code.
    loss : Tensor of shape (N,)
        Commitment of each image: the mean over its elements of ``(sg[code] - input) ** 2``.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    r"""Nearest-code look-up, with codes that follow the mean of the vectors assigned to them.

    For an input vector :math:`x` of group :math:`g` the output is the code :math:`e_{gk}` with the smallest
    :math:`\|x - e_{gk}\|_2^2`. In training mode, :meth:`step` lets the codebooks of the groups that were looked up
    follow an exponential moving average of counts and sums:

    .. math:: n_k \leftarrow \gamma n_k + (1-\gamma) c_k, \quad
              m_k \leftarrow \gamma m_k + (1-\gamma) \sum_{x \to k} x, \quad
              e_k = m_k / \tilde n_k, \quad
              \tilde n_k = \frac{n_k + \epsilon}{\sum_j n_j + K \epsilon} \sum_j n_j

    All groups of a batch are looked up and updated together, whatever the total number of groups. The forward pass does
    not change codes: like an optimiser, :meth:`step` is called after the backward pass.

    Codes start as standard normal vectors with zero counts. :meth:`initialise` initialises them from data instead.

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
        A code whose count is below this fraction of its codebook's mean count is dead: it is moved to a vector of the
        batch that the codebook represents badly. 0 never revives codes.

    Attributes
    ----------
    embed : Tensor of shape (n_groups, K, D)
        The codes :math:`e`.
    cluster_size : Tensor of shape (n_groups, K)
        The moving averages :math:`n` of the number of vectors that an update assigns to each code.
    embed_avg : Tensor of shape (n_groups, K, D)
        The moving averages :math:`m` of the sums of those vectors.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, NeurIPS 2017, appendix A.1.
    """

    DERIVED = "embed_avg"
    """The buffer that `rest` makes of the others: no file needs it."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self,
        n_codes: int,
        dim: int,
        *,
        n_groups: int = 1,
        decay: float = 0.99,
        eps: float = 1e-5,
        revive_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_codes = n_codes
        self.dim = dim
        self.decay = decay
        self.eps = eps
        self.revive_threshold = revive_threshold
        embed = torch.randn(n_groups, n_codes, dim)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_groups, n_codes))
        self.register_buffer("embed_avg", embed.clone())
        self._seen: list[_Seen] = []

    @property
    def n_groups(self) -> int:
        """Number of codebooks."""
        return self.embed.shape[0]

    def extra_repr(self) -> str:
        return f"n_codes={self.n_codes}, dim={self.dim}, n_groups={self.n_groups}, decay={self.decay}"

    def groups(self, group: Tensor | Groups | None, x: Tensor) -> Groups:
        """The groups of the images of ``x``; all the first if left out."""
        if group is None:
            group = torch.zeros(len(x), dtype=torch.long)
        return group if isinstance(group, Groups) else Groups.of(group, self.n_groups, x.device)

    def codes(self, group: Tensor | Groups) -> Tensor:
        """Codebook of each image, (N, K, D); without a copy for a single image."""
        groups = self.groups(group, self.embed)
        one = len(groups) == 1 and not torch.compiler.is_exporting()
        return self.embed[groups.numbers[0]][None] if one else self.embed[groups.of_image]

    def books(self, groups: Groups) -> Tensor:
        """Codebooks of the groups that are present, (P, K, D); the buffer itself if all are."""
        return self._rows(self.embed, groups)

    def weights(self, group: Tensor | Groups) -> Tensor:
        """Shares of the codes in use, (N, K): positive, with a sum of 1 for each image."""
        size = self.cluster_size[self.groups(group, self.embed).of_image] + self.eps
        return size / size.sum(-1, keepdim=True)

    def perplexity(self) -> Tensor:
        """Effective number of codes in use, the exponential of the entropy of the counts: (n_groups,).

        Between 1 (one code takes everything) and K (all are used equally); 0 for a codebook without counts.
        """
        total = self.cluster_size.sum(-1, keepdim=True)
        share = self.cluster_size / total.clamp_min(torch.finfo(total.dtype).tiny)
        perplexity: Tensor = torch.special.entr(share).sum(-1).exp() * (total.squeeze(-1) > 0)
        return perplexity

    def forward(self, x: Tensor, group: Tensor | Groups | None = None) -> Quantized:
        """Quantise ``x``; in training mode, record the assignments for :meth:`step`.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64, or Groups, optional
            Codebook of each image; all zero if left out. Pass it on the host to avoid synchronising with the device.
        """
        groups = self.groups(group, x)
        code, indices = self.look_up(x, groups)
        if torch.compiler.is_exporting():
            return Quantized(code, indices, x.new_zeros(x.shape[0]))
        quantized, loss = _StraightThrough.apply(x, code)
        if self.training:
            self._seen.append(_Seen(x.detach(), indices, groups))
        return Quantized(quantized, indices, loss)

    @torch.no_grad()
    def look_up(self, x: Tensor, group: Tensor | Groups) -> tuple[Tensor, Tensor]:
        """The nearest code (N, L, D), in the type of ``x``, and its index (N, L), without gradients and updates."""
        groups = self.groups(group, x)
        indices = self.nearest(x, groups)
        if torch.compiler.is_exporting():  # by row: gathering along an axis would take an index for every number
            return self.embed[groups.of_image][0][indices], indices
        return self._of_index(indices, groups).to(x.dtype), indices

    def _of_index(self, indices: Tensor, groups: Groups) -> Tensor:
        return F.embedding(indices + groups.of_image[:, None] * self.n_codes, self.embed.flatten(0, 1))

    @torch.no_grad()
    def nearest(self, x: Tensor, group: Tensor | Groups) -> Tensor:
        """Index of the nearest code of each vector, from (N, L, D) to (N, L), int64."""
        groups = self.groups(group, x)
        centre, codes, bias = (t[groups.row] for t in self._centred(groups.present, x.dtype))
        # On a CPU, max takes a quarter of the time of argmax.
        return torch.baddbmm(bias, x - centre, codes.mT).max(-1).indices

    def _centred(self, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Centres (n, 1, D) of some codebooks, their centred codes (n, K, D), and the codes' biases (n, 1, K)."""
        codes = self.embed if len(present) == self.n_groups else self.embed.index_select(0, present)
        # For centred vectors, products are as small as the distances that decide, so that rounding (to 8 bits under
        # autocast) hardly changes which code is nearest.
        centre = codes.mean(1, keepdim=True).to(dtype)
        codes = codes - centre
        # |x|^2 is the same for all codes and can be left out.
        bias = torch.linalg.vector_norm(codes, dim=-1).square_().mul_(-0.5).unsqueeze(1)
        return centre, codes.to(dtype), bias.to(dtype)

    @torch.no_grad()
    def step(self, revive: bool = False) -> None:
        """Update the codes with everything assigned to them since the last step, as if it were one batch.

        Parameters
        ----------
        revive : bool, default=False
            Also revive dead codes, see ``revive_threshold``. This is the only part of a training step that synchronises
            with the device.
        """
        if not self._seen:
            return
        x, indices, groups = _joined(self._seen)
        self._seen.clear()
        revive = revive and self.revive_threshold > 0
        if is_shared():
            self._step_together(x, indices, groups, revive)
            return
        code = self._of_index(indices, groups) if revive else None
        self._update(x, indices, groups)
        if code is not None:
            self._revive(x, code, groups)

    def forget(self) -> None:
        """Discard the assignments since the last step."""
        self._seen.clear()

    def _update(self, x: Tensor, indices: Tensor, groups: Groups) -> None:
        n, gain = len(groups.present), 1 - self.decay
        index = (indices + groups.row[:, None] * self.n_codes).flatten()
        vectors = x.flatten(0, 1).to(self.embed.dtype)
        count = vectors.new_zeros(n * self.n_codes).index_add_(0, index, torch.ones_like(vectors[:, 0]))
        total = vectors.new_zeros(n * self.n_codes, self.dim).index_add_(0, index, vectors)
        size, mean = self._rows(self.cluster_size, groups), self._rows(self.embed_avg, groups)
        size.mul_(self.decay).add_(count.view_as(size), alpha=gain)
        mean.mul_(self.decay).add_(total.view_as(mean), alpha=gain)
        if n == self.n_groups:  # these were the buffers themselves
            torch.div(mean, self._smoothed(size).unsqueeze(-1), out=self.embed)
            return
        new = {"cluster_size": size, "embed_avg": mean, "embed": mean / self._smoothed(size).unsqueeze(-1)}
        for name, rows in new.items():
            self.get_buffer(name).index_copy_(0, groups.present, rows)

    def _step_together(self, x: Tensor, indices: Tensor, groups: Groups, revive: bool) -> None:
        """A step with the assignments of all processes that learn together: their counts and sums are added."""
        index = (indices + groups.of_image[:, None] * self.n_codes).flatten()
        vectors = x.flatten(0, 1).to(self.embed.dtype)
        vectors = torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1)
        seen = vectors.new_zeros(self.n_groups * self.n_codes, self.dim + 1).index_add_(0, index, vectors)
        seen = summed(seen).view(self.n_groups, self.n_codes, -1)
        total, count = seen[..., :-1], seen[..., -1]
        if revive:
            groups = Groups.of(gathered(groups.host), self.n_groups, x.device)
            x, indices = gathered(x), gathered(indices)
        code = self._of_index(indices, groups) if revive else None
        is_here, gain = (count.sum(1) > 0)[:, None], 1 - self.decay
        size = torch.where(is_here, self.cluster_size * self.decay + gain * count, self.cluster_size)
        mean = torch.where(is_here[..., None], self.embed_avg * self.decay + gain * total, self.embed_avg)
        self.embed.copy_(torch.where(is_here[..., None], mean / self._smoothed(size).unsqueeze(-1), self.embed))
        self.cluster_size.copy_(size)
        self.embed_avg.copy_(mean)
        if code is not None:
            self._revive(x, code, groups)
            for buffer in (self.embed, self.cluster_size, self.embed_avg):  # all use the draws of the first process
                of_first(buffer)

    def _rows(self, buffer: Tensor, groups: Groups) -> Tensor:
        return buffer if len(groups.present) == self.n_groups else buffer.index_select(0, groups.present)

    def _smoothed(self, size: Tensor) -> Tensor:
        n = size.sum(-1, keepdim=True)
        return (size + self.eps) / (n + self.n_codes * self.eps) * n

    @torch.no_grad()
    def revive(self, x: Tensor, group: Tensor | Groups, generator: torch.Generator | None = None) -> int:
        """Move the dead codes of the groups in ``group`` to badly represented vectors of ``x``.

        Vectors are drawn as in k-means++, with probabilities proportional to their squared distance to the nearest
        code, and at most one in eight of them. A revived code starts with the mean count.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64, or Groups
        generator : torch.Generator, optional
            Generator; torch's default generator if left out.

        Returns
        -------
        int
            Number of revived codes.
        """
        groups = self.groups(group, x)
        return self._revive(x, self._of_index(self.nearest(x, groups), groups), groups, generator)

    def _revive(self, x: Tensor, code: Tensor, groups: Groups, generator: torch.Generator | None = None) -> int:
        revived = 0
        for g, image in zip(groups.numbers, groups.images()):
            revived += self._revive_group(g, x[image].flatten(0, 1), code[image].flatten(0, 1), generator)
        return revived

    def _revive_group(self, g: int, x: Tensor, code: Tensor, generator: torch.Generator | None) -> int:
        size = self.cluster_size[g]
        mean = size.mean()
        dead = (size < self.revive_threshold * mean).nonzero().squeeze(1)
        x = x.to(self.embed.dtype)
        distance = (x - code.to(x.dtype)).square().sum(-1)
        n_revived = min(len(dead), len(x) // 8, int(distance.count_nonzero()))
        if not n_revived:
            return 0
        dead = dead[size[dead].argsort(stable=True)[:n_revived]]
        drawn = draw_far_apart(x, distance, n_revived, generator)
        size[dead] = mean
        self.embed[g, dead] = x[drawn]
        self.embed_avg[g, dead] = x[drawn] * self._smoothed(size)[dead, None]
        return n_revived

    @torch.no_grad()
    def initialise(
        self,
        x: Tensor,
        group: Tensor | Groups | None = None,
        *,
        generator: torch.Generator | None = None,
        n_iter: int = 4,
        max_vectors: int | None = None,
        update_size: float | None = None,
    ) -> None:
        """Initialise the codebooks of the groups in ``group`` from data, by k-means with k-means++ seeding.

        Counts are set to the expected number of vectors that an update assigns to each code, and sums accordingly, so
        that the first updates continue from here. Other groups do not change.

        Parameters
        ----------
        x : Tensor of shape (N, L, D)
        group : Tensor of shape (N,), int64, or Groups, optional
            Codebook of each image; all zero if left out.
        generator : torch.Generator, optional
            Generator; torch's default generator if left out.
        n_iter : int, default=4
            Lloyd iterations after seeding.
        max_vectors : int, optional
            Largest number of vectors of a group in use, a random subset; 16 * n_codes if left out.
        update_size : float, optional
            Expected number of vectors of a group per update; those of one image (L) if left out.

        References
        ----------
        Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding, SODA 2007.
        Bahmani et al.: Scalable k-means++, VLDB 2012 (several draws a round).
        """
        groups, limit = self.groups(group, x), max_vectors or 16 * self.n_codes
        for g, image in zip(groups.numbers, groups.images()):
            vectors = x[image].flatten(0, 1)
            if len(vectors) > limit:
                chosen = torch.randperm(len(vectors), generator=generator, device=device_of(x, generator))
                vectors = vectors[chosen[:limit].to(x.device)]
            vectors = vectors.to(self.embed.dtype)
            codes, count = k_means(vectors, self.n_codes, n_iter, generator)
            size = count * ((update_size or x.shape[1]) / count.sum())
            self.embed[g] = codes
            self.cluster_size[g] = size
            self.embed_avg[g] = codes * self._smoothed(size).unsqueeze(-1)

    @torch.no_grad()
    def rest(self) -> None:
        """After training, let the sums be what codes and counts say, as they are but for rounding."""
        self.embed_avg = self._sums(self.embed, self.cluster_size)

    def _sums(self, embed: Tensor, size: Tensor) -> Tensor:
        return embed * self._smoothed(size).unsqueeze(-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        embed, size = (state_dict.get(prefix + name) for name in ("embed", "cluster_size"))
        if embed is not None and size is not None:
            state_dict.setdefault(prefix + self.DERIVED, self._sums(embed, size))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def add_groups(self, n: int) -> None:
        """Append ``n`` new codebooks (standard normal, zero counts); the others keep every bit."""
        fresh = VectorQuantizer(self.n_codes, self.dim, n_groups=n).to(self.embed.device, self.embed.dtype)
        for name in ("embed", "cluster_size", "embed_avg"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(fresh, name)]))


class _Seen(NamedTuple):
    """Vectors (N, L, D), the codes that they were assigned to (N, L), and the groups of the images."""

    x: Tensor
    indices: Tensor
    groups: Groups


def _joined(seen: list[_Seen]) -> _Seen:
    if len(seen) == 1:
        return seen[0]
    x, indices, groups = zip(*seen)
    return _Seen(torch.cat(x), torch.cat(indices), Groups.joined(groups))


class _StraightThrough(torch.autograd.Function):
    """Return the code, pass its gradient to the input, and compute the commitment."""

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
