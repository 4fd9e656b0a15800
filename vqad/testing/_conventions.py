"""Checks of estimator conventions: parameters, attributes, signs, labels."""

from __future__ import annotations

import inspect

import joblib
import numpy as np
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from vqad.testing._tools import (
    crude_defects,
    fitted,
    has_maps,
    image_check,
    methods_of,
    new_images,
    train_images,
    train_labels,
    unfitted,
)


def takes_category(detector) -> bool:
    return "category" in inspect.signature(detector.fit).parameters


@image_check
def check_constructor_only_stores(name, detector):
    """The constructor only stores its arguments: it does not check, copy or add anything."""
    given = {key: object() for key in detector.get_params(deep=False)}
    made = vars(type(detector)(**given))
    assert set(made) == set(given), (
        f"{name}() has the attributes {sorted(made)} and the parameters {sorted(given)}: they must be the same."
    )
    changed = [key for key in given if made[key] is not given[key]]
    assert not changed, f"{name}() does not store {changed} as given: change parameters in fit, into attributes."


@image_check
def check_clone_and_parameters(name, detector):
    """clone copies; set_params sets what get_params returns, and returns the detector."""
    made = clone(detector)
    assert made is not detector, f"clone({name}()) is the detector itself."
    given = {key: object() for key in detector.get_params(deep=False)}
    assert made.set_params(**given) is made, f"{name}.set_params must return the detector."
    told = made.get_params(deep=False)
    wrong = [key for key in given if told.get(key) is not given[key]]
    assert not wrong, f"{name}.get_params does not return what set_params has set for {wrong}."


@image_check
def check_fit_returns_self(name, detector):
    made = unfitted(detector)
    assert made.fit(train_images()) is made, f"{name}.fit must return the detector itself."


@image_check
def check_fit_changes_no_parameter(name, detector):
    made = unfitted(detector)
    before = made.get_params(deep=False)
    digest = {key: joblib.hash(value) for key, value in before.items()}
    made.fit(train_images())
    after = made.get_params(deep=False)
    changed = [key for key in before if after[key] is not before[key] or joblib.hash(after[key]) != digest[key]]
    assert not changed, f"{name}.fit changes the parameters {changed}: clone them, or keep results as attributes."


@image_check
def check_fitted_attributes(name, detector):
    """Attributes added by fit end or start with an underscore."""
    made = unfitted(detector)
    before = set(vars(made))
    made.fit(train_images())
    added = set(vars(made)) - before
    wrong = sorted(key for key in added if not key.endswith("_") and not key.startswith("_"))
    assert not wrong, f"{name}.fit adds the attributes {wrong}: names of public ones end in an underscore."
    assert hasattr(made, "offset_"), f"{name} has no offset_ after fit: decision_function is score_samples - offset_."


@image_check
def check_not_fitted(name, detector):
    for method in methods_of(detector):
        try:
            getattr(unfitted(detector), method)(new_images())
        except NotFittedError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{name}.{method} before fit raises {type(error).__name__}: NotFittedError is expected."
            ) from error
        raise AssertionError(f"{name}.{method} works before fit: NotFittedError is expected.")


@image_check
def check_decision_is_score_minus_offset(name, detector):
    """decision_function is score_samples minus offset_, or minus one of several offsets."""
    made = fitted(detector)
    X = np.concatenate([new_images(), crude_defects()[0]])
    score, decision = made.score_samples(X), made.decision_function(X)
    for method, values in (("score_samples", score), ("decision_function", decision)):
        assert np.shape(values) == (16,), f"{name}.{method} gives shape {np.shape(values)} for 16 images."
        assert np.isfinite(values).all(), f"{name}.{method} gives values that are not finite."
    gap = np.abs(np.asarray(score - decision)[:, None] - np.ravel(made.offset_)).min(axis=1)
    assert gap.max() <= 1e-6 * max(np.abs(score).max(), 1e-12), (
        f"{name}.decision_function must be score_samples - offset_; it is off by up to {gap.max():.3g}."
    )


@image_check
def check_labels_are_signs_of_decisions(name, detector):
    made = fitted(detector)
    X = np.concatenate([new_images(), crude_defects()[0]])
    label = made.predict(X)
    assert np.shape(label) == (16,), f"{name}.predict gives shape {np.shape(label)} for 16 images."
    assert set(np.unique(label)) <= {-1, 1}, f"{name}.predict gives {np.unique(label)}: +1 and -1 are expected."
    expected = np.where(made.decision_function(X) < 0, -1, 1)
    assert np.array_equal(label, expected), f"{name}.predict must be -1 where decision_function < 0, and +1 elsewhere."


@image_check
def check_fit_predict(name, detector):
    expected = fitted(detector).predict(train_images())
    label = unfitted(detector).fit_predict(train_images())
    assert np.array_equal(label, expected), f"{name}.fit_predict(X) is not fit(X).predict(X)."


@image_check
def check_higher_is_more_normal(name, detector):
    """Images with a glaring square score lower on average than images without."""
    made, bad = fitted(detector), crude_defects()[0]
    score, spoilt = made.score_samples(new_images()).mean(), made.score_samples(bad).mean()
    assert spoilt < score, (
        f"{name}.score_samples is {score:.4g} on average for normal images and {spoilt:.4g} with a large defect: "
        "higher must be more normal."
    )


@image_check(applies=has_maps)
def check_anomaly_map_form(name, detector):
    """Maps are finite float32 of the images' sizes: an array if all sizes are equal, else a list."""
    made, X = fitted(detector), new_images()
    maps = made.anomaly_map(X)
    assert isinstance(maps, np.ndarray), f"{name}.anomaly_map gives {type(maps).__name__}: an array is expected."
    assert maps.shape == (8, 64, 64), f"{name}.anomaly_map gives shape {maps.shape} for 8 images of 64 x 64 pixels."
    ragged = made.anomaly_map([X[0], X[1][:50], X[2][:, :40]])
    assert isinstance(ragged, list), f"{name}.anomaly_map must give a list for images of different sizes."
    shapes = [np.shape(m) for m in ragged]
    assert shapes == [(64, 64), (50, 64), (64, 40)], (
        f"{name}.anomaly_map gives shapes {shapes} for images of 64 x 64, 50 x 64 and 64 x 40 pixels."
    )
    for values in (maps, *ragged):
        assert values.dtype == np.float32, f"{name}.anomaly_map gives {values.dtype}: float32 is expected."
        assert np.isfinite(values).all(), f"{name}.anomaly_map gives values that are not finite."


@image_check(applies=has_maps)
def check_anomaly_map_is_higher_on_defects(name, detector):
    """The map of an image is higher on average on a glaring square than elsewhere."""
    images, masks = crude_defects()
    maps = fitted(detector).anomaly_map(images)
    inside = np.mean([m[mask].mean() for m, mask in zip(maps, masks)])
    outside = np.mean([m[~mask].mean() for m, mask in zip(maps, masks)])
    assert inside > outside, (
        f"{name}.anomaly_map is {inside:.4g} on average on large defects and {outside:.4g} elsewhere: higher must be "
        "more anomalous."
    )


@image_check(applies=takes_category)
def check_category_is_optional(name, detector):
    """fit accepts a category for each image, or none; scoring needs none."""
    for labels in (train_labels(), list(train_labels()), np.arange(24) % 2):
        made = unfitted(detector).fit(train_images(), category=labels)
        score = made.score_samples(new_images())
        assert np.isfinite(score).all(), f"{name} gives scores that are not finite after fit with category."
    fitted(detector)
    try:
        unfitted(detector).fit(train_images(), category=train_labels()[:5])
    except ValueError:
        return
    raise AssertionError(f"{name}.fit accepts 5 labels in category for 24 images: ValueError is expected.")


@image_check(applies=lambda detector: hasattr(detector, "predict_category") and takes_category(detector))
def check_predicted_categories(name, detector):
    """predict_category returns labels given to fit, and is right more often than not."""
    made = unfitted(detector).fit(train_images(), category=train_labels())
    found = np.asarray(made.predict_category(train_images()))
    assert found.shape == (24,), f"{name}.predict_category gives shape {found.shape} for 24 images."
    new = set(found.tolist()) - set(train_labels().tolist())
    assert not new, f"{name}.predict_category gives {sorted(map(str, new))}, which were not among the labels of fit."
    share = (found == train_labels()).mean()
    assert share > 0.5, f"{name}.predict_category is right for {share:.0%} of the training images of two kinds."
