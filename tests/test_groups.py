"""Images that belong together, such as several pictures of one piece, are held out together."""

import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import cross_validate

import vqad.extending
from vqad import HVQTransDetector
from vqad._checks import check_groups
from vqad.model_selection import InlierKFold, image_auroc_scorer
from vqad.splitting import hold_out

SMALL = HVQTransDetector(
    backbone=None, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=1, batch_size=60,
    false_alarm_rate=0.4, random_state=0,
)  # fmt: skip
CENTER = 8 * np.random.default_rng(5).standard_normal((2, 6))


def draw_pieces(n_pieces, n_pictures, seed):
    """Pictures (n, 6) of pieces of two kinds; those of one piece are nearly alike. And of each its piece and kind."""
    rng = np.random.default_rng(seed)
    piece = np.repeat(np.arange(n_pieces), n_pictures)
    own = CENTER[np.arange(n_pieces) % 2] + rng.standard_normal((n_pieces, 6))
    return own[piece] + 0.1 * rng.standard_normal((len(piece), 6)), piece, piece % 2


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=60),
    st.floats(0.05, 0.9),
    st.integers(0, 2**33),
)
def test_of_each_category_a_share_of_the_groups_is_held_out_and_of_each_one_image(images, fraction, seed):
    index, groups = (np.array(column) for column in zip(*images))
    keep, held = hold_out(index, fraction, seed, groups)
    assert (np.diff(keep) > 0).all()
    assert (np.diff(held) > 0).all()
    for c in np.unique(index):
        kept, chosen, every = groups[keep][index[keep] == c], groups[held][index[held] == c], groups[index == c]
        n = len(np.unique(every))
        assert len(chosen) == len(np.unique(chosen)) == min(n - 1, max(1, round(fraction * n)))
        # All others, whole, are kept.
        np.testing.assert_array_equal(np.sort(kept), np.sort(every[~np.isin(every, chosen)]))


def test_categories_with_the_same_groups_hold_out_the_same():
    index, groups = np.repeat([0, 1, 2], 40), np.tile(np.repeat(np.arange(10), 4), 3)
    for seed in range(5):
        _, held = hold_out(index, 0.3, seed, groups)
        first, *others = (set(groups[held[index[held] == c]]) for c in range(3))
        assert others == [first, first]


def test_every_image_of_a_group_may_be_the_one():
    groups, seen = np.repeat(np.arange(4), 5), set()
    for seed in range(300):
        seen.update(hold_out(np.zeros(20, dtype=int), 0.25, seed, groups)[1].tolist())
    assert seen == set(range(20))


@pytest.mark.slow
def test_false_alarms_on_new_pieces_are_no_more_than_asked():
    """Of six pictures of each of 20 pieces; without groups the thresholds are of further pictures of the same ones."""
    shares = {True: [], False: []}
    for seed in range(30):
        X, piece, kind = draw_pieces(20, 6, 2 * seed)
        new, _, _ = draw_pieces(100, 1, 2 * seed + 1)
        for told, share in shares.items():
            if not told and seed >= 10:  # which is plain sooner
                continue
            made = clone(SMALL).set_params(random_state=seed, calibration_fraction=0.4, false_alarm_rate=0.2)
            made.fit(X, category=kind, groups=piece if told else None)
            share.append([(made.predict(new) == -1).mean(), (made.p_values(new) <= 0.2).mean()])
    told, untold = (np.array(shares[key]) for key in (True, False))
    assert (told.mean(0) <= 0.2 + 3 * told.std(0) / np.sqrt(30)).all()
    # It is no empty promise; of few images cross-fitted distances are longer than those of new ones: on the safe side.
    assert (told.mean(0) > 0.05).all()
    assert (untold.mean(0) > 0.4).all()


def test_other_images_of_a_group_that_is_held_out_set_neither_model_nor_scales():
    X, piece, kind = draw_pieces(20, 4, 0)
    keep, held = hold_out(kind, 0.2, clone(SMALL).fit(X, category=kind, groups=piece).fitted_.seed, piece)
    moved = X.copy()
    others = np.setdiff1d(np.arange(len(X)), np.append(keep, held))
    assert len(others) == 3 * len(held) == 12
    moved[others] += 0.05
    one, other = (clone(SMALL).fit(x, category=kind, groups=piece) for x in (X, moved))
    np.testing.assert_array_equal(one.score_samples(X[keep]), other.score_samples(X[keep]))
    assert one.offset_ == other.offset_
    moved[held] += 0.05
    assert clone(SMALL).fit(moved, category=kind, groups=piece).offset_ != one.offset_


@pytest.mark.parametrize(
    "label",
    [
        str,
        float,
        "piece {}".format,
        lambda k: (int(k), "a"),
        lambda k: (0,) * k,
        torch.tensor,
        np.array,
        lambda k: 10**30 + int(k),
    ],
)
def test_labels_of_groups_are_any_that_hash(label):
    piece = np.arange(30) // 3
    np.testing.assert_array_equal(check_groups([label(k) for k in piece], 30), piece)


def test_labels_of_groups_come_in_a_series_too():
    piece = np.arange(30) // 3
    for dtype in ("category", "string", "Int64"):
        groups = pd.Series(piece, index=np.arange(30)[::-1]).astype(dtype)
        np.testing.assert_array_equal(check_groups(groups, 30), piece)
    np.testing.assert_array_equal(check_groups(pd.Series(pd.to_datetime(piece, unit="D")), 30), piece)


def test_groups_of_one_image_each_are_none():
    X, _, kind = draw_pieces(30, 1, 0)
    made = clone(SMALL).fit(X, category=kind, groups=np.arange(30)[::-1])
    np.testing.assert_array_equal(made.score_samples(X), clone(SMALL).fit(X, category=kind).score_samples(X))


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ([1, 2], r"groups has shape \(2,\), but X has 30 images: one group each is expected"),
        ([None] * 3 + [1] * 27, "groups is missing for 3 images: give each image a group, if need be of its own"),
        (pd.to_datetime([None] * 2 + ["2020-01-01"] * 28), "groups is missing for 2 images"),
        ([[1]] * 30, "groups must have hashable labels, such as str or int: unhashable type: 'list'"),
    ],
)
def test_wrong_groups_are_explained(groups, match):
    X, _, kind = draw_pieces(10, 3, 0)
    with pytest.raises((ValueError, TypeError), match=match):
        clone(SMALL).fit(X, category=kind, groups=groups)


def test_anomalies_are_left_out_with_their_groups():
    X, piece, kind = draw_pieces(12, 3, 0)
    y = np.where(piece >= 10, -1, 1)
    made = clone(SMALL).fit(X, y, category=kind, groups=piece)
    assert made.offset_ == clone(SMALL).fit(X[:30], category=kind[:30], groups=piece[:30]).offset_


def test_a_category_of_one_group_is_spoken_of():
    X, piece, kind = draw_pieces(11, 4, 0)
    kind = np.where(piece == 10, 2, kind)
    with pytest.warns(UserWarning, match="Category 2 has a single group, which does not show"):
        clone(SMALL).fit(X, category=kind, groups=piece)
    with pytest.raises(ValueError, match="needs at least 2 groups of each category; 2 has 1"):
        clone(SMALL).set_params(threshold="category").fit(X, category=kind, groups=piece)
    with pytest.warns(
        UserWarning, match="There are too few groups to hold any out: thresholds come from the training images"
    ):
        clone(SMALL).fit(X, groups=np.zeros(44))


def test_large_groups_that_are_held_out_are_spoken_of():
    X, _, kind = draw_pieces(45, 1, 0)
    X, groups = X[kind == 0], np.minimum(np.arange(23), 4)  # one of 19 images
    said = []
    for seed in (2, 3):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            made = clone(SMALL).set_params(random_state=seed).fit(X, category=["a"] * 23, groups=groups)
        is_large = 4 in groups[hold_out(np.zeros(23, dtype=int), 0.2, made.fitted_.seed, groups)[1]]
        said.append(any("18 of 23 images are not used" in str(w.message) for w in record))
        assert said[-1] == is_large
    assert len(set(said)) == 2


@pytest.mark.parametrize("n_kinds", [1, 2])
def test_pictures_of_one_piece_are_no_category(n_kinds):
    center, rng = 20 * np.random.default_rng(1).standard_normal((2, 6)), np.random.default_rng(0)
    kind = np.arange(24) % n_kinds
    X = np.repeat(center[kind] + rng.standard_normal((24, 6)), 6, axis=0) + 0.1 * rng.standard_normal((144, 6))
    piece = np.repeat(np.arange(24), 6)
    made = clone(SMALL).fit(X, groups=piece)
    np.testing.assert_array_equal(made.categories_, np.arange(n_kinds))
    assert len(made.fitted_.held_out.score) == n_kinds * round(0.2 * 24 / n_kinds)
    with pytest.warns(UserWarning, match="categories were discovered in 144 images"):
        assert len(clone(SMALL).fit(X).categories_) > 10  # which is why


def test_partial_fit_takes_pictures_of_one_unlike_piece_for_no_category():
    X, piece, kind = draw_pieces(20, 3, 0)
    made = clone(SMALL).fit(X, category=kind, groups=piece)
    new = 90 + np.random.default_rng(2).standard_normal((36, 6))
    with pytest.warns(UserWarning, match="18 images of 3 groups are too far .* left out"):
        made.partial_fit(new[:18], groups=np.arange(18) // 6)
    with pytest.warns(UserWarning, match="36 images are too far .* form new ones: 2"):
        made.partial_fit(new, groups=np.arange(36) // 6)
    assert list(made.categories_) == [0, 1, 2]


def test_early_stopping_watches_groups_that_are_not_trained_on():
    X, piece, kind = draw_pieces(20, 3, 0)
    made = clone(SMALL).set_params(early_stopping=True, max_iter=2).fit(X, category=kind, groups=piece)
    assert len(made.validation_curve_) == 2
    assert np.isfinite(made.score_samples(X)).all()


def test_partial_fit_holds_out_groups_too(monkeypatch):
    X, piece, kind = draw_pieces(20, 4, 0)
    made, seen = clone(SMALL).fit(X, category=kind, groups=piece), []
    learn_terms = vqad.extending.learn_terms
    monkeypatch.setattr("vqad.extending.learn_terms", lambda *args: seen.append(args[1]) or learn_terms(*args))
    more, piece, kind = draw_pieces(10, 4, 1)
    kind = np.where(kind == 1, 1, 2)  # one that is known, and a new one
    made.partial_fit(more, category=kind, groups=piece)
    (learned,) = seen
    index, train, held = learned.category, learned.train, learned.held_out
    assert sorted(kind[held]) == [1, 2]
    assert not set(piece[train]) & set(piece[held])
    np.testing.assert_array_equal(np.flatnonzero(index >= 0), np.union1d(train, held))
    assert len(train) == 32


def test_a_checkpoint_is_of_its_groups(tmp_path):
    X, piece, kind = draw_pieces(10, 4, 0)
    for groups in (None, piece, piece // 2, piece):
        clone(SMALL).set_params(checkpoint_dir=tmp_path).fit(X, category=kind, groups=groups)
    assert len(list(tmp_path.iterdir())) == 3


# ---- folds ---------------------------------------------------------------------------------------


def test_a_group_is_in_one_fold():
    piece = np.repeat(np.arange(20), 3)
    y = np.where((piece >= 15) & (np.arange(60) % 3 == 0), -1, 1)  # anomalies among normal pictures of a piece
    tested = []
    for train, test in InlierKFold(5, random_state=0).split(np.zeros(60), y, groups=piece, category=piece % 2):
        assert not set(piece[train]) & set(piece[test])
        assert (y[train] == 1).all()
        assert (y[test] == -1).sum() == 1
        assert len(test) == 12
        tested += test.tolist()
    assert sorted(tested) == list(range(60))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_clean", [0, 2, 3, 8])
def test_every_fold_has_normal_samples_where_groups_have_both(n_clean, shuffle):
    day = np.repeat(np.arange(8), 10)
    y = np.where((np.arange(80) % 10 == 0) & (day >= n_clean), -1, 1)
    for train, test in InlierKFold(4, shuffle=shuffle).split(np.zeros(80), y, groups=day):
        assert len(test) == 20
        assert (y[test] == 1).any()
        assert (y[train] == 1).all()
        assert not set(day[train]) & set(day[test])


def test_more_folds_than_groups_are_refused():
    with pytest.raises(ValueError, match=r"n_splits=5 folds need as many groups with a normal sample .*; got 3"):
        next(InlierKFold(5).split(np.zeros(12), np.ones(12), groups=np.arange(12) % 3))


def test_groups_arrive_by_metadata_routing():
    X, piece, _ = draw_pieces(20, 3, 0)
    X[piece >= 15] += 9
    y = np.where(piece >= 15, -1, 1)
    with sklearn.config_context(enable_metadata_routing=True):
        detector = clone(SMALL).set_fit_request(groups=True, category=False)
        folds = InlierKFold(3, random_state=0)
        found = cross_validate(
            detector, X, y, params={"groups": piece}, cv=folds, scoring=image_auroc_scorer, return_estimator=True,
            error_score="raise",
        )  # fmt: skip
    assert np.mean(found["test_score"]) > 0.9
    for estimator, (train, _) in zip(found["estimator"], InlierKFold(3, random_state=0).split(X, y, groups=piece)):
        held = hold_out(
            np.zeros(len(train), dtype=int), 0.2, estimator.fitted_.seed, check_groups(piece[train], len(train))
        )
        assert len(estimator.fitted_.held_out.score) == len(held[1]) == 2
