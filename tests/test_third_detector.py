"""A third detector, as anyone may add one: a model, a class, one line in the registry."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vqad
from vqad import registry
from vqad.base import BaseImageDetector
from vqad.cli import main
from vqad.datasets import make_textured_parts
from vqad.nn.model import AnomalyModel, Term
from vqad.nn.quantize import VectorQuantizer
from vqad.testing import parametrize_with_image_checks


class NearestCode(AnomalyModel):
    """How far the cells of the first map are from the nearest of their category's codes."""

    clip_norm = 1.0

    def __init__(self, dim, n_codes, n_categories):
        super().__init__()
        self.dim, self.n_codes = dim, n_codes
        self.shift = nn.Parameter(torch.zeros(dim))
        self.codebook = VectorQuantizer(n_codes, dim, n_groups=n_categories)

    n_categories = property(lambda self: self.codebook.n_groups)

    def tokens(self, features):
        return features.flatten(2).mT + self.shift

    def loss(self, features, category):
        return self.codebook(self.tokens(features), category).loss.mean()

    def fields(self, features, category, gaussian):
        tokens = self.tokens(features)
        missed = (tokens - self.codebook.look_up(tokens, category)[0]).mT.reshape(features.shape)
        return {"missed": missed if gaussian else missed.norm(dim=1)}

    def terms(self, gaussian):
        return [Term("missed", 1.0, (0.0,) if gaussian else (), is_trained=True)], None if gaussian else 0.01

    def codebooks(self):
        return {"code": self.codebook}

    def codes(self, features, category):
        tokens = self.tokens(features)
        code, index = self.codebook.look_up(tokens, category)
        grid = (-1, *features.shape[2:])
        return {"code": (index.view(grid), (tokens - code).norm(dim=-1).view(grid))}

    def start(self, batches):
        for c in range(self.n_categories):
            own = torch.cat([self.tokens(x[category == c]).flatten(0, 1) for x, category in batches])
            self.codebook.initialise(own[None].detach(), torch.tensor([c]))


class NearestCodeDetector(BaseImageDetector):
    """The detector."""

    model_class = NearestCode

    def __init__(self, *, n_codes=8, **shared):
        super().__init__(**shared)
        self.n_codes = n_codes

    def _stages(self, strides):
        return (2, 3), True

    def _model_config(self, shape, n_categories, n_added):
        return {"dim": shape.channels[0], "n_codes": self.n_codes, "n_categories": n_categories}


registry.register("nearest-code", NearestCodeDetector)

OF_FEW_LAYERS = {"backbone": "test_efficientnet", "weights": "random", "image_size": 64}


@pytest.mark.slow
@parametrize_with_image_checks([NearestCodeDetector(max_iter=1, n_codes=4, false_alarm_rate=0.2, **OF_FEW_LAYERS)])
def test_it_passes_all_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("gaussian", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_is_saved_loaded_explained_and_exported(gaussian, tmp_path):
    parts = make_textured_parts(n_normal=12, n_anomalous=3, image_size=64, random_state=0)
    detector = NearestCodeDetector(max_iter=2, false_alarm_rate=0.2, gaussian=gaussian, random_state=0, **OF_FEW_LAYERS)
    detector.fit(parts.images, parts.target, category=parts.category)
    path = tmp_path / "model.safetensors"
    vqad.save(detector, path)
    np.testing.assert_array_equal(vqad.load(path).score_samples(parts.images), detector.score_samples(parts.images))
    explanation = detector.explain(parts.images[:1])[0]
    assert detector.prototypes_.of(explanation, "code").thumbnail.shape == (32, 32, 3)
    vqad.export_onnx(detector, tmp_path / "model.onnx")


def test_the_command_fits_it(tmp_path):
    parts = make_textured_parts(n_normal=6, n_anomalous=0, image_size=64, random_state=0)
    folder = tmp_path / "good"
    folder.mkdir()
    for k, image in enumerate(parts.images):
        Image.fromarray(image).save(folder / f"{k}.png")
    model = str(tmp_path / "m.safetensors")
    wanted = ["--detector", "nearest-code", "--image-size", "64", "--max-iter", "1"]
    assert main(["fit", str(folder), "-o", model, *wanted]) == 0
    assert type(vqad.load(model)) is NearestCodeDetector
