"""Properties of the transport costs between cells and codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqad.nn import transport
from vqad.nn.transport import KINDS, transport_cost

Problem = tuple[Tensor, Tensor, Tensor]


def problem(n: int = 3, length: int = 6, k: int = 5, dim: int = 4, seed: int = 0) -> Problem:
    """Cells, codes and shares, in float64."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, length, dim, generator=g, dtype=torch.float64)
    codes = torch.randn(n, k, dim, generator=g, dtype=torch.float64)
    weights = torch.rand(n, k, generator=g, dtype=torch.float64) + 0.1
    return z, codes, weights / weights.sum(-1, keepdim=True)


sizes = {
    "n": st.integers(1, 3),
    "length": st.integers(1, 7),
    "k": st.integers(2, 6),
    "seed": st.integers(0, 99),
}


@settings(max_examples=25, deadline=None)
@given(**sizes)
def test_squared_distances_are_those_of_the_differences(n, length, k, seed):
    z, codes, _ = problem(n, length, k, seed=seed)
    expected = (z[:, :, None] - codes[:, None]).square().sum(-1)
    torch.testing.assert_close(transport.squared_distances(z, codes), expected)


@settings(max_examples=25, deadline=None)
@given(**sizes)
def test_conditional_is_the_expected_cosine_distance(n, length, k, seed):
    z, codes, _ = problem(n, length, k, seed=seed)
    cost = transport.conditional(z, codes)
    for i in range(n):
        for cell in range(length):
            p = torch.softmax(codes[i] @ z[i, cell] / k, 0)
            cosine = torch.cosine_similarity(codes[i], z[i, cell][None], dim=1)
            torch.testing.assert_close(cost[i, cell], (p * (1 - cosine)).sum())


@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_exact_plan_has_both_marginals(n, length, k, seed):
    z, codes, weights = problem(n, length, k, seed=seed)
    plan = transport.exact_plan(transport.squared_distances(z, codes), weights)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), torch.full((n, length), 1 / length, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), weights)


@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_sinkhorn_plan_has_both_marginals(n, length, k, seed):
    z, codes, weights = problem(n, length, k, seed=seed)
    cost = transport.squared_distances(z, codes)
    plan = transport.sinkhorn_plan(cost, codes, weights, reg=0.5, n_iter=500)
    assert (plan >= 0).all()
    torch.testing.assert_close(
        plan.sum(2), torch.full((n, length), 1 / length, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(plan.sum(1), weights, rtol=1e-4, atol=1e-6)


def test_exact_cost_is_the_value_of_the_linear_program():
    linprog = pytest.importorskip("scipy.optimize").linprog
    z, codes, weights = problem(n=1, length=4, k=3)
    cost = (z[:, :, None] - codes[:, None]).square().sum(-1)[0]
    rows = torch.kron(torch.eye(4), torch.ones(1, 3))
    columns = torch.kron(torch.ones(1, 4), torch.eye(3))
    equalities = torch.cat([rows, columns]).numpy()
    marginals = torch.cat([torch.full((4,), 0.25, dtype=torch.float64), weights[0]]).numpy()
    solution = linprog(cost.flatten().numpy(), A_eq=equalities, b_eq=marginals)
    assert float(transport.exact(z, codes, weights).mean()) == pytest.approx(solution.fun)


def test_sinkhorn_tends_to_exact_as_the_regularisation_vanishes():
    z, codes, weights = problem()
    optimum = transport.exact(z, codes, weights).mean(1)
    gaps = []
    for reg in (1.0, 0.1, 0.02):
        value = transport.sinkhorn(z, codes, weights, reg=reg, n_iter=2000).mean(1)
        gaps.append(float((value - optimum).max()))
        assert (value >= optimum - 1e-6).all()
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02 * float(optimum.mean())


@settings(max_examples=15, deadline=None)
@given(**sizes)
def test_nearest_is_the_cheapest_of_all_plans(n, length, k, seed):
    z, codes, weights = problem(n, length, k, seed=seed)
    nearest = transport.nearest(z, codes)
    torch.testing.assert_close(nearest, torch.cdist(z, codes).amin(-1).square())
    assert (nearest <= transport.exact(z, codes, weights) + 1e-9).all()
    assert (nearest <= transport.sinkhorn(z, codes, weights) + 1e-9).all()


def test_cells_on_codes_in_the_codes_shares_cost_nothing():
    codes = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = codes[:, [0, 0, 1, 2]]
    weights = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    torch.testing.assert_close(transport.exact(z, codes, weights), zero)
    torch.testing.assert_close(transport.nearest(z, codes), zero)


def test_sinkhorn_regularisation_is_relative_to_the_scale_of_the_codes():
    z, codes, weights = problem()
    small = transport.sinkhorn(z, codes, weights)
    torch.testing.assert_close(transport.sinkhorn(10 * z, 10 * codes, weights), 100 * small)


@pytest.mark.parametrize("kind", KINDS)
def test_cost_of_an_image_does_not_depend_on_its_company(kind):
    z, codes, weights = problem(n=5, length=9, k=7)
    z[3] *= 100
    together = transport_cost(kind, z, codes, weights)
    alone = torch.cat([transport_cost(kind, z[i : i + 1], codes[i : i + 1], weights[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_cost_rises_for_a_cell_far_from_every_code(kind):
    z, codes, weights = problem(n=1, length=8, k=6)
    codes = codes + 3
    z = codes[:, [0, 1, 2, 3, 4, 5, 0, 1]] + 0.01 * z
    z[0, 4] = -20.0
    cost = transport_cost(kind, z, codes, weights)
    assert int(cost.argmax()) == 4


@pytest.mark.parametrize("kind", ["sinkhorn", "exact"])
def test_shares_left_out_are_uniform(kind):
    z, codes, _ = problem()
    uniform = torch.full((3, 5), 0.2, dtype=torch.float64)
    torch.testing.assert_close(transport_cost(kind, z, codes), transport_cost(kind, z, codes, uniform))


@pytest.mark.parametrize("kind", ["conditional", "nearest"])
def test_gradient_is_that_of_finite_differences(kind):
    z, codes, _ = problem(n=2, length=3, k=4)
    assert torch.autograd.gradcheck(lambda cells: transport_cost(kind, cells, codes), z.requires_grad_())


def test_sinkhorn_gradient_is_that_of_the_cost_under_the_fixed_plan():
    z, codes, weights = problem()
    z.requires_grad_()
    transport.sinkhorn(z, codes, weights, reg=0.5, n_iter=500).sum().backward()
    with torch.no_grad():
        cost = transport.squared_distances(z, codes)
        plan = transport.sinkhorn_plan(cost, codes, weights, reg=0.5, n_iter=500) * z.shape[1]
        expected = 2 * (plan[..., None] * (z[:, :, None] - codes[:, None])).sum(2)
    torch.testing.assert_close(z.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_in_float32_are_finite_where_the_codes_are_equal(kind):
    z, codes = torch.randn(1, 4, 3), torch.ones(1, 5, 3)
    assert transport_cost(kind, z, codes).isfinite().all()


def test_unknown_kind_is_named_with_those_that_exist():
    z, codes, weights = problem()
    with pytest.raises(ValueError, match=r"'conditional'.*'exact'; got 'optimal'"):
        transport_cost("optimal", z, codes, weights)
