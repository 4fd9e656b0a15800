"""All checks of a detector: run one after the other, as a generator, or as parameters of a test."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from vqad.testing import _conventions, _forms, _invariance, _mistakes  # noqa: F401 - importing registers their checks
from vqad.testing._tools import CHECKS


def image_detector_checks(detector: Any) -> Iterator[tuple[Any, partial]]:
    """Generate all checks that apply to an image detector.

    Parameters
    ----------
    detector : estimator
        Unfitted, and small enough to be fitted about forty times on 24 images of 64 x 64 pixels. Checks work on clones
        of it, with all its parameters ``random_state`` set to 0.

    Yields
    ------
    detector : estimator
        The given one.
    check : callable
        ``check(detector)`` raises if the detector fails; ``check.func.__name__`` is the name of the check. Checks of
        ``anomaly_map``, ``predict_category``, the argument ``category`` of ``fit`` and the parameter ``batch_size``
        are left out if the detector has none of these, and the check between devices if it has no parameter ``device``
        or torch finds no CUDA device.

    Raises
    ------
    TypeError
        When a class is given instead of an instance.

    Notes
    -----
    Results count as equal if they differ by at most 1e-5 of the range of all values compared.
    """
    if isinstance(detector, type):
        raise TypeError(f"detector must be an instance, such as {detector.__name__}(); got the class.")
    for check, applies in CHECKS:
        if applies(detector):
            yield detector, partial(check, type(detector).__name__)


def parametrize_with_image_checks(detectors: Iterable[Any]) -> Any:
    """Decorator that runs a test for each detector and check.

    Parameters
    ----------
    detectors : iterable of estimators
        As for `image_detector_checks`.

    Returns
    -------
    decorator : pytest.mark.parametrize
        With the arguments ``estimator, check``. Test ids consist of class and check, as in
        ``test_contract[MyDetector-check_pickle]``; several detectors of one class are numbered.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.testing import parametrize_with_image_checks
    >>> @parametrize_with_image_checks([HVQTransDetector(image_size=64, max_iter=1)])
    ... def test_contract(estimator, check):
    ...     check(estimator)
    """
    import pytest

    detectors = list(detectors)
    names = [type(detector).__name__ for detector in detectors]
    cases = []
    for i, (detector, name) in enumerate(zip(detectors, names)):
        label = name if names.count(name) == 1 else f"{name}{i}"
        for estimator, check in image_detector_checks(detector):
            cases.append(pytest.param(estimator, check, id=f"{label}-{check.func.__name__}"))
    return pytest.mark.parametrize(("estimator", "check"), cases)


def check_image_detector(detector: Any, *, on_fail: Literal["raise"] | None = "raise") -> list[dict[str, Any]]:
    """Run all checks on an image detector.

    Parameters
    ----------
    detector : estimator
        As for `image_detector_checks`.
    on_fail : "raise" or None, default="raise"
        Whether to raise an error if checks fail, after all checks have run.

    Returns
    -------
    results : list of dict
        For each check "check_name" (str), "status" ("passed" or "failed") and "exception" (None, or what the check
        raised).

    Raises
    ------
    AssertionError
        With ``on_fail="raise"``, with the names of all failed checks and the reasons.

    Examples
    --------
    >>> from vqad import HVQTransDetector
    >>> from vqad.testing import check_image_detector
    >>> detector = HVQTransDetector(image_size=64, d_model=32, n_codes=16, max_iter=1)
    >>> results = check_image_detector(detector)  # doctest: +SKIP
    """
    if on_fail not in ("raise", None):
        raise ValueError(f"on_fail must be 'raise' or None; got {on_fail!r}.")
    results = []
    for estimator, check in image_detector_checks(detector):
        error = None
        try:
            check(estimator)
        except Exception as raised:
            error = raised
        status = "passed" if error is None else "failed"
        results.append({"check_name": check.func.__name__, "status": status, "exception": error})
    failed = [result for result in results if result["status"] == "failed"]
    if failed and on_fail == "raise":
        lines = [f"  {r['check_name']}: {_last_line(r['exception'])}" for r in failed]
        raise AssertionError(
            f"{type(detector).__name__} fails {len(failed)} of {len(results)} checks:\n" + "\n".join(lines)
        ) from failed[0]["exception"]
    return results


def _last_line(error: Exception) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip()
