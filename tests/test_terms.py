"""The scorer: its formulas written once more in numpy, and what it promises."""

import numpy as np
import pytest
import torch

from vqad.nn.model import Term
from vqad.nn.terms import LEAST_SPREAD, PRIOR_IMAGES, TermScorer

SHAPES = {"a": (4, 6, 6), "b": (0, 3, 3)}
TERMS = [Term("a", 1.0, (0.0, 0.25)), Term("b", 3.0, (0.0,), is_trained=True)]
ZERO = torch.tensor(0)


def draw(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(n, 4, 6, 6, generator=g), "b": torch.rand(n, 3, 3, generator=g)}


def learned(n=30, **more):
    scorer = TermScorer(TERMS, SHAPES, 1, **more)
    fold, is_held = torch.arange(n) % 3, torch.arange(n) % 3 == 0
    return scorer, *scorer.learn(0, draw(n), fold, is_held)


def test_a_score_is_the_log_of_the_mean_of_exponentials_of_standardised_peaks():
    scorer, _, _ = learned()
    judged = scorer(draw(5, seed=1), ZERO)
    a, b = (judged.standard[name].flatten(1).double().numpy() for name in ("a", "b"))
    peaks = np.stack([a.max(1), np.sort(a, 1)[:, -9:].mean(1), b.max(1)], 1)
    z = (peaks - scorer.peak_center[0].numpy()) / scorer.peak_scale[0].numpy()
    center, scale = scorer.ends[0].tolist()
    weight = [1, 1, 30 / (30 + 60)]
    expected = (np.log(np.average(np.exp(z), axis=1, weights=weight)) - center) / scale
    np.testing.assert_allclose(judged.score.numpy(), expected, rtol=1e-6)


def test_terms_are_standardised_by_place_and_the_map_is_their_weighted_mean():
    scorer, _, _ = learned()
    fields = draw(5, seed=1)
    judged = scorer(fields, ZERO)
    torch.testing.assert_close(judged.terms["b"], fields["b"])
    torch.testing.assert_close(judged.standard["b"], (fields["b"] - scorer.mean_b[0]) / scorer.spread_b[0])
    assert judged.map.shape == (5, 6, 6)
    parts = scorer.contributions(judged.standard)
    torch.testing.assert_close(parts["a"], 0.25 * judged.standard["a"])
    torch.testing.assert_close(sum(parts.values()), judged.map)


def test_new_normal_images_score_about_zero_and_strange_ones_high():
    scorer, own, _ = learned(200)
    new = scorer(draw(400, seed=1), ZERO).score
    assert abs(new.median()) < 0.3
    assert 0.7 < new.std() < 1.4
    assert abs(own.median()) < 0.3
    strange = draw(50, seed=2)
    strange["a"][:, :, 2, 3] += 5.0
    assert (scorer(strange, ZERO).score > new.quantile(0.95)).all()


def test_a_place_counts_by_what_is_normal_there():
    fields = {"c": torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(0))}
    fields["c"][:, :3, :3] *= 20.0
    scorer = TermScorer([Term("c", 1.0, (0.0,))], {"c": (0, 8, 8)}, 1)
    scorer.learn(0, fields, torch.arange(200) % 3, torch.ones(200, dtype=torch.bool))
    assert scorer.spread_c[0, 1, 1] > 2 * scorer.spread_c[0, 6, 6]
    assert scorer.mean_c[0, 1, 1] > 2 * scorer.mean_c[0, 6, 6]


def test_where_a_trained_term_lies_held_out_images_say():
    """On the images trained on it is lower."""
    fields, is_held = draw(200), torch.arange(200) % 2 == 0
    fields["b"][~is_held] *= 0.1
    scorer = TermScorer(TERMS, SHAPES, 1)
    scorer.learn(0, fields, torch.arange(200) % 3, is_held)
    apart = TermScorer(TERMS, SHAPES, 1)
    held = {name: field[is_held] for name, field in fields.items()}
    apart.learn(0, held, torch.arange(100) % 3, torch.ones(100, dtype=torch.bool))
    torch.testing.assert_close(scorer.mean_b, apart.mean_b)
    torch.testing.assert_close(scorer.peak_center[0, 2], apart.peak_center[0, 2])


def test_each_image_is_measured_as_if_it_had_taken_no_part():
    """One image that is unlike all others does not hide itself in the statistics."""
    fields = draw(10)
    fields["b"][4] += 30.0
    scorer = TermScorer([Term("b", 1.0, (0.0,))], SHAPES, 1)
    own, peak = scorer.learn(0, fields, torch.arange(10), torch.ones(10, dtype=torch.bool))
    without = {name: torch.cat([field[:4], field[5:]]) for name, field in fields.items()}
    other = TermScorer([Term("b", 1.0, (0.0,))], SHAPES, 1)
    other.learn(0, without, torch.arange(9), torch.ones(9, dtype=torch.bool))
    judged = other({name: field[4:5] for name, field in fields.items()}, ZERO)
    torch.testing.assert_close(peak[4], judged.map.amax(), rtol=1e-4, atol=1e-4)
    assert own[4] > 10


def test_categories_are_learned_apart_and_keep_every_bit():
    scorer, _, _ = learned()
    new = draw(4, seed=3)
    before = scorer(new, ZERO)
    scorer.add_categories(2)
    assert scorer.n_categories == 3
    other = {name: 7 * field for name, field in draw(20, seed=4).items()}
    scorer.learn(2, other, torch.arange(20) % 3, torch.ones(20, dtype=torch.bool))
    after = scorer(new, ZERO)
    assert torch.equal(before.score, after.score)
    assert torch.equal(before.map, after.map)
    alone = TermScorer(TERMS, SHAPES, 1)
    alone.learn(0, other, torch.arange(20) % 3, torch.ones(20, dtype=torch.bool))
    assert torch.equal(alone(new, ZERO).score, scorer(new, torch.tensor(2)).score)


def test_with_a_peak_of_the_map_terms_need_none():
    scorer, _, _ = learned(map_peak=0.1)
    judged = scorer(draw(5, seed=1), ZERO)
    raw = judged.map.flatten(1).topk(4, 1).values.double().mean(1)
    z = (raw - scorer.peak_center[0, 0]) / scorer.peak_scale[0, 0]
    torch.testing.assert_close(judged.score, (z - scorer.ends[0, 0]) / scorer.ends[0, 1])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images_give_numbers(n):
    scorer = TermScorer(TERMS, SHAPES, 1)
    own, peak = scorer.learn(0, draw(n), torch.arange(n), torch.arange(n) == 0)
    judged = scorer(draw(4, seed=1), ZERO)
    for values in (own, peak, judged.score, judged.map):
        assert values.isfinite().all()


def test_images_that_are_all_the_same_give_numbers():
    fields = {name: field[:1].expand(8, *field.shape[1:]) for name, field in draw(1).items()}
    scorer = TermScorer(TERMS, SHAPES, 1)
    own, _ = scorer.learn(0, fields, torch.arange(8) % 3, torch.ones(8, dtype=torch.bool))
    assert own.isfinite().all()
    assert (scorer.spread_b[0] >= LEAST_SPREAD * scorer.mean_b[0].mean() * 0.999).all()
    assert scorer(draw(3, seed=1), ZERO).score.isfinite().all()


def test_scales_are_pulled_towards_one_where_images_are_few():
    fields = {"b": 1000 * torch.rand(2, 3, 3)}
    scorer = TermScorer([Term("b", 1.0, (0.0,))], SHAPES, 1)
    scorer.learn(0, fields, torch.arange(2), torch.ones(2, dtype=torch.bool))
    assert scorer.ends[0, 1] * (2 + PRIOR_IMAGES) >= PRIOR_IMAGES * 0.999


def test_spreads_are_in_the_units_of_their_term():
    """A thousandth of the values has a thousandth of the spread."""
    spreads = []
    for size in (1.0, 1e-3):
        scorer = TermScorer([Term("b", 1.0, (0.0,))], SHAPES, 1)
        scorer.learn(0, {"b": size * draw(20)["b"]}, torch.arange(20), torch.ones(20, dtype=torch.bool))
        spreads.append(scorer.spread_b)
    torch.testing.assert_close(spreads[1], 1e-3 * spreads[0], rtol=1e-3, atol=0)


def test_a_peak_may_be_of_all_cells_and_of_no_more():
    TermScorer([Term("b", 1.0, (1.0,))], SHAPES, 1)
    with pytest.raises(ValueError, match="share"):
        TermScorer([Term("b", 1.0, (1.5,))], SHAPES, 1)
