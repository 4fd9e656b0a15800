"""GaussianNoise: what training adds, and scoring never."""

import pytest
import torch

from vqad.nn.noise import GaussianNoise


def test_training_adds_independent_normal_numbers_of_the_width_asked_for():
    x = torch.full((400, 500), 7.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = GaussianNoise(0.5).train()
        first, second = noise(x) - x, noise(x) - x
    n = x.numel()
    for added in (first, second):
        assert abs(float(added.mean())) < 5 * 0.5 / n**0.5
        assert abs(float(added.std()) / 0.5 - 1) < 5 / (2 * n) ** 0.5
        # Of a normal distribution, and of few others, the fourth moment is three times the squared second.
        assert abs(float((added / 0.5).pow(4).mean()) - 3) < 0.2
    assert abs(float((first * second).mean())) < 5 * 0.25 / n**0.5
    assert torch.equal(x, torch.full((400, 500), 7.0))


@pytest.mark.parametrize("noise", [GaussianNoise(0.5).eval(), GaussianNoise(0.0).train()])
def test_scoring_and_a_width_of_zero_add_nothing_and_draw_nothing(noise):
    state = torch.get_rng_state()
    x = torch.ones(3, 4)
    assert noise(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_negative_width_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        GaussianNoise(-1)
