"""Properties of the grouped vector quantiser."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqad.nn.quantize import VectorQuantizer


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def clusters(n_images: int, length: int, dim: int, n_clusters: int, spread: float = 0.05) -> Tensor:
    """Vectors around ``n_clusters`` well separated centres, all clusters of about the same size."""
    centres = torch.randn(n_clusters, dim) * 3
    index = torch.randperm(n_images * length) % n_clusters
    return (centres[index] + spread * torch.randn(n_images * length, dim)).view(n_images, length, dim)


def distance_to_codes(quantizer: VectorQuantizer, x: Tensor, group: int = 0) -> Tensor:
    return torch.cdist(x.flatten(0, 1), quantizer.embed[group])


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5),
    length=st.integers(1, 6),
    dim=st.integers(1, 9),
    k=st.integers(1, 12),
    g=st.integers(1, 4),
)
def test_look_up_finds_the_nearest_code_of_the_images_own_group(n, length, dim, k, g):
    quantizer = VectorQuantizer(k, dim, n_groups=g).double().eval()
    x, group = torch.randn(n, length, dim, dtype=torch.float64), torch.randint(g, (n,))
    quantized, indices, loss = quantizer(x, group)
    for i in range(n):
        distance = torch.cdist(x[i], quantizer.embed[group[i]])
        torch.testing.assert_close(distance.gather(1, indices[i][:, None])[:, 0], distance.amin(1))
        torch.testing.assert_close(quantized[i], quantizer.embed[group[i]][indices[i]])
        torch.testing.assert_close(loss[i], (x[i] - quantizer.embed[group[i]][indices[i]]).square().mean())
    torch.testing.assert_close(quantizer.nearest(x, group), indices)


@pytest.mark.parametrize("groups", [1, 2])
def test_look_up_takes_the_first_of_equally_near_codes(groups):
    quantizer = VectorQuantizer(6, 4, n_groups=groups).eval()
    quantizer.embed[:] = torch.randn(groups, 1, 4)
    quantizer.embed[:, [1, 4]] = torch.ones(4)
    indices = quantizer(torch.ones(2, 3, 4), torch.arange(2) % groups).indices
    assert torch.equal(indices, torch.ones_like(indices))


def test_group_left_out_means_the_first_codebook():
    quantizer = VectorQuantizer(7, 3, n_groups=2).eval()
    x = torch.randn(2, 5, 3)
    assert torch.equal(quantizer(x).indices, quantizer(x, torch.zeros(2, dtype=torch.long)).indices)


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_code():
    quantizer = VectorQuantizer(6, 4, n_groups=2).double().eval()
    group = torch.tensor([1, 0, 1])
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream, weight = torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    quantized, indices, loss = quantizer(x, group)
    ((quantized * upstream).sum() + (loss * weight).sum()).backward()
    built_in, x.grad = x.grad, None

    code = torch.stack([quantizer.embed[g][i] for g, i in zip(group, indices)])
    straight = x + (code - x).detach()
    ((straight * upstream).sum() + ((x - code).square().mean((1, 2)) * weight).sum()).backward()
    torch.testing.assert_close(built_in, x.grad)


def reference_update(quantizer: VectorQuantizer, x: Tensor, group: Tensor, indices: Tensor) -> None:
    """The moving average written as the formula reads, one code at a time."""
    gamma, eps, k = quantizer.decay, quantizer.eps, quantizer.n_codes
    for g in set(group.tolist()):
        vectors, assigned = x[group == g].flatten(0, 1), indices[group == g].flatten()
        for code in range(k):
            mine = vectors[assigned == code]
            n = quantizer.cluster_size[g, code]
            quantizer.cluster_size[g, code] = gamma * n + (1 - gamma) * len(mine)
            m = quantizer.embed_avg[g, code]
            quantizer.embed_avg[g, code] = gamma * m + (1 - gamma) * mine.sum(0)
        total = quantizer.cluster_size[g].sum()
        for code in range(k):
            smoothed = (quantizer.cluster_size[g, code] + eps) / (total + k * eps) * total
            quantizer.embed[g, code] = quantizer.embed_avg[g, code] / smoothed


def test_training_step_is_the_moving_average_of_the_formula():
    quantizer = VectorQuantizer(5, 3, n_groups=4, decay=0.9).double()
    expected = copy.deepcopy(quantizer)
    for _ in range(3):
        x, group = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([2, 0, 2, 3])
        output = quantizer(x, group)
        quantizer.step()
        reference_update(expected, x, group, output.indices)
    for name in ("cluster_size", "embed_avg", "embed"):
        torch.testing.assert_close(getattr(quantizer, name), getattr(expected, name))


@pytest.mark.parametrize("n_parts", [2, 4])
def test_step_after_parts_of_a_batch_is_that_after_the_whole(n_parts):
    whole = VectorQuantizer(5, 3, n_groups=6).double()
    parts = copy.deepcopy(whole)
    x, group = torch.randn(8, 6, 3, dtype=torch.float64), torch.tensor([5, 0, 3, 3, 1, 0, 5, 3])
    whole(x, group)
    for some, own in zip(x.chunk(n_parts), group.chunk(n_parts)):
        parts(some, own)
    for quantizer in (whole, parts):
        quantizer.step()
        quantizer.step()  # of which nothing is left
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value)


def test_forward_pass_moves_nothing_and_what_is_forgotten_neither():
    quantizer = VectorQuantizer(5, 3, n_groups=2)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(2, 6, 3), torch.tensor([1, 0]))
    quantizer.forget()
    quantizer.step()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_training_step_leaves_absent_groups_as_they_are():
    quantizer = VectorQuantizer(5, 3, n_groups=3)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(2, 6, 3), torch.tensor([1, 1]))
    quantizer.step()
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        assert not torch.equal(value[1], before[name][1])


def test_groups_of_one_batch_do_not_touch_each_other():
    together = VectorQuantizer(5, 3, n_groups=2).double()
    apart = copy.deepcopy(together)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    together(x, torch.tensor([0, 1, 0, 1]))
    together.step()
    for g in (0, 1):
        apart(x[g::2], torch.tensor([g, g]))
        apart.step()
    for name, value in together.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name])


def test_evaluation_changes_nothing():
    quantizer = VectorQuantizer(5, 3, revive_threshold=0.5).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.randn(2, 6, 3))
    quantizer.step(revive=True)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_look_up_under_autocast_is_nearly_the_nearest_in_spite_of_a_large_common_offset():
    quantizer = VectorQuantizer(32, 16).eval()
    quantizer.embed += 50
    x = torch.randn(2, 40, 16) + 50
    with torch.autocast("cpu", torch.bfloat16):
        indices = quantizer(x).indices
    distance = distance_to_codes(quantizer, x)
    found = distance.gather(1, indices.view(-1, 1))[:, 0]
    assert (found <= 1.05 * distance.amin(1)).all()


@pytest.mark.parametrize("n_groups", [1, 2])
def test_look_up_of_bfloat16_vectors_is_nearly_the_nearest_in_spite_of_a_large_common_offset(n_groups):
    quantizer = VectorQuantizer(128, 32, n_groups=n_groups).eval()
    quantizer.embed += 30 * torch.randn(32)
    x = (quantizer.embed[:, torch.arange(200) % 128] + torch.randn(n_groups, 200, 32)).bfloat16()
    group = torch.arange(n_groups)
    near = torch.cdist(x.double(), quantizer.embed.double()).argmin(-1)
    indices = quantizer.nearest(x, group)
    assert (indices == near).double().mean() > 0.95


def test_perplexity_counts_the_codes_in_use():
    quantizer = VectorQuantizer(8, 2, n_groups=4)
    quantizer.cluster_size[1] = 3.0
    quantizer.cluster_size[2, 5] = 0.7
    quantizer.cluster_size[3, :2] = torch.tensor([0.2, 0.6])
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    torch.testing.assert_close(quantizer.perplexity(), torch.tensor([0.0, 8.0, 1.0, float(entropy.exp())]))


def test_weights_are_the_shares_of_the_codes_and_positive():
    quantizer = VectorQuantizer(4, 2, n_groups=2).double()
    quantizer.cluster_size[1] = torch.tensor([1.0, 3.0, 0.0, 4.0])
    weights = quantizer.weights(torch.tensor([1, 0, 1]))
    expected = torch.tensor([[1, 3, 0, 4], [2, 2, 2, 2], [1, 3, 0, 4]], dtype=torch.float64) / 8
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)
    assert (weights > 0).all()


def test_initialised_codes_find_the_clusters_of_the_data():
    x = clusters(20, 50, 6, n_clusters=32)
    quantizer = VectorQuantizer(32, 6).eval()
    quantizer.initialise(x)
    picked = x.flatten(0, 1)[torch.randperm(1000)[:32]]
    at_random = torch.cdist(x.flatten(0, 1), picked).amin(1).square().mean()
    assert distance_to_codes(quantizer, x).amin(1).square().mean() < 0.5 * at_random
    assert quantizer.perplexity() > 24


def test_initialised_counts_and_sums_belong_to_the_codes():
    x, group = clusters(12, 40, 5, n_clusters=10).double(), torch.tensor([0, 2] * 6)
    quantizer = VectorQuantizer(16, 5, n_groups=3).double()
    untouched = quantizer.embed[1].clone()
    quantizer.initialise(x, group)
    assert torch.equal(quantizer.embed[1], untouched)
    for g in (0, 2):
        total = quantizer.cluster_size[g].sum()
        torch.testing.assert_close(total, torch.tensor(40.0, dtype=torch.float64))
        smoothed = (quantizer.cluster_size[g] + 1e-5) / (total + 16 * 1e-5) * total
        torch.testing.assert_close(quantizer.embed_avg[g], quantizer.embed[g] * smoothed[:, None])


def test_first_steps_after_initialisation_keep_the_codes_where_the_data_is():
    x = clusters(16, 50, 6, n_clusters=32)
    quantizer = VectorQuantizer(32, 6)
    quantizer.initialise(x)
    before = distance_to_codes(quantizer, x).amin(1).square().mean()
    for image in x:
        quantizer(image[None])
    assert distance_to_codes(quantizer, x).amin(1).square().mean() < 1.1 * before + 1e-3
    assert distance_to_codes(quantizer, x).amin(0).max() < x.flatten(0, 1).norm(dim=1).max()
    assert quantizer.perplexity() > 24


@pytest.mark.parametrize("n_vectors", [1, 3, 8])
def test_initialise_with_no_more_vectors_than_codes_places_a_code_on_each(n_vectors):
    x = torch.randn(1, n_vectors, 4)
    quantizer = VectorQuantizer(8, 4)
    quantizer.initialise(x)
    torch.testing.assert_close(distance_to_codes(quantizer, x).amin(1), torch.zeros(n_vectors), atol=2e-3, rtol=0)
    assert quantizer.embed.isfinite().all()


def test_initialise_on_equal_vectors_stays_finite():
    quantizer = VectorQuantizer(4, 3)
    quantizer.initialise(torch.ones(2, 10, 3))
    torch.testing.assert_close(quantizer.embed, torch.ones(1, 4, 3))
    quantizer(torch.ones(2, 10, 3))
    assert quantizer.embed.isfinite().all()


def test_initialise_with_a_generator_is_reproducible_and_leaves_the_global_state():
    x = torch.randn(10, 30, 4)
    first, second = VectorQuantizer(8, 4), VectorQuantizer(8, 4)
    state = torch.get_rng_state()
    first.initialise(x, generator=torch.Generator().manual_seed(3), max_vectors=200)
    second.initialise(x, generator=torch.Generator().manual_seed(3), max_vectors=200)
    assert torch.equal(first.embed, second.embed)
    assert torch.equal(torch.get_rng_state(), state)


def train(quantizer: VectorQuantizer, x: Tensor, epochs: int) -> None:
    for _ in range(epochs):
        for i, image in enumerate(x):
            quantizer(image[None])
            quantizer.step(revive=i % 16 == 15)


def test_training_revives_dead_codes_only_if_asked_to():
    x = clusters(20, 40, 6, n_clusters=24)
    dead, alive = VectorQuantizer(24, 6), VectorQuantizer(24, 6, revive_threshold=0.05)
    for quantizer in (dead, alive):
        quantizer.initialise(x)
        quantizer.embed[0, 2:] = 1000.0
        quantizer.embed_avg[0, 2:] = 1000.0 * quantizer.cluster_size[0, 2:, None]
        quantizer.cluster_size[0, 2:] = 1e-6
        train(quantizer, x, 10)
    assert (dead.embed[0, 2:] > 100).all()
    assert dead.perplexity() < 3
    assert alive.perplexity() > 16
    assert distance_to_codes(alive, x).amin(1).mean() < 0.5 * distance_to_codes(dead, x).amin(1).mean()


def test_revived_codes_sit_on_vectors_of_their_own_group_that_were_far_from_a_code():
    quantizer = VectorQuantizer(4, 2, n_groups=2, revive_threshold=0.1)
    quantizer.embed[:] = torch.tensor([[0.0, 0.0], [99.0, 99.0], [0.0, 1.0], [1.0, 0.0]])
    quantizer.cluster_size[:] = torch.tensor([5.0, 0.01, 5.0, 5.0])
    x = torch.zeros(2, 16, 2)
    x[0, 3] = torch.tensor([7.0, 7.0])
    untouched = quantizer.embed[1].clone()
    assert quantizer.revive(x, torch.tensor([0, 0])) == 1
    assert torch.equal(quantizer.embed[0, 1], torch.tensor([7.0, 7.0]))
    assert quantizer.cluster_size[0, 1] > 1
    assert torch.equal(quantizer.embed[1], untouched)
    assert quantizer.revive(x, torch.tensor([0, 0])) == 0


def test_added_groups_leave_the_others_bit_identical():
    quantizer = VectorQuantizer(5, 3, n_groups=2, revive_threshold=0.1).double()
    x, group = torch.randn(3, 6, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    quantizer(x, group)
    quantizer.step()
    quantizer.eval()
    before, state = quantizer(x, group), copy.deepcopy(quantizer.state_dict())
    quantizer.add_groups(2)
    assert quantizer.n_groups == 4
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value[:2], state[name])
        assert value.dtype == state[name].dtype
    for old, new in zip(before, quantizer(x, group)):
        assert torch.equal(old, new)
    assert quantizer(x, torch.tensor([3, 2, 3])).quantized.isfinite().all()
