"""Both models and both detectors on emulated CUDA: no mixed devices, and no waiting where none is promised."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from emulated_cuda import MixedDevices, emulated_cuda

from vqad import HVQTransDetector, VQFlowDetector
from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.vq_flow import VQFlow
from vqad.training import Trainer, codebooks
from vqad.training_run import TrainingPlan

HVQ = {"d_model": 32, "n_layers": 2, "n_heads": 4, "dim_feedforward": 64, "n_codes": 16, "dropout": 0.1}
FLOW = {"n_concepts": 4, "n_patterns": 8, "d_concept": 8, "d_position": 8, "n_blocks": (2, 2, 2), "hidden": 16}
SMALL = {
    HVQTransDetector: {"d_model": 16, "n_codes": 8},
    VQFlowDetector: {"n_concepts": 4, "n_patterns": 8, "d_concept": 8, "hidden": 8},
}


@pytest.fixture
def cuda(monkeypatch):
    with emulated_cuda(monkeypatch) as state:
        yield state


def test_emulation_refuses_what_cuda_refuses(cuda):
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.device.type == "cuda"
    assert here.device.type == "cpu"
    with pytest.raises(MixedDevices):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        (2 * there).numpy()
    with pytest.raises(MixedDevices):
        here[torch.zeros(2, dtype=torch.long, device="cuda")]
    assert (there * 2).cpu().numpy().tolist() == [2, 2, 2]


def test_emulation_counts_what_cuda_waits_for(cuda):
    x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    (x * 2 + 1).exp_()
    assert not cuda.waits
    assert cuda.kernels.total() == 3
    for wait in (lambda: float(x.sum()), lambda: x[x > 0], lambda: x.cpu(), lambda: torch.ones(3).to(x), x.tolist):
        cuda.reset()
        wait()
        assert cuda.waits.total() >= 1


# ---- a training step -----------------------------------------------------------------------------


def hvq(n_categories=6, **options):
    torch.manual_seed(0)
    model = HVQTrans(24, (8, 8), n_categories, **{**HVQ, **options})
    features, category = torch.randn(8, 24, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    model.start([(features, category)])
    return model, [features], category


def flow(**options):
    torch.manual_seed(0)
    model = VQFlow((8, 12, 16, 20), **{**FLOW, **options})
    features = [torch.randn(8, c, s, s) for c, s in zip((8, 12, 16, 20), (32, 16, 8, 4))]
    model.start([(features, torch.zeros(8, dtype=torch.long))])
    return model, features, torch.zeros(8, dtype=torch.long)


class Kept:
    """Features of eight images, again and again."""

    def __init__(self, features):
        self.features, self.is_there = features, features[0].device.type == "cuda"

    def __len__(self):
        return len(self.features[0])

    def batch(self, indices):
        rows = indices.pin_memory().to(self.features[0].device, non_blocking=True) if self.is_there else indices
        features = [f.index_select(0, rows) for f in self.features]
        return features[0] if len(features) == 1 else features


def trained(model, features, category, device, n_passes=4):
    plan = TrainingPlan(max_iter=n_passes, batch_size=8, clip_norm=model.clip_norm)
    trainer = Trainer(model, Kept(features), category, plan, device=device)
    return trainer.fit(torch.arange(8))


MODELS = {
    "nearest": (hvq, {"transport": "nearest", "transport_weight": 0.1}),
    "conditional": (hvq, {"transport": "conditional", "transport_weight": 0.1}),
    "sinkhorn": (hvq, {"transport": "sinkhorn", "transport_weight": 0.1}),
    "patches": (hvq, {"patch_size": 2}),
    "flow": (flow, {"noise": 0.1}),
    "convolution": (flow, {"condition_path": "convolution"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_waits_for_nothing(cuda, name):
    make, options = MODELS[name]
    model, features, category = make(**options)
    model.to("cuda").train()
    features = [f.to("cuda") for f in features]
    cuda.reset()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, foreach=True)
    for _ in range(2):
        cuda.reset()
        optimizer.zero_grad(set_to_none=True)
        model.loss(features[0] if len(features) == 1 else features, category).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), model.clip_norm)
        optimizer.step()
        for codebook in codebooks(model):
            codebook.step()
    own = {key: n for key, n in cuda.waits.items() if key[1] != "elsewhere"}
    if name == "sinkhorn":  # the iterations are those of a library
        own = {key: n for key, n in own.items() if not key[1].startswith("nn/transport.py")}
    assert not own


@pytest.mark.parametrize("make", [hvq, flow])
def test_training_waits_once_a_pass(cuda, make):
    model, features, category = make()
    features = [f.to("cuda") for f in features]
    waits = []
    for n_passes in (3, 6):
        cuda.reset()
        trained(model, features, category, torch.device("cuda"), n_passes)
        waits.append(cuda.waits)
    more = {key: n for key, n in (waits[1] - waits[0]).items() if not key[1].startswith("engine.py")}  # to and fro
    assert sum(more.values()) <= 3 * 3  # of each pass the loss, and how many codes are in use


@pytest.mark.parametrize("make", [hvq, flow])
def test_training_and_fields_on_the_device_are_those_on_the_host(monkeypatch, make):
    options = {"dropout": 0.0} if make is hvq else {}
    (model, features, category), (other, _, _) = make(**options), make(**options)
    expected = model.eval().fields(features[0] if make is hvq else features, category[:1].expand(8), True)
    log = trained(model, features, category, torch.device("cpu"))
    with emulated_cuda(monkeypatch):
        there = [f.to("cuda") for f in features]
        fields = other.to("cuda").eval().fields(there[0] if make is hvq else there, category[:1].expand(8), True)
        for name, field in fields.items():
            torch.testing.assert_close(field.cpu(), expected[name], rtol=1e-4, atol=1e-5)
        curve = trained(other, there, category, torch.device("cuda")).loss_curve
    np.testing.assert_allclose(curve, log.loss_curve, rtol=1e-4)


# ---- the detectors -------------------------------------------------------------------------------


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((n, 64, 64, 3)) * 255).astype(np.uint8)


@pytest.fixture(params=[HVQTransDetector, VQFlowDetector])
def make(request):
    def make(**options):
        return request.param(
            weights="random", image_size=64, max_iter=1, random_state=0, false_alarm_rate=0.3,
            **{**SMALL[request.param], **options},
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_a_detector_does_all_of_its_work_on_the_device(cuda, make, tmp_path):
    X, category = images(24), np.repeat(["a", "b"], 12)
    detector = make(device="cuda", precision="float32", early_stopping=True, checkpoint_dir=tmp_path)
    detector.fit(X, category=category)
    scores = detector.score_samples(X[:5])
    detector.anomaly_map(X[:3])
    detector.explain(X[:2])
    detector.partial_fit(images(12, 1), category=["new"] * 12)
    assert np.isfinite(detector.score_samples(images(3, 2))).all()
    if hasattr(detector, "predict_concept"):
        detector.predict_concept(X[:2])
    assert all(p not in cuda.on_device for p in detector.fitted_.scorer.parameters()), (
        "a fitted model rests on the host"
    )
    assert scores.shape == (5,)


@pytest.mark.slow
def test_images_in_tiles_are_worked_on_on_the_device(cuda, make):
    X, mask = images(10)[:, :, :48], np.zeros((64, 48), bool)
    mask[:10] = True
    detector = make(device="cuda", precision="float32", tiles=(48, 16), ignore=mask).fit(X)
    there = detector.score_samples(X[:4])
    again = pickle.loads(pickle.dumps(detector))  # of which nothing is kept on the device
    np.testing.assert_array_equal(again.score_samples(X[:4]), there)
    detector.explain(X[:1])
    detector.recalibrate(images(6, 1)[:, :, :48])
    on_host = make(device="cpu", tiles=(48, 16), ignore=mask).fit(X)
    expected = on_host.score_samples(X[:4])
    on_host.set_params(device="cuda", precision="float32")
    np.testing.assert_allclose(on_host.score_samples(X[:4]), expected, atol=1e-2)


@pytest.mark.slow
def test_the_second_call_copies_no_module(cuda, make):
    detector = make(device="cuda", precision="float32").fit(images(16))
    X = images(1, 3)
    detector.score_samples(X)
    cuda.reset()
    detector.score_samples(X)
    assert cuda.copies.total() <= 12  # pixels in; categories, distances and scores out


@pytest.mark.slow
def test_scores_on_the_device_are_those_on_the_host(monkeypatch, make):
    X = images(16)
    detector = make(device="cpu").fit(X)
    expected = detector.score_samples(X)
    detector.set_params(device="cuda", precision="float32")
    with emulated_cuda(monkeypatch):
        there = detector.score_samples(X)
    np.testing.assert_allclose(there, expected, atol=1e-3)
