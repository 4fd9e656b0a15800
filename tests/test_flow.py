"""The flows: inverses, log-determinants, densities; and the condition's way into them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqad.nn.condition import Condition, ConditionProjection
from vqad.nn.flow import ConditionalFlow, CouplingBlock, FusionFlow, MixtureComponent, random_rotation

close = {"rtol": 1e-8, "atol": 1e-8}
few = settings(max_examples=15, deadline=None)
sides = st.integers(1, 4)


def vivid(module):
    """Parameters far from their start, in double precision: nothing is near zero or the identity by luck."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * (3.0 if parameter.ndim == 4 else 0.5))
        for name, buffer in module.named_buffers():
            if name.endswith("rotation"):  # drawn in single precision
                buffer.copy_(torch.linalg.qr(buffer).Q)
    return module


def draw(*shape) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def jacobian_log_det(transform, x: Tensor) -> Tensor:
    """log|det| of a map from a flat vector to a flat vector, by automatic differentiation."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(transform, x)).logabsdet


@pytest.fixture(autouse=True)
def _keep_the_random_state():
    with torch.random.fork_rng():
        yield


# ---- one stage


@few
@given(seed=st.integers(0, 99), channels=st.integers(2, 7), h=sides, w=sides, n_blocks=st.integers(1, 3))
def test_a_stage_flow_is_inverted_exactly(seed, channels, h, w, n_blocks):
    torch.manual_seed(seed)
    flow = vivid(ConditionalFlow(channels, 3, n_blocks, hidden=5))
    x, condition = draw(2, channels, h, w), draw(2, 3, h, w)
    z, _ = flow(x, condition)
    torch.testing.assert_close(flow.inverse(z, condition), x, **close)


@few
@given(seed=st.integers(0, 99), channels=st.integers(2, 5), h=sides, w=sides, n_blocks=st.integers(1, 3))
def test_a_stage_flows_log_determinant_is_that_of_its_jacobian(seed, channels, h, w, n_blocks):
    torch.manual_seed(seed)
    flow = vivid(ConditionalFlow(channels, 3, n_blocks, hidden=4))
    condition = draw(1, 3, h, w)
    x = draw(channels * h * w)
    _, log_det = flow(x.view(1, channels, h, w), condition)
    expected = jacobian_log_det(lambda v: flow(v.view(1, channels, h, w), condition)[0].flatten(), x)
    torch.testing.assert_close(log_det[0], expected, **close)


def test_a_fresh_block_keeps_the_scale_of_its_input():
    torch.testing.assert_close(CouplingBlock(6, 3).gain, torch.ones(6))


@pytest.mark.parametrize("channels", [2, 3, 16])
def test_the_fixed_rotation_is_in_so_c(channels):
    rotation = random_rotation(channels).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels).double(), rtol=1e-6, atol=1e-6)
    assert torch.linalg.det(rotation) == pytest.approx(1, abs=1e-5)


def test_one_channel_cannot_be_split():
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ConditionalFlow(1, 3, 2)
    with pytest.raises(ValueError, match="at least 2"):
        FusionFlow((4, 1, 4), 3)


# ---- all stages


def pyramid(h: int, w: int, channels: list[int]) -> list[tuple[int, int, int]]:
    return [(c, h * 2**k, w * 2**k) for c, k in zip(channels, (2, 1, 0))]


@few
@given(
    seed=st.integers(0, 99),
    channels=st.lists(st.integers(2, 5), min_size=3, max_size=3),
    h=st.integers(1, 2),
    w=st.integers(1, 2),
)
def test_the_fusion_is_inverted_exactly(seed, channels, h, w):
    torch.manual_seed(seed)
    fusion = vivid(FusionFlow(channels, 3, hidden=4))
    xs, condition = [draw(2, *shape) for shape in pyramid(h, w, channels)], draw(2, 3, h, w)
    z, _ = fusion(xs, condition)
    for ours, x in zip(fusion.inverse(z, condition), xs):
        torch.testing.assert_close(ours, x, **close)


@few
@given(seed=st.integers(0, 99), channels=st.lists(st.integers(2, 3), min_size=3, max_size=3), w=st.integers(1, 2))
def test_the_fusions_log_determinant_is_that_of_its_jacobian(seed, channels, w):
    torch.manual_seed(seed)
    fusion = vivid(FusionFlow(channels, 3, hidden=4))
    shapes, condition = [(c, k, k * w) for c, k in zip(channels, (2, 1, 1))], draw(1, 3, 1, w)
    sizes = [math.prod(shape) for shape in shapes]

    def unpack(v: Tensor) -> list[Tensor]:
        return [part.view(1, *shape) for part, shape in zip(v.split(sizes), shapes)]

    x = draw(sum(sizes))
    _, log_det = fusion(unpack(x), condition)
    expected = jacobian_log_det(lambda v: torch.cat([z.flatten() for z in fusion(unpack(v), condition)[0]]), x)
    torch.testing.assert_close(log_det[0], expected, **close)


# ---- the density


def integral(flow: ConditionalFlow, mixture: MixtureComponent, reach: float = 20.0, n: int = 321) -> float:
    """Of exp(log-density) over a square of two channels on a 1×1 map, by the trapezoidal rule."""
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)[:, :, None, None]
    condition = draw(1, 3, 1, 1)
    concept = draw(1, 4)
    with torch.no_grad():
        z, log_det = flow(x, condition.expand(len(x), -1, -1, -1))
        z, of_mixture = mixture(z, concept.expand(len(x), -1))
    log_prob = -0.5 * z.square().flatten(1).sum(1) - math.log(2 * math.pi) + log_det + of_mixture
    return float(log_prob.exp().sum() * (axis[1] - axis[0]) ** 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flow_and_mixture_are_a_density_that_integrates_to_one(seed):
    torch.manual_seed(seed)
    flow = ConditionalFlow(2, 3, 2, hidden=5, clamp=0.5).double()
    mixture = vivid(MixtureComponent(2, 4, bound=0.7))
    assert integral(flow, mixture) == pytest.approx(1, abs=1e-3)


def test_the_releases_mixture_is_no_density():
    torch.manual_seed(0)
    flow = ConditionalFlow(2, 3, 2, hidden=5, clamp=0.5).double()
    mixture = vivid(MixtureComponent(2, 4, exact=False))
    assert abs(integral(flow, mixture) - 1) > 0.1


@few
@given(raw=st.floats(-1e6, 1e6))
def test_the_mixtures_scale_is_positive_whatever_its_parameters(raw):
    mixture = MixtureComponent(3, 4).double()
    torch.nn.init.constant_(mixture.scale.bias, raw)
    _, scale, log_det = mixture.moments(draw(2, 4))
    assert (scale > 0.04).all()
    assert (scale < 21).all()
    torch.testing.assert_close(log_det, -scale.log())


def test_the_mixture_starts_as_the_standard_normal_and_is_inverted_exactly():
    mixture = MixtureComponent(3, 4).double()
    z, concept = draw(2, 3, 2, 2), draw(2, 4)
    torch.testing.assert_close(mixture(z, concept)[0], z)
    vivid(mixture)
    torch.testing.assert_close(mixture.inverse(mixture(z, concept)[0], concept), z)


# ---- the condition


def coded_condition(n: int, h: int, w: int, n_codes: int = 5, d_position: int = 4, d_concept: int = 3) -> Condition:
    codes = draw(n_codes, d_position + d_concept)
    index = torch.randint(n_codes, (n, h, w))
    pattern = codes[index].permute(0, 3, 1, 2).clone().requires_grad_()
    concept = draw(n, d_concept).requires_grad_()
    return Condition(pattern, index, pattern.detach(), codes, draw(d_position, h, w), concept)


def test_a_convolution_of_passive_and_condition_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    flow = vivid(ConditionalFlow(5, 4, 3, hidden=6))
    passive, condition = draw(2, 3, 4, 5), draw(2, 4, 4, 5)
    parts = flow.project(condition)
    weights, biases = flow.project.weight.split(6), flow.project.bias.split(6)
    for block, part, weight, bias in zip(flow.blocks, parts, weights, biases):
        whole = torch.cat([block.subnet.conv1.weight, weight], 1)
        expected = F.conv2d(torch.cat([passive, condition], 1), whole, bias, padding=1)
        torch.testing.assert_close(block.subnet.conv1(passive) + part, expected, rtol=1e-10, atol=1e-10)


@few
@given(seed=st.integers(0, 99), n=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6))
def test_looking_codes_up_gives_the_convolution_of_the_condition_and_its_gradients(seed, n, h, w):
    torch.manual_seed(seed)
    projection = vivid(ConditionProjection(10, [2, 2], [6, 5]))
    condition = coded_condition(n, h, w)
    wanted = [condition.pattern, condition.concept, projection.weight, projection.bias]
    direction = [draw(n, 6, h, w), draw(n, 5, h, w)]
    results = []
    for parts in (projection(condition.dense()), projection.from_codes(condition)):
        scalar = sum((part * d).sum() for part, d in zip(parts, direction))
        results.append([*parts, *torch.autograd.grad(scalar, wanted)])
    for dense, looked_up in zip(*results):
        torch.testing.assert_close(looked_up, dense, rtol=1e-10, atol=1e-10)


@few
@given(seed=st.integers(0, 99), n=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6))
def test_a_table_of_all_codes_and_concepts_serves_every_image(seed, n, h, w):
    torch.manual_seed(seed)
    projection = vivid(ConditionProjection(10, [2, 2], [6, 5]))
    concepts = draw(7, 3)
    concept_index = torch.randint(7, (n,))
    coded = coded_condition(n, h, w)
    condition = Condition(
        coded.pattern, coded.index, coded.encoded, coded.codes, coded.position, concepts[concept_index]
    )
    table = projection.table(condition.codes, condition.position, concepts)
    for ours, dense in zip(projection.from_table(table, condition, concept_index), projection(condition.dense())):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)
