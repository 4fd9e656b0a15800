"""The training loop, on models small enough to know what must come out."""

import contextlib
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vqad.engine import native_precision, pick_device, seeded
from vqad.nn.quantize import VectorQuantizer
from vqad.training import Trainer, codebook_perplexity
from vqad.training_run import TrainingPlan, one_pass

CPU = torch.device("cpu")


class Source:
    """Features kept in memory, which notes the batches that were asked for."""

    def __init__(self, features):
        self.features, self.batches = features, []

    def __len__(self):
        return len(self.features)

    def batch(self, indices):
        self.batches.append(indices.tolist())
        return self.features[indices]


class Regression(nn.Module):
    """Predicts the last of four numbers from the others; holds a few parameters."""

    def __init__(self, largest_batch=math.inf, interrupt_at=math.inf):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.largest_batch, self.interrupt_at, self.n_calls = largest_batch, interrupt_at, 0

    def loss(self, features, category):
        self.n_calls += 1
        if self.n_calls == self.interrupt_at:
            raise KeyboardInterrupt
        if len(features) > self.largest_batch:
            raise torch.OutOfMemoryError("out of memory")
        assert len(category) == len(features)
        return (self.linear(features[:, :3])[:, 0] - features[:, 3]).square().mean()


class Scripted(nn.Module):
    """Whose validation loss after each pass is given, whatever it learns; it remembers which pass it is."""

    def __init__(self, curve, interrupt_after=math.inf):
        super().__init__()
        self.curve, self.interrupt_after = curve, interrupt_after
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def loss(self, features, category):
        if self.training:
            if self.passes == self.interrupt_after:
                raise KeyboardInterrupt
            self.passes += 1
            return 1 + 0 * self.weight
        return torch.tensor(self.curve[int(self.passes) - 1])


@dataclass(frozen=True)
class RecordingPlan(TrainingPlan):
    asked: list = field(default_factory=list)

    def rate(self, step, n_steps):
        self.asked.append((step, n_steps))
        return super().rate(step, n_steps)


def make_source(n=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    return Source(torch.cat([x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 1], 1))


def make_trainer(model, source=None, **plan):
    source = make_source() if source is None else source
    plan = TrainingPlan(**{"max_iter": 5, "learning_rate": 0.05, "clip_norm": math.inf, **plan})
    return Trainer(model, source, torch.zeros(len(source), dtype=torch.long), plan, device=CPU)


def fit(model, *, validation=None, seed=0, **plan):
    trainer = make_trainer(model, **plan)
    with seeded(seed, CPU):
        log = trainer.fit(torch.arange(40), validation)
    return log, trainer


def regression(**options):
    with seeded(1, CPU):
        return Regression(**options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- what is learned -----------------------------------------------------------------------------


def test_the_loss_falls_to_the_solution():
    model = regression()
    log, _ = fit(model, max_iter=100, weight_decay=0.0)
    assert log.n_iter == len(log.loss_curve) == 100
    assert log.loss_curve[-1] < 1e-3 * log.loss_curve[0]
    torch.testing.assert_close(weights(model), torch.tensor([1.0, -2.0, 0.5, 1.0]), atol=0.05, rtol=0)
    assert not log.interrupted
    assert log.validation_curve == []
    assert log.seconds > 0


def test_a_step_is_adamw_with_clipping():
    """One batch, one pass, without warm-up: compared with torch's own optimiser."""
    model, other = regression(), regression()
    source = make_source()
    fit(model, max_iter=1, batch_size=40, clip_norm=0.1, weight_decay=0.3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.3)
    other.loss(source.features, torch.zeros(40)).backward()
    gradients = torch.cat([p.grad.flatten() for p in other.parameters()])
    for parameter in other.parameters():
        parameter.grad *= min(1, 0.1 / gradients.norm())
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(other))


def test_the_loss_of_a_pass_is_the_mean_over_images():
    """With a learning rate of next to nothing every batch is judged by the model as it came."""
    model = regression()
    source = make_source()
    expected = float(model.loss(source.features, torch.zeros(40)).detach())
    log, _ = fit(model, max_iter=1, batch_size=16, learning_rate=1e-12)
    assert log.loss_curve[0] == pytest.approx(expected, rel=1e-5)


def test_every_pass_takes_every_image_once_in_a_new_order():
    source = make_source()
    trainer = make_trainer(regression(), source, max_iter=3, batch_size=16)
    train = torch.arange(5, 35)
    with seeded(0, CPU):
        trainer.fit(train)
    assert [len(batch) for batch in source.batches] == [16, 14] * 3
    orders = [source.batches[2 * k] + source.batches[2 * k + 1] for k in range(3)]
    assert all(sorted(order) == train.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_a_model_with_several_maps_gets_them_all():
    class Two(Regression):
        def loss(self, features, category):
            first, second = features
            return super().loss(torch.cat([first, second], 1), category)

    class TwoMaps(Source):
        def batch(self, indices):
            return [self.features[indices, :2], self.features[indices, 2:]]

    with seeded(1, CPU):
        model = Two()
    other = regression()
    with seeded(0, CPU):
        make_trainer(model, TwoMaps(make_source().features)).fit(torch.arange(40))
    fit(other)
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_explained():
    class Exploding(Regression):
        def loss(self, features, category):
            return super().loss(features, category) * math.nan

    with pytest.raises(ValueError, match=r"loss became nan in pass 1. Lower learning_rate"):
        fit(Exploding())


# ---- schedule ------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.sampled_from(["cosine", "step"]))
def test_rates_are_between_0_and_1_and_reach_1(n_steps, schedule):
    plan = TrainingPlan(schedule=schedule)
    rates = [plan.rate(step, n_steps) for step in range(n_steps)]
    assert min(rates) >= 0
    assert max(rates) == pytest.approx(1)
    assert max(rates) <= 1


def test_cosine_warms_up_and_decays_to_zero():
    plan = TrainingPlan()
    rates = [plan.rate(step, 400) for step in range(401)]
    assert rates[:20] == pytest.approx([(k + 1) / 20 for k in range(20)])
    assert rates[20:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 380) for k in range(381)])
    assert rates[210] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0)


def test_step_falls_to_a_tenth_at_four_fifths():
    plan = TrainingPlan(schedule="step")
    assert [plan.rate(step, 1000) for step in (0, 799, 800, 999)] == [1, 1, 0.1, 0.1]


def test_constant_warms_up_from_a_tenth_over_the_first_twelfth():
    """VQ-Flow's: 5 of 60 passes."""
    plan = TrainingPlan(schedule="constant")
    assert [plan.rate(step, 600) for step in (0, 25, 50, 51, 599)] == pytest.approx([0.1, 0.55, 1, 1, 1])


def test_the_schedule_is_scaled_to_the_passes_asked_for():
    plan = RecordingPlan(max_iter=7, batch_size=16)
    source = make_source()
    Trainer(regression(), source, torch.zeros(40, dtype=torch.long), plan, device=CPU).fit(torch.arange(40))
    assert {n_steps for _, n_steps in plan.asked} == {7 * 3}
    assert max(step for step, _ in plan.asked) == 7 * 3


# ---- early stopping ------------------------------------------------------------------------------


def stop_early(curve, interrupt_after=math.inf, **plan):
    model = Scripted(curve, interrupt_after)
    options = {"early_stopping": True, "n_iter_no_change": 2, "tol": 0.0, "batch_size": 40, "max_iter": len(curve)}
    log, _ = fit(model, validation=torch.arange(3), **{**options, **plan})
    return model, log


def test_an_interrupted_training_goes_back_to_the_best_pass_too():
    with pytest.warns(UserWarning, match="interrupted after 3 of 4 passes"):
        model, log = stop_early([5.0, 3.0, 4.0, 2.0], interrupt_after=3)
    assert log.n_iter == 3
    assert model.passes == 2


def test_early_stopping_goes_back_to_the_best_pass():
    model, log = stop_early([5.0, 3.0, 4.0, 6.0, 1.0])
    assert log.validation_curve == [5.0, 3.0, 4.0, 6.0]
    assert log.n_iter == 4
    assert int(model.passes) == 2


def test_the_best_pass_is_kept_where_training_ends_without_stopping():
    model, log = stop_early([5.0, 3.0, 4.0])
    assert log.n_iter == 3
    assert int(model.passes) == 2


def test_an_improvement_below_tol_does_not_count_but_is_kept():
    model, log = stop_early([5.0, 4.9, 4.8, 4.7], tol=0.5)
    assert log.n_iter == 3
    assert int(model.passes) == 3


def test_patience_starts_anew_with_every_improvement():
    _, log = stop_early([5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 1.0])
    assert log.n_iter == 7


def test_validation_images_are_judged_in_evaluation_mode_and_not_trained_on():
    class Watching(Regression):
        def __init__(self):
            super().__init__()
            self.seen = {True: set(), False: set()}

        def loss(self, features, category):
            self.seen[self.training].update(features[:, 0].tolist())
            assert torch.is_grad_enabled() == self.training
            return super().loss(features, category)

    source, model = make_source(), Watching()
    trainer = make_trainer(model, source, early_stopping=True, max_iter=2)
    log = trainer.fit(torch.arange(30), torch.arange(30, 40))
    assert model.seen[True] == set(source.features[:30, 0].tolist())
    assert model.seen[False] == set(source.features[30:, 0].tolist())
    assert len(log.validation_curve) == 2
    assert not model.training


def test_validation_loss_is_the_mean_over_images():
    model, source = regression(), make_source()
    trainer = make_trainer(model, source, batch_size=16)
    expected = float(model.loss(source.features[:37], torch.zeros(37)).detach())
    assert trainer.evaluate(torch.arange(37)) == pytest.approx(expected, rel=1e-5)


# ---- interruptions and memory --------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3])
def test_a_training_interrupted_in_the_first_pass_is_given_up(step):
    model = regression(interrupt_at=step)
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    assert not model.training


@pytest.mark.parametrize(("step", "passes"), [(4, 1), (9, 2)])
def test_an_interrupted_training_keeps_what_was_learned(step, passes):
    """Three steps a pass: the model is as it was after the last whole step."""
    model = regression(interrupt_at=step)
    with pytest.warns(UserWarning, match=f"interrupted after {passes} of 5 passes") as record:
        log, _ = fit(model)
    assert record[0].filename == __file__
    assert log.interrupted
    assert log.n_iter == passes
    assert not model.training
    other = regression(interrupt_at=step + 1)
    with pytest.warns(UserWarning, match="interrupted"):
        fit(other)
    assert not torch.equal(weights(other), weights(model))


@pytest.mark.parametrize(("largest", "sizes"), [(8, [8]), (4, [8, 4]), (1, [8, 4, 2, 1])])
def test_out_of_memory_halves_the_batch_and_the_result_stays(largest, sizes):
    model, plain = regression(largest_batch=largest), regression()
    with pytest.warns(UserWarning, match="Out of device memory") as record:
        log, trainer = fit(model)
    assert [str(w.message).split("batches of ")[1] for w in record] == [f"{size} images." for size in sizes]
    assert trainer.batch_size == largest
    expected, _ = fit(plain)
    assert log.loss_curve == pytest.approx(expected.loss_curve, rel=1e-4)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-3, atol=1e-5)


def test_out_of_memory_moves_the_codes_once(monkeypatch):
    """The parts of a batch that fitted are done again in smaller ones: the codes must not follow them twice."""

    class Quantising(Regression):
        def __init__(self, **options):
            super().__init__(**options)
            self.codebook = VectorQuantizer(4, 3)

        def loss(self, features, category):
            self.codebook(features[:, None, :3])
            # Memory runs out with the second part, when the first has moved the codes already.
            if self.largest_batch < math.inf and self.n_calls == 1:
                self.n_calls += 1
                raise torch.OutOfMemoryError("out of memory")
            return super().loss(features, category)

    monkeypatch.setattr(Trainer, "_may_run_out", lambda self: True)
    made = []
    for largest, size in ((math.inf, 4), (8, 8)):
        with seeded(1, CPU):
            model = Quantising(largest_batch=largest)
        trainer = make_trainer(model, batch_size=16, max_iter=1)
        trainer.batch_size = size
        if largest < math.inf:
            with pytest.warns(UserWarning, match="batches of 4 images"), seeded(0, CPU):
                trainer.fit(torch.arange(40))
        else:
            with seeded(0, CPU):
                trainer.fit(torch.arange(40))
        made.append(model.state_dict())
    for name, value in made[0].items():
        torch.testing.assert_close(made[1][name], value, rtol=0, atol=0)


def test_only_the_parts_that_learn_change():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model.loss = lambda x, category: (modes.append([m.training for m in model]), model(x[:, :3]).square().mean())[1]
    modes, before = [], {name: value.clone() for name, value in model.state_dict().items()}
    plan = TrainingPlan(max_iter=2)
    Trainer(model, make_source(), torch.zeros(40).long(), plan, device=CPU, parts=[model[3]]).fit(torch.arange(40))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"3.weight", "3.bias"}
    assert {tuple(m) for m in modes} == {(False, False, False, True)}
    assert all(p.requires_grad for p in model.parameters())


def test_out_of_memory_in_validation_is_no_end():
    model = regression(largest_batch=16)
    trainer = make_trainer(model, batch_size=16)
    trainer.batch_size = 32
    with pytest.warns(UserWarning, match="batches of 16 images"):
        loss = trainer.evaluate(torch.arange(40))
    assert loss == pytest.approx(make_trainer(regression()).evaluate(torch.arange(40)), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Out of device memory")
def test_out_of_memory_with_a_single_image_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        fit(regression(largest_batch=0))
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(regression(largest_batch=0)).evaluate(torch.arange(4))


# ---- randomness ----------------------------------------------------------------------------------


def test_one_seed_gives_one_result():
    first, second, other = regression(), regression(), regression()
    curve = fit(first, seed=3)[0].loss_curve
    assert fit(second, seed=3)[0].loss_curve == curve
    assert fit(other, seed=4)[0].loss_curve != curve
    assert torch.equal(weights(first), weights(second))


def test_seeded_draws_the_same_and_leaves_the_global_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with seeded(5, CPU):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    with seeded(5, CPU):
        assert torch.equal(torch.rand(3), first)
    with contextlib.suppress(KeyError), seeded(6, CPU):
        torch.rand(3)
        raise KeyError
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)


# ---- device and precision ------------------------------------------------------------------------


def test_bfloat16_is_for_hardware_that_has_it():
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no list of what this CPU can do")
    if not (hasattr(torch.cpu, "get_capabilities") or hasattr(torch.cpu, "_is_avx512_bf16_supported")):
        pytest.skip(f"torch {torch.__version__} does not tell: float32 is taken")
    words = set(flags.read_text().split())
    native = bool(words & {"avx512_bf16", "amx_bf16"})
    assert native_precision(CPU) == (torch.bfloat16 if native else torch.float32)


def test_precision_is_what_was_asked_for():
    assert native_precision(CPU, "float32") == torch.float32
    assert native_precision(CPU, "bfloat16") == torch.bfloat16


def test_lower_precision_is_used_for_the_loss_alone():
    seen = []

    class Watching(Regression):
        def loss(self, features, category):
            seen.append(self.linear(features[:, :3]).dtype)
            return super().loss(features, category)

    model = Watching()
    plan = TrainingPlan(max_iter=1)
    source = make_source()
    Trainer(model, source, torch.zeros(40, dtype=torch.long), plan, device=CPU, dtype=torch.bfloat16).fit(
        torch.arange(16)
    )
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_devices_are_checked():
    assert pick_device("cpu") == pick_device(CPU) == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device='toaster' is not a torch device; use 'auto', 'cpu' or 'cuda'"):
        pick_device("toaster")


@pytest.mark.parametrize("device", ["meta", "vulkan", "xpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there_or_keeps_no_numbers_is_told(device):
    has = {"xpu": torch.xpu, "mps": torch.backends.mps}.get(device)
    if has is not None and has.is_available():
        assert pick_device(device).type == device
        return
    words = f"device='{device}' is not available: torch finds no working {device.upper()} device"
    with pytest.raises(ValueError, match=words):
        pick_device(device)


# ---- what is told --------------------------------------------------------------------------------


def test_passes_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="vqad"):
        fit(regression(), max_iter=3, validation=torch.arange(5), early_stopping=True)
    messages = [record.getMessage() for record in caplog.records if record.name == "vqad"]
    assert len(messages) == 3
    assert messages[2].startswith("pass 3/3")
    assert "loss" in messages[2]
    assert "validation" in messages[2]


def test_perplexity_is_the_mean_over_all_codebooks():
    model = nn.ModuleList([VectorQuantizer(4, 2, n_groups=2), nn.ModuleList([VectorQuantizer(4, 3)])])
    model[0].cluster_size.copy_(torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0]]))
    model[1][0].cluster_size.copy_(torch.tensor([[2.0, 2, 0, 0]]))
    assert codebook_perplexity(model) == pytest.approx((4 + 1 + 2) / 3)
    assert math.isnan(codebook_perplexity(nn.Linear(2, 2)))


# ------------------------------------------------------------------ categories of different sizes


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    balance=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_a_pass_draws_categories_by_their_share(sizes, balance, seed):
    with seeded(seed, CPU):
        category = torch.repeat_interleave(torch.tensor(sizes)).mul(3)[torch.randperm(sum(sizes))]
        order = one_pass(category, balance)
    assert order.shape == category.shape
    often = torch.bincount(order, minlength=len(category))
    shares = torch.tensor(sizes).double().pow(1 - balance)
    expected = shares / shares.sum() * sum(sizes)
    for k, (size, wanted) in enumerate(zip(sizes, expected.tolist())):
        own = often[category == 3 * k]
        assert own.sum() >= 1
        assert abs(int(own.sum()) - wanted) <= 2 + wanted * len(sizes) / sum(sizes)
        assert own.max() - own.min() <= 1
        if not balance:
            assert own.sum() == size


def test_categories_of_equal_size_are_drawn_once_each():
    assert sorted(one_pass(torch.arange(60) % 4, 0.5).tolist()) == list(range(60))


def test_the_loop_draws_by_the_balance_of_its_plan():
    source = Source(torch.randn(40, 4))
    category = torch.tensor([0] * 36 + [1] * 4)
    plan = TrainingPlan(max_iter=1, batch_size=8, category_balance=1.0)
    Trainer(Regression(), source, category, plan, device=CPU).fit(torch.arange(40))
    drawn = [i for batch in source.batches for i in batch]
    assert len(drawn) == 40
    assert sum(i >= 36 for i in drawn) == 20
