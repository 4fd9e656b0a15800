"""Thresholds: from labelled images against brute force, and what those without labels promise by simulation."""

import pickle
import warnings
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import vqad
from vqad import HVQTransDetector, VQFlowDetector
from vqad.calibration import Learned, Seen, learn_terms, set_thresholds
from vqad.metrics import image_f1_max
from vqad.scoring import FAR_WEIGHT, fields, score_and_map, stored_images
from vqad.splitting import split_rows
from vqad.thresholds import cost_threshold, f1_threshold, recall_threshold

DETECTORS = [
    HVQTransDetector(
        backbone=None, n_codes=8, d_model=16, n_layers=1, n_heads=2, dim_feedforward=16, max_iter=1,
        false_alarm_rate=0.2, random_state=0,
    ),
    VQFlowDetector(
        backbone=None, n_concepts=4, n_patterns=8, d_concept=4, d_position=4, n_blocks=(1, 1, 1), hidden=4, max_iter=1,
        false_alarm_rate=0.2, random_state=0,
    ),
]  # fmt: skip

LABELS = st.sampled_from([1, -1])
# Few values, so that many scores are equal; and any, however close or far apart.
LABELLED = st.lists(st.tuples(st.integers(-4, 4).map(float), LABELS), max_size=25) | st.lists(
    st.tuples(st.floats(-1e300, 1e300), LABELS), max_size=8
)
LABELLED = LABELLED.map(lambda pairs: [(0.0, 1), (1.0, -1), *pairs])


def counts(pairs, threshold):
    """Anomalies found, anomalies missed, and false alarms, when scores under the threshold are called anomalous."""
    found = sum(y == -1 and s < threshold for s, y in pairs)
    return found, sum(y == -1 for _, y in pairs) - found, sum(y == 1 and s < threshold for s, y in pairs)


def all_counts(pairs):
    """Of every way to part the scores in two."""
    return {counts(pairs, t) for t in (*(s for s, _ in pairs), np.inf)}


def arrays(pairs):
    return np.array([s for s, _ in pairs]), np.array([y for _, y in pairs])


def assert_midway(pairs, threshold):
    under = [s for s, _ in pairs if s < threshold]
    rest = [s for s, _ in pairs if s >= threshold]
    if under and rest:
        low, high = max(under), min(rest)
        exact = (Fraction(low) + Fraction(high)) / 2
        assert abs(Fraction(threshold) - exact) <= Fraction(np.spacing(max(abs(low), abs(high))))
    else:
        assert threshold == (min(rest) if rest else np.nextafter(max(under), np.inf))


# ---- functions of scores and labels --------------------------------------------------------------


@given(LABELLED)
def test_f1_threshold_has_the_largest_f1_and_then_the_fewest_false_alarms(pairs):
    def merit(found, missed, false_alarms):
        return Fraction(2 * found, 2 * found + missed + false_alarms), -false_alarms

    threshold = f1_threshold(*arrays(pairs))
    assert merit(*counts(pairs, threshold)) == max(merit(*c) for c in all_counts(pairs))
    assert_midway(pairs, threshold)


@given(LABELLED, st.integers(1, 20))
def test_recall_threshold_is_the_lowest_that_finds_enough(pairs, twentieths):
    n = sum(y == -1 for _, y in pairs)
    threshold = recall_threshold(*arrays(pairs), twentieths / 20)
    enough = [(false, found) for found, _, false in all_counts(pairs) if Fraction(found, n) >= Fraction(twentieths, 20)]
    found, _, false_alarms = counts(pairs, threshold)
    assert (false_alarms, found) == min(enough)
    assert_midway(pairs, threshold)


@given(LABELLED, st.integers(1, 50), st.integers(1, 50))
def test_cost_threshold_has_the_smallest_cost_and_then_the_fewest_false_alarms(pairs, miss_cost, false_alarm_cost):
    def burden(_, missed, false_alarms):
        return miss_cost * missed + false_alarm_cost * false_alarms, false_alarms

    threshold = cost_threshold(*arrays(pairs), miss_cost / 10, false_alarm_cost / 10)  # tenths are no exact floats
    assert burden(*counts(pairs, threshold)) == min(burden(*c) for c in all_counts(pairs))
    assert_midway(pairs, threshold)


def test_thresholds_where_one_says_it_by_hand():
    score, y = np.array([0.0, 1, 2, 3, 4, 5]), np.array([-1, -1, 1, -1, 1, 1])
    assert f1_threshold(score, y) == 3.5  # F1 of 6/7 against 4/5 at 1.5
    assert recall_threshold(score, y, 0.6) == 1.5
    assert recall_threshold(score, y, 0.7) == 3.5
    assert cost_threshold(score, y, 1, 1) == 1.5  # one miss, or one false alarm: the miss
    assert cost_threshold(score, y, 1.01, 1) == 3.5
    assert cost_threshold(-score, y, 1, 9) == -5.0  # nothing is called anomalous
    assert cost_threshold(-score, y, 9, 1) > 0.0  # everything is


# ---- the method ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    """Feature rows of three kinds and their labels; anomalies lie not far off, so that no threshold parts them all."""
    rng = np.random.default_rng(1)
    y = np.where(np.arange(90) < 60, 1, -1)
    X = rows(rng, 90)
    X[y == -1] += 0.8 * rng.standard_normal((30, 8)).astype(np.float32)
    return X, y


def rows(rng, n):
    center = 9 * np.random.default_rng(0).standard_normal((3, 8))
    return (center[np.arange(n) % 3] + rng.standard_normal((n, 8))).astype(np.float32)


def fit(detector, **parameters):
    names = np.array(["bolt", "nut", "screw"])[np.arange(60) % 3]
    return clone(detector).set_params(**parameters).fit(rows(np.random.default_rng(2), 60), category=names)


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda detector: type(detector).__name__)
def detector(request):
    return request.param


@pytest.fixture(scope="module")
def fitted(detector):
    """One threshold for all; not to be changed."""
    return fit(detector)


@pytest.fixture(scope="module")
def per_category(detector):
    """A threshold for each category; not to be changed."""
    return fit(detector, threshold="category", false_alarm_rate=0.3)


def copy_of(made):
    return pickle.loads(pickle.dumps(made))


def test_set_threshold_returns_self_and_reaches_the_largest_f1(fitted, labelled):
    X, y = labelled
    made = copy_of(fitted)
    assert made.set_threshold(X, y) is made
    assert isinstance(made.offset_, float)
    flagged = made.predict(X) == -1
    hits = (flagged & (y == -1)).sum()
    assert 2 * hits / (flagged.sum() + 30) == pytest.approx(image_f1_max(y, -made.score_samples(X)), rel=1e-12)


def test_set_threshold_for_recall_and_cost(fitted, labelled):
    X, y = labelled
    made, score = copy_of(fitted), fitted.score_samples(X)
    for recall in (0.5, 0.9, 1.0):
        made.set_threshold(X, y, "recall", recall=recall)
        assert made.offset_ == recall_threshold(score, y, recall)
        assert (made.predict(X)[y == -1] == -1).mean() >= recall
    cheap, dear = (
        made.set_threshold(X, y, target="cost", miss_cost=miss, false_alarm_cost=5).predict(X) for miss in (0.5, 50)
    )
    assert (cheap[y == 1] == -1).sum() < (dear[y == 1] == -1).sum()
    assert (cheap[y == -1] == -1).sum() < (dear[y == -1] == -1).sum()
    assert made.offset_ == cost_threshold(score, y, 50, 5)


@pytest.mark.parametrize("as_given", [list, lambda y: y.astype(float), lambda y: y.astype(object)])
def test_labels_may_come_in_any_container(fitted, labelled, as_given):
    X, y = labelled
    made = copy_of(fitted).set_threshold(X, as_given(y))
    assert made.offset_ == f1_threshold(fitted.score_samples(X), y)


def test_set_threshold_changes_the_offset_and_nothing_else(fitted, labelled):
    X, y = labelled
    made = copy_of(fitted)
    before = {**vars(made), **vars(made.fitted_), **vars(made.fitted_.thresholds)}
    made.set_threshold(X, y, "recall", recall=1.0)
    assert made.offset_ != fitted.offset_
    after = {**vars(made), **vars(made.fitted_), **vars(made.fitted_.thresholds)}
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if after[name] is not value}
    assert changed == {"_fitted", "thresholds", "offset", "origin"}
    for method in ("score_samples", "p_values", "anomaly_map"):
        np.testing.assert_array_equal(getattr(made, method)(X), getattr(fitted, method)(X))


@pytest.mark.parametrize("threshold", ["global", "category"])
def test_a_threshold_that_was_set_survives_save_and_pickle(fitted, per_category, labelled, tmp_path, threshold):
    X, y = labelled
    made = copy_of(fitted if threshold == "global" else per_category).set_threshold(X, y)
    vqad.save(made, tmp_path / "detector.safetensors")
    for again in (copy_of(made), vqad.load(tmp_path / "detector.safetensors")):
        np.testing.assert_array_equal(again.offset_, made.offset_)
        np.testing.assert_array_equal(again.predict(X), made.predict(X))


def test_each_category_gets_the_threshold_of_the_images_judged_as_it(per_category, labelled):
    X, y = labelled
    made = copy_of(per_category).set_threshold(X, y)
    score, judged = made.score_samples(X), made.predict_category(X)
    expected = [f1_threshold(score[judged == name], y[judged == name]) for name in made.categories_]
    np.testing.assert_array_equal(made.offset_, expected)
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(per_category.score_samples(X), score)


def test_categories_without_both_labels_keep_their_offset_with_a_warning(per_category, labelled):
    X, y = labelled
    judged = per_category.predict_category(X)
    some = ((judged == "bolt") & (y == 1)) | (judged == "nut") | ((judged == "screw") & (y == -1))
    made = copy_of(per_category)
    with pytest.warns(UserWarning, match="without both normal images and anomalies.*: bolt, screw") as record:
        made.set_threshold(X[some], y[some])
    assert record[0].filename == __file__
    np.testing.assert_array_equal(made.offset_[[0, 2]], per_category.offset_[[0, 2]])
    assert made.offset_[1] == f1_threshold(made.score_samples(X[judged == "nut"]), y[judged == "nut"])
    some = ((judged == "bolt") & (y == 1)) | ((judged == "screw") & (y == -1))
    with pytest.raises(
        ValueError, match=r"threshold='category' needs normal images and anomalies.*, but no category has both"
    ):
        made.set_threshold(X[some], y[some])


def test_the_parameter_says_whether_there_is_one_threshold_or_several(fitted, per_category, labelled):
    X, y = labelled
    several = copy_of(fitted).set_params(threshold="category").set_threshold(X, y)
    np.testing.assert_array_equal(several.offset_, copy_of(per_category).set_threshold(X, y).offset_)
    one = copy_of(per_category).set_params(threshold="global").set_threshold(X, y)
    assert one.offset_ == copy_of(fitted).set_threshold(X, y).offset_


def test_fit_and_partial_fit_set_thresholds_anew(fitted, labelled):
    X, y = labelled
    again = copy_of(fitted).set_threshold(X, y, "recall", recall=1.0)
    again.fit(rows(np.random.default_rng(2), 60), category=np.array(["bolt", "nut", "screw"])[np.arange(60) % 3])
    assert again.offset_ == fitted.offset_
    more, names = rows(np.random.default_rng(3), 30), np.array(["bolt", "nut", "screw"])[np.arange(30) % 3]
    plain = copy_of(fitted).partial_fit(more, category=names)
    later = copy_of(fitted).set_threshold(X, y, "recall", recall=1.0).partial_fit(more, category=names)
    assert later.offset_ == plain.offset_


# ---- what goes wrong -----------------------------------------------------------------------------


def test_set_threshold_needs_a_fitted_detector(detector, labelled):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        clone(detector).set_threshold(*labelled)


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (np.arange(90) % 2, r"y must contain only \+1 \(normal\) and -1 \(anomaly\); it also contains '0'"),
        (np.where(np.arange(90) % 2, "good", "bad"), "and -1 .*; it also contains 'bad', 'good'"),
        (np.r_[np.ones(89), np.nan], "and -1 .*; it also contains 'nan'"),
        (-np.ones(90), "y is -1 for all 90 images"),
        (np.ones(7), r"y has shape \(7,\), but X has 90 images"),
        (np.ones((90, 1)), r"y has shape \(90, 1\), but X has 90 images"),
        (None, r"y has shape \(\), but X has 90 images"),
    ],
)
def test_wrong_labels_are_explained(fitted, labelled, y, match):
    made = copy_of(fitted)
    with pytest.raises(ValueError, match=match):
        made.set_threshold(labelled[0], y)
    assert made.offset_ == fitted.offset_


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"target": "f2"}, "'target' parameter of set_threshold must be a str among .*'recall'.* Got 'f2'"),
        ({"target": "recall", "recall": 0}, r"'recall' parameter .* in the range \(0.0, 1.0\]. Got 0"),
        ({"target": "recall", "recall": 1.01}, r"'recall' parameter .* in the range \(0.0, 1.0\]. Got 1.01"),
        ({"target": "cost", "miss_cost": 0}, r"'miss_cost' parameter .* in the range \(0.0, inf\). Got 0"),
        ({"target": "cost", "false_alarm_cost": -1}, r"'false_alarm_cost' parameter .*\(0.0, inf\). Got -1"),
    ],
)
def test_wrong_arguments_are_explained(fitted, labelled, wrong, match):
    with pytest.raises(ValueError, match=match):
        copy_of(fitted).set_threshold(*labelled, **wrong)


def test_a_threshold_is_not_set_for_another_fit(fitted, labelled, monkeypatch):
    detector = copy_of(fitted)
    judge = vqad.judging.judge_anywhere

    def and_fit(*args, **more):
        found = judge(*args, **more)
        detector.fit(labelled[0])
        return found

    monkeypatch.setattr("vqad.judging.judge_anywhere", and_fit)
    with pytest.raises(RuntimeError, match="Another thread fitted the detector while the threshold was set"):
        detector.set_threshold(*labelled)
    assert detector.fitted_.thresholds.origin is None


def test_set_threshold_is_quiet_where_nothing_is_wrong(per_category, labelled):
    detector = copy_of(per_category)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector.set_threshold(*labelled)


# ---- what is promised without labels -------------------------------------------------------------

N_FITS = 40
ALPHAS = (0.05, 0.1, 0.2, 0.3)


def draw_features(form, n):
    """Four kinds, of different spread; maps whose cells have something in common, as those of one image have."""
    rng = np.random.default_rng(4)
    kind = np.arange(n) % 4
    center, spread = 8 * rng.standard_normal((4, 12)), np.exp(0.4 * rng.standard_normal(4))
    if form == "rows":
        return (center[kind] + spread[kind, None] * rng.standard_normal((n, 12))).astype(np.float32), kind
    noise = rng.standard_normal((n, 4, 4, 12)) + 0.7 * rng.standard_normal((n, 1, 1, 12))
    return (center[kind][:, None, None] + spread[kind, None, None, None] * noise).astype(np.float32), kind


class _RememberedFields:
    """Stands for ``stored_images``: what a scorer measures does not change from split to split."""

    def __init__(self, scorer, store, kind, engine):
        self.fields = stored_images(scorer, store, np.arange(len(kind)), kind, engine, fields)

    def __call__(self, scorer, store, rows, category, engine, compute):
        if compute == fields:
            return {name: field[rows] for name, field in self.fields.items()}
        assert compute == score_and_map
        found = {"score": np.empty(len(rows)), "map": [None] * len(rows)}
        for c in np.unique(category):
            own = np.flatnonzero(category == c)
            measured = {name: torch.from_numpy(field[rows[own]]) for name, field in self.fields.items()}
            with torch.inference_mode():
                judged = scorer.terms(measured, torch.tensor(c))
            found["score"][own] = judged.score.numpy()
            for i, heat in zip(own, judged.map.numpy()):
                found["map"][i] = heat
        return {name: np.stack(values) for name, values in found.items()}


@pytest.fixture(scope="module", params=["rows", "maps", "published"])
def trained(request, detector):
    """A detector trained on the first 120 of 800 images, and what is to be measured of all of them."""
    X, kind = draw_features("rows" if request.param == "rows" else "maps", 800)
    made = clone(detector).set_params(gaussian=request.param != "published").fit(X[:120], category=kind[:120])
    source, router, everything = made.map_source(X), made.scorer_.router, np.arange(len(X))
    store, descriptor = source.extract(everything)
    remembered = _RememberedFields(made.scorer_, store, kind, source.engine)
    routed, distance = router(torch.from_numpy(descriptor))
    excess = router.excess(routed, distance).numpy()
    np.testing.assert_array_equal(routed.numpy(), kind)
    assert (excess > 0).mean() < 0.01

    def split(rng, n_held):
        """Calibrate by so many images of each kind, as `fit` does: p-values, labels, kinds and rows of 400 others."""
        drawn = [rng.permutation(120 + np.flatnonzero(kind[120:] == k))[: n_held + 100] for k in range(4)]
        held = np.sort(np.concatenate([rows[:n_held] for rows in drawn]))
        new = np.concatenate([rows[n_held:] for rows in drawn])
        known = np.full(len(kind), -1)  # of the others nothing may be learned
        known[:120], known[held] = kind[:120], kind[held]
        learned, before = Learned(store, descriptor, known, everything[:120], held, None), made.fitted_
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.filterwarnings("ignore", message=".* are too few for false_alarm_rate")
            patch.setattr("vqad.calibration.stored_images", remembered)
            scorer, judged = learn_terms(before.scorer.with_terms(None), learned, source.engine, before.seed)
            thresholds = set_thresholds(
                judged, Seen(), before.categories, "auto", made.false_alarm_rate, made.threshold == "category"
            )
        made._fitted = replace(before, scorer=scorer, held_out=judged, thresholds=thresholds)
        score = remembered(scorer, store, new, kind[new], source.engine, score_and_map)["score"]
        score += FAR_WEIGHT * excess[new]
        label = np.where(-score - thresholds.offset_of(kind[new]) < 0, -1, 1)
        return thresholds.conformal.p_values(score, kind[new]), label, kind[new], new

    return made, X, split


@pytest.mark.parametrize(
    ("threshold", "n_held", "n_splits"),
    [("global", 8, 12),
     *(pytest.param(*case, marks=pytest.mark.slow)
       for case in (("global", 2, 20), ("global", 40, 16), ("category", 8, 20), ("category", 21, 30)))],
)  # fmt: skip
def test_false_alarms_over_many_splits_are_no_more_than_asked(trained, threshold, n_held, n_splits):
    """The scorer learns from the very images that set the threshold, with each left out of what it is judged by."""
    made, _, split = trained
    rng = np.random.default_rng(0)
    n = n_held * (4 if threshold == "global" else 1)
    alpha = next((a for a in (0.1, 0.2) if a * (n + 1) >= 1), 0.4)
    made.set_params(threshold=threshold, false_alarm_rate=alpha)
    p, alarm = [], []
    for _ in range(n_splits):
        found, label, kind, _ = split(rng, n_held)
        p.append([(found <= a).mean() for a in ALPHAS])
        alarm.append([(label[kind == k] == -1).mean() for k in range(4)])
    p, alarm = np.array(p), np.array(alarm)

    def error(values):
        return 3 * values.std(0) / np.sqrt(n_splits)

    assert (p.mean(0) <= np.array(ALPHAS) + error(p)).all()
    assert alarm.mean() <= alpha + error(alarm.mean(1))
    if threshold == "category":
        assert (alarm.mean(0) <= alpha + error(alarm)).all()
    if n_held > 20:
        assert alarm.mean() > 0.5 * alpha  # it is no empty promise


def test_splits_judge_as_the_detector_does(trained):
    made, X, split = trained
    made.set_params(threshold="global", false_alarm_rate=0.2)
    p, label, _, new = split(np.random.default_rng(1), 8)
    np.testing.assert_array_equal(made.p_values(X[new]), p)
    np.testing.assert_array_equal(made.predict(X[new]), label)


@pytest.mark.parametrize(("threshold", "n"), [("global", 32), ("category", 8)])
def test_the_warning_names_the_smallest_rate_that_is_kept(trained, threshold, n):
    """At the rate that it names there is no warning; just under it there is, with the same threshold."""
    made, _, split = trained
    offsets = []
    for rate in (1 / (n + 1), 0.98 / (n + 1)):
        made.set_params(threshold=threshold, false_alarm_rate=rate)
        split(np.random.default_rng(2), 8)
        offsets.append(made.offset_)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            made.conformal_.thresholds(rate, made.categories_)
        assert len(said) == (0 if rate == 1 / (n + 1) else np.size(made.offset_))
        for warning in said:
            assert f"{n} held-out" in str(warning.message)
            assert f"support, {1 / (n + 1):.3g}, is used" in str(warning.message)
    np.testing.assert_array_equal(*offsets)


@pytest.mark.slow
def test_false_alarms_over_many_fits_are_no_more_than_asked(detector):
    """Everything anew in each: images, split, training, routing and scales."""
    center = 8 * np.random.default_rng(5).standard_normal((4, 12))
    rng = np.random.default_rng(6)

    def draw(n):
        return (center[np.arange(n) % 4] + rng.standard_normal((n, 12))).astype(np.float32)

    shares = []
    for seed in range(N_FITS):
        made = clone(detector).set_params(random_state=seed, batch_size=60)
        p = made.fit(draw(60), category=np.arange(60) % 4).p_values(draw(60))
        shares.append([(p <= a).mean() for a in ALPHAS])
    shares = np.array(shares)
    assert (shares.mean(0) <= np.array(ALPHAS) + 3 * shares.std(0) / np.sqrt(N_FITS)).all()
    # Of 15 images of a kind cross-fitted distances are longer than those of new images: the promise is kept with room.
    assert shares[:, 2].mean() > 0.05


@pytest.mark.parametrize("n", [60, 560])
def test_false_alarms_are_no_more_than_asked_with_as_many_channels_as_images(detector, n):
    """Each held-out row has a direction of its own, by which it would look normal if it had been learned from."""
    rate, alarms = 0.1, []
    for seed in range(3):
        X = np.random.default_rng(seed).normal(size=(n + 500, 96)).astype(np.float32)
        made = clone(detector).set_params(random_state=seed, false_alarm_rate=rate, batch_size=60).fit(X[:n])
        alarms.append((made.predict(X[n:]) == -1).mean())
    # Thresholds of a few held-out rows scatter: by 0.08 a fit of 60, 0.03 of 560.
    assert np.mean(alarms) < rate + (0.1 if n == 60 else 0.04)


def test_a_fit_learns_from_all_its_images_and_calibrates_as_if_from_none_held_out(detector):
    """Of 40 images eight are held out, of which one is odd: left out, it is as odd as it would be if new."""
    maps = np.random.default_rng(0).normal(size=(40, 4, 4, 6)).astype(np.float32)
    made = clone(detector).fit(maps)
    held_out = split_rows(np.zeros(40, dtype=int), made.calibration_fraction, made.fitted_.seed)[1]
    odd = maps.copy()
    odd[held_out[0], :2, :, 2] += 9
    made.fit(odd)
    as_seen = -made.score_samples(odd[held_out])
    as_new = np.max(made.conformal_.scores_[0])
    assert as_seen.argmax() == 0
    assert as_new > 1.2 * as_seen[0]
    again = clone(detector).fit(odd)
    for (name, ours), (_, theirs) in zip(again.scorer_.state_dict().items(), made.scorer_.state_dict().items()):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("form", "n", "n_fits"),
    [("maps", 2, 6), ("rows", 3, 6),
     *(pytest.param(form, n, 20, marks=pytest.mark.slow)
       for form, n in (("maps", 2), ("maps", 3), ("rows", 4), ("maps", 8), ("rows", 8)))],
)  # fmt: skip
def test_few_images_of_many_categories_raise_no_more_false_alarms_than_asked(detector, form, n, n_fits):
    """Of two rows a category, of which each is all that is known of the other, that cannot be said."""
    center, rng = 8 * np.random.default_rng(5).standard_normal((6, 12)), np.random.default_rng(6)

    def draw(n):
        kind = np.arange(6 * n) % 6
        noise = rng.standard_normal((6 * n, 4, 4, 12)) + 0.7 * rng.standard_normal((6 * n, 1, 1, 12))
        maps = (center[kind][:, None, None] + noise).astype(np.float32)
        return (maps if form == "maps" else maps[:, 0, 0]), kind

    shares = []
    for seed in range(n_fits):
        X, kind = draw(n)
        made = clone(detector).set_params(random_state=seed, batch_size=60)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* are too few for false_alarm_rate")
            shares.append((made.fit(X, category=kind).predict(draw(10)[0]) == -1).mean())
    assert np.mean(shares) <= 0.2 + 3 * np.std(shares) / np.sqrt(n_fits)
