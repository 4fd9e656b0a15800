"""Checks for image anomaly detectors, as scikit-learn has them for estimators of tables.

A detector takes images in ``fit``, ``score_samples``, ``decision_function`` and ``predict``, and returns +1 for normal
images and -1 for anomalies. The methods ``anomaly_map`` and ``predict_category`` and the argument ``category`` of
``fit`` are checked if the detector has them. With pytest::

    from vqad.testing import parametrize_with_image_checks

    @parametrize_with_image_checks([MyDetector(n_components=4)])
    def test_keeps_the_contract(estimator, check):
        check(estimator)

Without pytest: ``check_image_detector(MyDetector(n_components=4))``.
"""

from vqad.testing._suite import check_image_detector, image_detector_checks, parametrize_with_image_checks

__all__ = ["check_image_detector", "image_detector_checks", "parametrize_with_image_checks"]
