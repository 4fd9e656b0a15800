"""Make the model files of the format version that vqad.save writes now, and what they score.

    python tests/data/make_models.py

To be run once for each format version, before its first release: the files of a released version stay as they are, for
ever, because they stand for those that users have.
"""

from pathlib import Path

import numpy as np

import vqad
from vqad.persistence import FORMAT_VERSION

HERE = Path(__file__).parent
TRAINING = {"max_iter": 2, "false_alarm_rate": 0.2, "random_state": 0, "precision": "float32"}


def feature_maps(n):
    """Maps (n, 4, 4, 6) of two kinds, of which every sixth has a spot that belongs to neither."""
    rng = np.random.RandomState(0)
    made = 3 * rng.standard_normal((2, 4, 4, 6))[np.arange(n) % 2] + rng.standard_normal((n, 4, 4, 6))
    made[5::6, 1:3, 1:3] = 5 * rng.standard_normal((len(made[5::6]), 2, 2, 6))
    return made.astype(np.float32)


def images(n):
    """Grey images (n, 32, 32) of stripes and of checks, of which every sixth has a blot."""
    rng = np.random.RandomState(0)
    y, x = np.mgrid[:32, :32]
    kinds = np.stack([x // 4 % 2, (x // 8 + y // 8) % 2]) * 100 + 60
    made = kinds[np.arange(n) % 2] + rng.randint(-20, 21, (n, 32, 32))
    made[5::6, 8:16, 12:20] = 250
    return made.astype(np.uint8)


def main():
    small = {"n_codes": 4, "d_model": 8, "n_layers": 1, "n_heads": 2, "dim_feedforward": 8, **TRAINING}
    flow = {"n_concepts": 2, "n_patterns": 4, "d_concept": 4, "d_position": 4, "n_blocks": (1, 1, 1), "hidden": 4}
    cases = {
        "features": (vqad.HVQTransDetector(backbone=None, threshold="category", **small), feature_maps(54)),
        "flow": (vqad.VQFlowDetector(backbone=None, **flow, **TRAINING), feature_maps(54)),
        "images": (
            vqad.HVQTransDetector(weights="random", stages=(1,), patch_size=1, image_size=32, **small),
            images(54),
        ),
    }
    expected = {}
    for name, (detector, X) in cases.items():
        labels = np.array(["even", "odd"])[np.arange(48) % 2]
        normal = np.arange(48) % 6 < 5
        detector.fit(X[:48][normal], category=labels[normal])
        vqad.save(detector, HERE / f"model-{FORMAT_VERSION}-{name}.safetensors")
        new = expected[f"{name}.X"] = X[48:]
        for method in ("score_samples", "decision_function", "p_values", "predict_category", "anomaly_map"):
            expected[f"{name}.{method}"] = getattr(detector, method)(new)
    np.savez_compressed(HERE / f"model-{FORMAT_VERSION}.npz", **expected)


if __name__ == "__main__":
    main()
