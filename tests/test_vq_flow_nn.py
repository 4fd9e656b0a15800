"""VQFlow: the published numbers, the exact density, the algebra, the codes."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqad.nn.condition import Condition
from vqad.nn.groups import Groups
from vqad.nn.hierarchy import Codes, positional_encoding
from vqad.nn.quantize import VectorQuantizer
from vqad.nn.vq_flow import VQFlow
from vqad.nn.vq_flow_output import additive_map, density_map, image_score, multiplicative_map

GOLDEN = Path(__file__).parent / "data" / "vq_flow_release.npz"
CHANNELS = (8, 12, 16, 20)
SIZES = {"n_concepts": 4, "n_patterns": 8, "d_concept": 16, "d_position": 8, "n_blocks": (1, 2, 2)}
RELEASE = {"likelihood": "release", "revive_threshold": 0.0}


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small(**parameters) -> VQFlow:
    return VQFlow(CHANNELS, **{**SIZES, **parameters}).double()


def features_like(n: int, grids=((16, 16), (8, 8), (4, 4), (2, 2)), channels=CHANNELS) -> list[Tensor]:
    return [torch.randn(n, c, *grid, dtype=torch.float64) for c, grid in zip(channels, grids)]


# ---- the release's numbers

RENAMED = (
    (r"^scale_flow\.(\d+)\.block\.", r"scale_flow.\1.blocks."),
    (r"\.subnet\.ln\.", ".subnet.norm."),
    (r"\.w_perm$", ".rotation"),
    (r"^fusion\.permutation\.(\d)\.perm$", r"fusion.permutation_\1"),
    (r"^fusion\.coupling\.", "fusion."),
    (r"\.cross_convs\.", "."),
    (r"^(upsampler\.\d)\.1\.", r"\1."),
    (r"^((top_projection|upsampler|(concept|pattern)_(encoder|codebook))\..*)$", r"hierarchy.\1"),
)
INVERSES = ("w_perm_inv", "perm_inv")


def our_name(release_name: str) -> str:
    for pattern, replacement in RENAMED:
        release_name = re.sub(pattern, replacement, release_name)
    return release_name


def split_first_convolutions(named: dict[str, Tensor]) -> None:
    """From convolutions of [passive ; condition], one for each block, to one for each part."""
    width = SIZES["d_position"] + 2 * SIZES["d_concept"]
    for name in [n for n in named if n.endswith("conv1.weight")]:
        owner = re.sub(r"\.(blocks\.\d\.subnet|subnet_\d)\.conv1\.weight$", "", name)
        whole, bias = named.pop(name), named.pop(name.replace("weight", "bias"))
        named[name] = whole[:, :-width]
        for part, value in (("weight", whole[:, -width:]), ("bias", bias)):
            shared = f"{owner}.project.{part}"
            named[shared] = torch.cat([named[shared], value]) if shared in named else value


class Golden:
    """The release's arrays, and a module that holds its parameters."""

    def __init__(self) -> None:
        with np.load(GOLDEN) as file:
            self.arrays = {k: torch.from_numpy(file[k]) for k in file.files}
        self.features = [self.arrays[f"features.{k}"].double() for k in range(4)]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Arrays of one prefix, by our names."""
        found = {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}
        named = {our_name(k): v for k, v in found.items() if not k.endswith(INVERSES)}
        split_first_convolutions(named)
        return named

    def module(self, **parameters) -> VQFlow:
        module = small(**{**RELEASE, **parameters})
        state = module.state_dict()
        theirs = {k: v.reshape(state[k].shape) for k, v in self.under("param.").items()}
        missing, unexpected = module.load_state_dict(theirs, strict=False)
        assert not unexpected
        assert not missing
        return module


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    if not theirs.is_floating_point():
        assert torch.equal(ours, theirs)
        return
    theirs = theirs.double().reshape(ours.shape)
    # Gradients of a bias before a batch norm are zero: rounding is all that is in them.
    atol = max(1e-12, tolerance * float(theirs.abs().max()))
    torch.testing.assert_close(ours.detach(), theirs, rtol=tolerance, atol=atol)


def named_outputs(module: VQFlow, features: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    output = module(features)
    codes, latents = output.codes, output.latents
    named = {
        "concept": codes.concept,
        "concept_index": codes.concept_index,
        "logdet": latents.log_det,
        "commitment": codes.commitment,
        "loss": output.loss,
    }
    for k, condition in enumerate(codes.conditions):
        named[f"pattern_index.{k}"] = condition.index
    for k in range(3):
        named[f"condition.{k}"] = codes.conditions[k].dense()
        named[f"flow_z.{k}"] = latents.flow_z[k]
        named[f"flow_logdet.{k}"] = latents.flow_log_det[k]
        named[f"z.{k}"] = latents.z[k]
    return named, output.loss


@pytest.mark.parametrize("path", ["table", "convolution"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_output_of_the_release_is_reproduced(golden, mode, path):
    module = golden.module(condition_path=path).train(mode == "train")
    ours, _ = named_outputs(module, golden.features)
    theirs = golden.under(f"{mode}.")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same(ours[name], value)


@pytest.mark.parametrize("path", ["table", "convolution"])
def test_gradients_codebooks_and_batch_statistics_of_a_training_step_are_the_releases(golden, path):
    module = golden.module(condition_path=path).train()
    _, loss = named_outputs(module, golden.features)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    theirs = golden.under("grad.")
    assert gradients.keys() == theirs.keys()
    for name, value in theirs.items():
        same(gradients[name], value)
    for quantizer in module.hierarchy.codebooks():
        quantizer.step()
    state = module.state_dict()
    after = golden.under("after.")
    moved = {n for n in state if n.endswith(("running_mean", "running_var", "embed", "embed_avg", "cluster_size"))}
    assert after.keys() == moved
    for name, value in after.items():
        same(state[name], value)


def test_maps_and_image_scores_are_the_releases(golden):
    module = golden.module().eval()
    with torch.no_grad():
        terms = module.anomaly_map(golden.features)
    stages = [terms[f"log_likelihood_{k}"] for k in (1, 2, 3)]
    for k, term in enumerate(stages):
        same(-term, golden.arrays[f"score.logp.{k}"])
    size = tuple(golden.arrays["score.map_mul"].shape[1:])
    multiplied = multiplicative_map(stages, size)
    same(multiplied, golden.arrays["score.map_mul"])
    same(additive_map(stages, size), golden.arrays["score.map_add"])
    same(image_score(multiplied), golden.arrays["score.image"])
    named = {k for k in golden.arrays if k.startswith("score.")}
    assert named == {f"score.{n}" for n in ("image", "map_add", "map_mul", "logp.0", "logp.1", "logp.2")}


# ---- the exact likelihood


def awake(module: VQFlow) -> VQFlow:
    """Mixtures that do something: they start as the identity."""
    with torch.no_grad():
        for mixture in module.mixture:
            for parameter in mixture.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("likelihood", ["exact", "release"])
def test_the_density_given_the_codes_integrates_to_one_and_the_releases_does_not(likelihood):
    """Six dimensions, by quasi-random points of a wide normal density."""
    channels, n = (2, 2, 2, 4), 2**15
    module = VQFlow(channels, **{**SIZES, "d_concept": 4, "d_position": 4, "hidden": 6}, likelihood=likelihood).double()
    awake(module).eval()
    with torch.no_grad():
        codes = module(features_like(1, ((1, 1),) * 4, channels)).codes
        points = torch.quasirandom.SobolEngine(6, scramble=True, seed=0).draw(n, dtype=torch.float64)
        proposal = torch.distributions.Normal(torch.zeros(6).double(), 2.0)
        x = proposal.icdf(points.clamp(1e-9, 1 - 1e-9))
        conditions = [
            Condition(
                c.pattern.expand(n, -1, -1, -1),
                c.index.expand(n, -1, -1),
                c.encoded.expand(n, -1, -1, -1),
                c.codes,
                c.position,
                c.concept.expand(n, -1),
            )
            for c in codes.conditions
        ]
        repeated = Codes(
            codes.concept.expand(n, -1),
            codes.concept_index.expand(n),
            codes.concept_distance.expand(n),
            conditions,
            codes.commitment,
            Groups.of(torch.zeros(n, dtype=torch.long), 1, x.device),
        )
        stages = [part[:, :, None, None] for part in x.split(2, 1)]
        log_ratio = module.transform(stages, repeated).log_prob - proposal.log_prob(x).sum(1)
        integral = float(log_ratio.exp().mean())
        volume = math.prod(
            float(scale.prod()) for scale in (mixture.moments(codes.concept)[1] for mixture in module.mixture)
        )
    if likelihood == "exact":
        assert integral == pytest.approx(1, abs=0.01)
    else:
        assert integral == pytest.approx(volume, rel=0.01)
        assert abs(volume - 1) > 0.04


def test_the_terms_of_the_map_add_up_to_the_log_density():
    module = awake(small(hidden=6)).eval()
    features = features_like(3)
    with torch.no_grad():
        terms = module.anomaly_map(features)
        log_prob = module(features).latents.log_prob
    per_channel = [terms[f"log_likelihood_{k}"] + terms[f"volume_{k}"] for k in (1, 2, 3)]
    constant = 0.5 * math.log(2 * math.pi)
    total = sum((stage + constant).flatten(1).sum(1) * c for stage, c in zip(per_channel, CHANNELS))
    torch.testing.assert_close(-total, log_prob, rtol=1e-10, atol=1e-10)


def test_the_density_map_of_equal_cells_is_their_value():
    value = {f"log_likelihood_{k}": torch.full((2, 3, 3), 0.25 * k) for k in (1, 2, 3)}
    value |= {f"volume_{k}": torch.full((2, 3, 3), -0.5) for k in (1, 2, 3)}
    expected = 0.25 * 6 - 1.5 + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(density_map(value, (5, 7)), torch.full((2, 5, 7), expected))


def test_the_default_loss_is_nats_per_dimension_plus_commitment():
    module = awake(small(hidden=6, commitment_weight=0.5)).eval()
    features = features_like(3)
    output = module(features)
    dimensions = 8 * 64 + 12 * 16 + 16 * 4
    expected = -output.latents.log_prob.mean() / dimensions + 0.5 * output.codes.commitment
    torch.testing.assert_close(module.loss(features, torch.tensor([0, 1, 2])), expected)


def test_latents_are_taken_back_to_features_in_single_precision():
    module = awake(small(hidden=6)).float().eval()
    with torch.no_grad():
        stages = module.pool(features_like(3))
        codes = module.hierarchy(stages)
        restored = module.restore(module.transform(stages[:3], codes).z, codes)
    for ours, stage in zip(restored, stages):
        torch.testing.assert_close(ours, stage, rtol=1e-4, atol=1e-4)


def test_stages_on_one_grid_are_not_averaged():
    """A vision transformer's; the identities hold for them too."""
    module = awake(small(hidden=6)).eval()
    stages = features_like(3, ((4, 4),) * 4)
    with torch.no_grad():
        for given, seen in zip(stages, module.pool(stages), strict=True):
            assert torch.equal(given, seen)
        assert module.anomaly_map(stages)["log_likelihood_3"].shape == (3, 4, 4)
        codes = module.hierarchy(stages)
        latents = module.transform(stages[:3], codes)
        for ours, stage in zip(module.restore(latents.z, codes), stages):
            torch.testing.assert_close(ours, stage, rtol=1e-5, atol=1e-5)
        coarse = module.pool(features_like(3))
        assert [s.shape[2] for s in coarse] == [8, 4, 2, 2]


# ---- the algebra: both ways give the same numbers


def test_looked_up_and_convolved_conditions_give_the_same_training_step():
    torch.manual_seed(0)
    table = awake(small(hidden=6))
    convolution = small(hidden=6, condition_path="convolution")
    convolution.load_state_dict(table.state_dict())
    features = features_like(4)
    losses = [module.loss(features) for module in (table, convolution)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for (name, p), q in zip(table.named_parameters(), convolution.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, a), b in zip(table.named_buffers(), convolution.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def test_what_codes_start_from_is_bounded(monkeypatch):
    """However many images there are; which is as if fewer cells had been drawn of each."""
    batches = [(features_like(4), None) for _ in range(12)]
    seen = []
    of_all = VectorQuantizer.initialise

    def initialise(self, vectors, *args, **more):
        seen.append(vectors.shape)
        of_all(self, vectors, *args, **more)

    monkeypatch.setattr(VectorQuantizer, "initialise", initialise)
    module = small(hidden=6)
    whole, bounded, fewer = (copy.deepcopy(module) for _ in range(3))
    whole.initialise_codes(batches, generator=torch.Generator().manual_seed(0))
    assert [shape[1] for shape in seen[1:]] == [64, 16, 4, 4]
    monkeypatch.setattr("vqad.nn.hierarchy.SAMPLE_NUMBERS", 48 * 12 * 24)
    seen.clear()
    bounded.initialise_codes(batches, generator=torch.Generator().manual_seed(0))
    assert sum(math.prod(shape) for shape in seen[1:]) <= 48 * 12 * 24
    per_image = seen[1][1]
    assert per_image < 64
    fewer.hierarchy.initialise(
        ((fewer.pool(f), g) for f, g in batches),
        generator=torch.Generator().manual_seed(0),
        cells_per_image=per_image,
    )
    for mine, theirs in zip(bounded.hierarchy.pattern_codebook, fewer.hierarchy.pattern_codebook):
        torch.testing.assert_close(mine.embed, theirs.embed)


@pytest.mark.parametrize("inference", [False, True])
def test_ready_tables_give_the_same_maps(inference):
    module, features = awake(small(hidden=6)).eval(), features_like(3)
    plain = small(hidden=6, condition_path="convolution").eval()
    plain.load_state_dict(module.state_dict())
    ready = module.ready()
    with torch.inference_mode(inference), torch.no_grad():
        expected = plain.anomaly_map(features)
        for _ in range(2):
            for name, term in ready.anomaly_map(features).items():
                torch.testing.assert_close(term, expected[name], rtol=1e-10, atol=1e-10)
    assert module._tables is None


def test_upsampling_after_the_1x1_convolution_is_upsampling_before_it():
    module = small().eval()
    stages = module.pool(features_like(2))
    top = module.hierarchy.top_projection(stages[3].permute(0, 2, 3, 1).flatten(0, 2))
    top = top.view(2, 2, 2, -1).permute(0, 3, 1, 2)
    for k, factor in enumerate((4, 2, 1)):
        layer, encoder = module.hierarchy.upsampler[k], module.hierarchy.pattern_encoder[k]
        up = F.interpolate(top, scale_factor=factor, mode="bilinear", align_corners=False)
        cells = stages[k].permute(0, 2, 3, 1)
        own = encoder(cells.flatten(0, 2)).view(*cells.shape[:3], -1).permute(0, 3, 1, 2)
        expected = own + F.conv2d(up, layer.weight[:, :, None, None], layer.bias)
        ours = module.hierarchy._encode_patterns(stages)[k]
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# ---- behaviour


def test_an_image_is_scored_the_same_in_any_company():
    module, features = awake(small(hidden=6)).eval(), features_like(5)
    with torch.no_grad():
        together = module.anomaly_map(features)
        alone = module.anomaly_map([f[3:4] for f in features])
    for name, term in alone.items():
        torch.testing.assert_close(term[0], together[name][3], rtol=1e-10, atol=1e-10)


def test_categories_that_share_everything_do_not_matter():
    module, features = small(hidden=6, n_shared=4).eval(), features_like(4)
    with torch.no_grad():
        without = module.anomaly_map(features)
        within = module.anomaly_map(features, torch.tensor([3, 1, 0, 2]))
    assert all(torch.equal(without[name], within[name]) for name in without)


def test_a_single_image_can_be_trained_on():
    module, features = small(hidden=6).train(), features_like(1)
    module.loss(features).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_maps_may_have_any_size():
    module = small(hidden=6).eval()
    terms = module.anomaly_map(features_like(2, ((13, 22), (7, 11), (4, 6), (2, 3))))
    assert [tuple(terms[f"volume_{k}"].shape) for k in (1, 2, 3)] == [(2, 7, 11), (2, 4, 6), (2, 2, 3)]


def test_codes_start_from_the_data_and_leave_everything_else_as_it_was():
    module = small(hidden=6, n_patterns=16)
    batches = [(features_like(6), None) for _ in range(3)]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    random_state = torch.get_rng_state()
    commitment_before = module.train()(batches[0][0]).codes.commitment
    module.load_state_dict(before)
    module.initialise_codes(batches, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), random_state)
    first = module.state_dict()
    for name, value in first.items():
        if "codebook" not in name:
            assert torch.equal(value, before[name]), name
    first = {k: v.clone() for k, v in first.items()}
    module.load_state_dict(before)
    module.initialise_codes(batches, generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(v, first[k]) for k, v in module.state_dict().items())
    codes = module.train()(batches[0][0]).codes
    assert codes.commitment < 0.5 * commitment_before
    assert all(len(condition.index.unique()) > 8 for condition in codes.conditions)
    usage = module.hierarchy.perplexity()
    assert usage.keys() == {"concept", "pattern_1", "pattern_2", "pattern_3", "pattern_4"}
    assert 1 < usage["concept"] <= 4
    assert all(4 < usage[f"pattern_{k}"] <= 16 for k in (1, 2, 3, 4))


def test_no_data_is_no_start_for_codes():
    with pytest.raises(ValueError, match="at least one batch"):
        small().initialise_codes([])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_blocks": (1, 2)}, "3 n_blocks"), ({"d_position": 6}, "multiple of 4")],
)
def test_impossible_sizes_are_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_features_of_another_backbone_are_refused_with_the_channels():
    with pytest.raises(ValueError, match=r"\(8, 12, 16, 20\) channels"):
        small().loss(features_like(2, channels=(8, 12, 16, 24)))
    with pytest.raises(ValueError, match="four stages"):
        small().loss(features_like(2)[:3])


def test_the_image_score_is_the_mean_of_the_largest_share():
    scores = image_score(torch.arange(200.0).view(2, 10, 10), fraction=0.05)
    torch.testing.assert_close(scores, torch.tensor([97.0, 197.0]))


def test_the_positional_encoding_tells_all_cells_apart():
    cells = positional_encoding(8, 6, 5).flatten(1).T
    distance = torch.cdist(cells, cells) + torch.eye(30).double()
    assert distance.min() > 1e-2


# ---- categories that were added


ADDED = torch.tensor([0, 2, 1, 3, 2])


def with_added(**parameters) -> VQFlow:
    """Categories 0 and 1 share everything, 2 and 3 have parts of their own that do something."""
    module = small(hidden=6, n_shared=2, **parameters)
    assert [module.add_category(), module.add_category()] == [2, 3]
    module.initialise_codes([(features_like(12), torch.arange(12) % 2 + 2)])
    for added in module.added_mixture:
        for parameter in added.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return awake(module).eval()


def test_an_added_category_leaves_every_bit_of_the_others_as_it_was():
    module, features = awake(small(hidden=6, n_shared=2)).eval(), features_like(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    maps = []
    for _ in range(2):
        with torch.no_grad():
            maps.append(module.ready().anomaly_map(features, torch.tensor([0, 1, 1])))
        module.add_category()
        module.initialise_codes([(features_like(6), torch.full((6,), 2)), (features_like(2), torch.full((2,), 2))])
    for name, value in before.items():
        after = module.state_dict()[name]
        assert torch.equal(after[: len(value)] if "codebook" in name else after, value), name
    assert all(torch.equal(maps[0][name], maps[1][name]) for name in maps[0])


def test_the_parts_of_an_added_category_learn_and_no_other_moves():
    module, features = with_added(), features_like(8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parts = module.parts_of([2])
    assert not module.parts_of([1])
    learning = [p for part in parts for p in part.parameters()]
    for p in module.parameters():
        p.requires_grad_(any(p is q for q in learning))
    for part in parts:
        part.train()
    optimizer = torch.optim.Adam(learning, 1e-2)
    losses = []
    for _ in range(20):
        loss = module.loss(features, torch.full((8,), 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for quantizer in module.hierarchy.codebooks():
            quantizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    after = module.state_dict()
    for name, value in before.items():
        if "codebook" in name:
            assert torch.equal(after[name][[0, 2]], value[[0, 2]]), name
            assert not torch.equal(after[name][1], value[1]), name
        else:
            learns = name.startswith(("added_flow.0", "added_mixture.0")) and not name.endswith("rotation")
            assert torch.equal(after[name], value) != learns, name


@pytest.mark.parametrize("category", [1, 2])
def test_noise_is_in_training_alone_and_in_that_of_an_added_category_too(category):
    module, features = with_added(noise=0.5), features_like(8)
    number = torch.full((8,), category)
    for part in module.parts_of([2]) if category == 2 else [module]:
        part.train()
    noisy = [float(copy.deepcopy(module).loss(features, number).detach()) for _ in range(2)]
    assert noisy[0] != noisy[1]
    module.eval()
    calm = [float(module.loss(features, number).detach()) for _ in range(2)]
    assert calm[0] == calm[1]


def test_codes_are_numbered_group_by_group():
    module, features = with_added(), features_like(5)
    with torch.no_grad():
        codes = module(features, ADDED).codes
        concept = module.concept(features, ADDED)
    assert torch.equal(concept, codes.concept_index)
    assert (concept // 4).tolist() == [0, 1, 0, 2, 1]
    for condition, quantizer in zip(codes.conditions, module.hierarchy.pattern_codebook):
        assert (condition.index // 8 == (concept // 4)[:, None, None]).all()
        assert torch.equal(condition.codes[condition.index].permute(0, 3, 1, 2), condition.pattern)
        assert torch.equal(quantizer.embed[2][condition.index[3] - 16].permute(2, 0, 1), condition.pattern[3])


@pytest.mark.parametrize("category", [ADDED, torch.full((5,), 2), torch.full((5,), 1)])
def test_added_categories_are_looked_up_and_convolved_alike(category):
    module, features = with_added(), features_like(5)
    plain = with_added(condition_path="convolution")
    plain.load_state_dict(module.state_dict())
    losses = [each.train().loss(features, category) for each in (module, plain)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    plain.load_state_dict(module.state_dict())
    plain.eval()
    module.eval()
    with torch.no_grad():
        expected = plain.anomaly_map(features, category)
        looked_up = [module.anomaly_map(features, category)]
        ready = module.ready()
        looked_up += [ready.anomaly_map(features, category) for _ in range(2)]
    for maps in looked_up:
        for name, term in expected.items():
            torch.testing.assert_close(maps[name], term, rtol=1e-10, atol=1e-10)


def test_categories_of_a_batch_do_not_mix():
    module, features = with_added(), features_like(5)
    with torch.no_grad():
        together = module.anomaly_map(features, ADDED)
        for i, c in enumerate(ADDED.tolist()):
            alone = module.anomaly_map([f[i : i + 1] for f in features], torch.tensor([c]))
            for name, term in alone.items():
                torch.testing.assert_close(term[0], together[name][i], rtol=1e-10, atol=1e-10)


def test_latents_of_added_categories_are_taken_back_to_features_and_count_their_volume():
    channels = (2, 2, 2, 4)
    sizes = {**SIZES, "d_concept": 4, "d_position": 4, "hidden": 6}
    module = awake(VQFlow(channels, **sizes, n_shared=2).double()).eval()
    module.add_category()
    for parameter in module.added_mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        stages = module.pool(features_like(1, ((3, 3), (2, 2), (1, 1), (1, 1)), channels))
        codes = module.hierarchy(stages, torch.tensor([1]))
        latents = module.transform(stages[:3], codes)
        for ours, stage in zip(module.restore(latents.z, codes), stages):
            torch.testing.assert_close(ours, stage, rtol=1e-5, atol=1e-5)

    def flat(x: Tensor) -> Tensor:
        parts = x.split([stage.numel() for stage in stages[:3]])
        z = module.transform([part.view_as(stage) for part, stage in zip(parts, stages)], codes).z
        return torch.cat([each.flatten() for each in z])

    x = torch.cat([stage.flatten() for stage in stages[:3]])
    jacobian = torch.autograd.functional.jacobian(flat, x)
    torch.testing.assert_close(latents.log_det[0], torch.linalg.slogdet(jacobian)[1], rtol=1e-5, atol=1e-5)


# ---- codes that nothing was learned for


@pytest.mark.parametrize("category", [None, 2])
def test_after_settling_every_image_has_a_concept_of_the_images_learned(category):
    module = (small(n_concepts=12) if category is None else with_added(n_concepts=12)).eval()
    learned, new = features_like(5), [4 * f for f in features_like(40)]
    of_learned, of_new = (None if category is None else torch.full((n,), category) for n in (5, 40))
    used = module.concept(learned, of_learned)
    assert not torch.isin(module.concept(new, of_new), used).all()
    before = module.hierarchy.concept_codebook.embed.clone()
    with torch.no_grad():
        codes_before = module.look_up(learned, of_learned).concept
    module.settle([(learned, of_learned)])
    embed = module.hierarchy.concept_codebook.embed.flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(module.look_up(learned, of_learned).concept, codes_before, rtol=0, atol=0)
    known = {tuple(row) for row in before.flatten(0, 1)[used].tolist()}
    assert {tuple(embed[i].tolist()) for i in module.concept(new, of_new)} <= known
    settled = embed.clone()
    module.settle([(learned, of_learned)])
    torch.testing.assert_close(module.hierarchy.concept_codebook.embed.flatten(0, 1), settled, rtol=0, atol=0)
    if category is not None:  # the codes of the others stay
        torch.testing.assert_close(module.hierarchy.concept_codebook.embed[0], before[0], rtol=0, atol=0)
