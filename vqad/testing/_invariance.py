"""Checks of invariance: results must not depend on global random states, order, batches, an earlier fit or a pickle."""

from __future__ import annotations

import pickle
import random
from contextlib import contextmanager, nullcontext

import numpy as np

from vqad.testing._tools import (
    assert_same,
    crude_defects,
    fitted,
    has_cuda,
    image_check,
    loaded_torch,
    methods_of,
    new_images,
    outputs,
    train_images,
    unfitted,
)

# Largest difference between devices, as a share of the range of scores: one of them may compute in bfloat16.
DEVICE_TOLERANCE = 0.05


def _has(parameter):
    return lambda detector: parameter in detector.get_params()


def _copy(detector):
    return pickle.loads(pickle.dumps(detector))


def _reseed(seed: int) -> None:
    """Set the global random states."""
    np.random.seed(seed)  # noqa: NPY002 - the global states are what is checked
    random.seed(seed)
    if loaded_torch() is not None:
        loaded_torch().manual_seed(seed)


def _global_states() -> dict[str, bytes]:
    states = {"random": pickle.dumps(random.getstate()), "numpy.random": pickle.dumps(np.random.get_state())}  # noqa: NPY002
    if loaded_torch() is not None:
        states["torch"] = loaded_torch().get_rng_state().numpy().tobytes()
    if has_cuda():
        states["torch.cuda"] = b"".join(s.numpy().tobytes() for s in loaded_torch().cuda.get_rng_state_all())
    return states


@contextmanager
def _global_states_restored():
    """Restore the caller's random states at the end."""
    before, torch = (random.getstate(), np.random.get_state()), loaded_torch()  # noqa: NPY002
    fork = nullcontext() if torch is None else torch.random.fork_rng()
    with fork:
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


@image_check
def check_fit_is_repeatable(name, detector):
    """Two fits with the same random_state give the same scores, whatever the global random states."""
    with _global_states_restored():
        _reseed(1)
        expected = outputs(fitted(detector), new_images())
        _reseed(2)
        actual = outputs(fitted(detector), new_images())
    assert_same(name, actual, expected, "after a second fit with the same random_state")


@image_check
def check_global_random_state_is_left_alone(name, detector):
    fitted(detector).score_samples(new_images())  # import everything that is imported on first use
    with _global_states_restored():
        _reseed(1)  # differs from the states of a detector that seeds them
        before = _global_states()
        made = fitted(detector)
        for method in methods_of(made):
            getattr(made, method)(new_images())
        after = _global_states()
    moved = [key for key in before if after[key] != before[key]]
    assert not moved, f"{name} moves the global random state of {', '.join(moved)}: draw from random_state instead."


@image_check(applies=lambda detector: not detector.get_params().get("warm_start", False))
def check_refit_forgets(name, detector):
    made = unfitted(detector).fit(crude_defects()[0])
    made.fit(train_images())
    assert_same(name, outputs(made, new_images()), outputs(fitted(detector), new_images()), "when it was fitted before")


@image_check
def check_order_of_images(name, detector):
    made, X = fitted(detector), np.concatenate([new_images(), crude_defects()[0]])
    order = np.random.default_rng(0).permutation(len(X))
    shuffled, found = outputs(made, X[order]), outputs(made, X)
    expected = {method: [values[i] for i in order] for method, values in found.items()}
    assert_same(name, shuffled, expected, "when the images come in another order")


@image_check
def check_company_of_images(name, detector):
    """An image scores the same alone and with others."""
    made, X = fitted(detector), np.concatenate([new_images(), crude_defects()[0]])
    expected = outputs(made, X)
    alone = [outputs(made, X[[i]]) for i in range(len(X))]
    actual = {method: [value for one in alone for value in one[method]] for method in expected}
    assert_same(name, actual, expected, "when every image comes alone")


@image_check(applies=_has("batch_size"))
def check_batch_size_of_scoring(name, detector):
    made = fitted(detector)
    expected = outputs(made, new_images())
    for batch_size in (1, 3, 100):
        changed = _copy(made).set_params(batch_size=batch_size)
        assert_same(name, outputs(changed, new_images()), expected, f"with batch_size={batch_size}")


@image_check
def check_pickle(name, detector):
    made = fitted(detector)
    assert_same(name, outputs(_copy(made), new_images()), outputs(made, new_images()), "after pickling")


@image_check(applies=lambda detector: has_cuda() and _has("device")(detector))
def check_pickle_between_devices(name, detector):
    """A detector fitted on one device scores on another, within a twentieth of the range of scores."""
    X = np.concatenate([new_images(), crude_defects()[0]])
    for first, second in (("cuda", "cpu"), ("cpu", "cuda")):
        made = fitted(detector, device=first)
        here, there = made.score_samples(X), _copy(made).set_params(device=second).score_samples(X)
        share = np.abs(here - there).max() / np.ptp(here)
        assert share <= DEVICE_TOLERANCE, (
            f"{name}, fitted on {first}, scores otherwise on {second}: off by {share:.1%} of the range of scores."
        )


@image_check
def check_few_images_are_scored(name, detector):
    """All methods accept one or two images."""
    made = fitted(detector)
    for n in (1, 2):
        for method in methods_of(made):
            found = getattr(made, method)(new_images()[:n])
            assert len(found) == n, f"{name}.{method} gives {len(found)} results for {n} images."


@image_check
def check_fit_on_two_images(name, detector):
    """fit accepts two images, or explains in a ValueError that two images are too few."""
    made = unfitted(detector)
    try:
        made.fit(train_images()[:2])
    except ValueError as error:
        refusal = str(error)
    else:
        score = made.score_samples(new_images())
        assert np.isfinite(score).all(), f"{name} gives scores that are not finite after fit on 2 images."
        return
    assert refusal, f"{name}.fit on 2 images raises a ValueError without a message."
