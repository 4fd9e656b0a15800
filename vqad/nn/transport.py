r"""Cost of transporting an image's cells to the codes of its category.

Every function takes the cells' vectors ``z`` (N, L, D) and each image's codes ``codes`` (N, K, D), and gives
the cost of every cell (N, L): high where a cell is far from the codes, which describe normal images. The cost
of one image does not depend on the others of the batch.

``conditional`` is what the HVQ-Trans release computes [1]_. The others solve, with the cost
:math:`C_{lk} = \|z_l - e_k\|_2^2`, variants of

.. math:: P^* = \arg\min_{P \ge 0} \langle P, C \rangle + \epsilon \sum_{lk} P_{lk} \log P_{lk}
          \quad \text{s.t.} \quad P 1 = 1/L, \quad P^T 1 = b

with :math:`b` the shares of the codes, and give :math:`T_l = L \sum_k P^*_{lk} C_{lk}`, the cost of the cell
under its conditional plan: ``sinkhorn`` as it stands, ``exact`` with :math:`\epsilon = 0`, ``nearest`` with
:math:`\epsilon = 0` and without the second constraint. In the mean over an image's cells, therefore,
nearest <= exact <= sinkhorn, the last once its iterations have converged: for very unequal shares they may not
have. Sinkhorn's iterations [2]_ and the network simplex are POT's [3]_.

References
----------
.. [1] Lu et al., Hierarchical Vector Quantized Transformer for Multi-class Unsupervised Anomaly Detection,
   NeurIPS 2023.
.. [2] Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
.. [3] Flamary et al., POT: Python Optimal Transport, JMLR 2021.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

TransportKind = Literal["conditional", "nearest", "sinkhorn", "exact"]
KINDS: tuple[TransportKind, ...] = ("conditional", "nearest", "sinkhorn", "exact")


def transport_cost(kind: TransportKind, z: Tensor, codes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the cost of every cell by the named kind of transport, with its default parameters.

    Parameters
    ----------
    kind : {"conditional", "nearest", "sinkhorn", "exact"}
    z : Tensor of shape (N, L, D)
    codes : Tensor of shape (N, K, D)
    weights : Tensor of shape (N, K), optional
        Shares of the codes, for the kinds that have a second marginal; uniform when left out.

    Returns
    -------
    Tensor of shape (N, L)
    """
    if kind == "conditional":
        return conditional(z, codes)
    if kind == "nearest":
        return nearest(z, codes)
    if kind == "sinkhorn":
        return sinkhorn(z, codes, weights)
    if kind == "exact":
        return exact(z, codes, weights)
    raise ValueError(f"transport must be one of {', '.join(map(repr, KINDS))}; got {kind!r}.")


def conditional(z: Tensor, codes: Tensor) -> Tensor:
    r"""Expected cosine distance to the codes, the release's cost (paper, section 3.3).

    .. math:: p(k|z) = \mathrm{softmax}_k(z \cdot e_k / K), \quad T = \sum_k p(k|z) (1 - \cos(z, e_k))

    Differentiable in ``z``.

    Parameters
    ----------
    z : Tensor of shape (N, L, D)
    codes : Tensor of shape (N, K, D)

    Returns
    -------
    Tensor of shape (N, L)
        In [0, 2].
    """
    product = torch.bmm(z, codes.mT)
    plan = (product / codes.shape[1]).softmax(-1)
    tiny = 1e-12
    unit = product / codes.norm(dim=-1).clamp_min(tiny).unsqueeze(1)
    cosine: Tensor = (plan * unit).sum(-1) / z.norm(dim=-1).clamp_min(tiny)
    return 1 - cosine


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    r"""Squared distance to the nearest code: transport with the cells' marginal alone.

    .. math:: T_l = \min_k \|z_l - e_k\|_2^2

    Differentiable in ``z``.

    Parameters
    ----------
    z : Tensor of shape (N, L, D)
    codes : Tensor of shape (N, K, D)

    Returns
    -------
    Tensor of shape (N, L)
    """
    with torch.no_grad():
        index = squared_distances(z, codes).argmin(-1, keepdim=True)
        closest = codes.gather(1, index.expand(-1, -1, codes.shape[-1]))
    return (z - closest).square().sum(-1)


def sinkhorn(z: Tensor, codes: Tensor, weights: Tensor | None = None, *, reg: float = 0.1, n_iter: int = 50) -> Tensor:
    r"""Cost of every cell under the entropic plan between the image's cells and the codes.

    The regularisation is relative: :math:`\epsilon` is ``reg`` times the expected squared distance of two
    codes drawn by their shares. The number of iterations is fixed, so that no image's cost depends on its
    company.
    Differentiable in ``z``, with the plan held fixed.

    Parameters
    ----------
    z : Tensor of shape (N, L, D)
    codes : Tensor of shape (N, K, D)
    weights : Tensor of shape (N, K), optional
        Shares of the codes, positive, each row of sum 1; uniform when left out.
    reg : float, default=0.1
        The smaller, the closer to ``exact``, and the more iterations it takes.
    n_iter : int, default=50
        Sinkhorn iterations, in the log domain, by POT.

    Returns
    -------
    Tensor of shape (N, L)
    """
    cost = squared_distances(z, codes)
    plan = sinkhorn_plan(cost.detach(), codes, weights, reg=reg, n_iter=n_iter)
    return (plan / plan.sum(-1, keepdim=True) * cost).sum(-1)


@torch.no_grad()
def sinkhorn_plan(
    cost: Tensor, codes: Tensor, weights: Tensor | None = None, *, reg: float = 0.1, n_iter: int = 50
) -> Tensor:
    """Entropic transport plan of :func:`sinkhorn` for a cost (N, L, K): (N, L, K), each of sum 1."""
    # Importing POT takes seconds: import it only where a plan is solved for.
    from ot.batch import bregman_log_projection_batch

    weights = _shares(codes, weights)
    centre = torch.bmm(weights.unsqueeze(1), codes)
    spread = 2 * (weights * (codes - centre).square().sum(-1)).sum(-1)
    # Codes that are all equal have no scale: the image's own costs keep the quotient finite.
    number = torch.finfo(cost.dtype)
    epsilon = reg * torch.maximum(spread, number.eps * cost.mean((1, 2))).clamp_min(number.tiny / reg)
    cells = cost.new_full(cost.shape[:2], 1 / cost.shape[1])
    affinity = -cost / epsilon[:, None, None]
    solution = bregman_log_projection_batch(affinity, cells, weights, max_iter=n_iter, tol=0.0)
    plan: Tensor = solution["T"]
    return plan


@torch.no_grad()
def exact(z: Tensor, codes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cost of every cell under the optimal plan between the image's cells and the codes (network simplex).

    Not differentiable; one linear program per image, solved by POT on the CPU.

    Parameters
    ----------
    z : Tensor of shape (N, L, D)
    codes : Tensor of shape (N, K, D)
    weights : Tensor of shape (N, K), optional
        Shares of the codes, each row of sum 1; uniform when left out.

    Returns
    -------
    Tensor of shape (N, L)
    """
    cost = squared_distances(z, codes)
    plan = exact_plan(cost, _shares(codes, weights))
    return (plan * cost).sum(-1) * cost.shape[1]


@torch.no_grad()
def exact_plan(cost: Tensor, weights: Tensor) -> Tensor:
    """Optimal transport plan for a cost (N, L, K) and shares (N, K): (N, L, K), each of sum 1."""
    import ot  # as late as in sinkhorn_plan

    # The simplex wants both marginals to have the same sum to the last bits of float64.
    cells = torch.full((cost.shape[1],), 1 / cost.shape[1], dtype=torch.float64)
    shares = weights.double().cpu()
    shares = shares / shares.sum(-1, keepdim=True)
    plans = [ot.emd(cells, b, c, numItermax=1_000_000) for b, c in zip(shares, cost.double().cpu())]
    return torch.stack(plans).to(cost)


def squared_distances(z: Tensor, codes: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, L, D) and (N, K, D) to (N, L, K); differentiable."""
    centre = codes.mean(1, keepdim=True)
    z, codes = z - centre, codes - centre
    near = torch.baddbmm(codes.square().sum(-1).unsqueeze(1), z, codes.mT, alpha=-2)
    return F.relu(near + z.square().sum(-1, keepdim=True))


def _shares(codes: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return codes.new_full(codes.shape[:2], 1 / codes.shape[1])
    return weights.to(codes.dtype)
