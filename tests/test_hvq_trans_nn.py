"""HVQTrans against the published release's numbers, its layers against torch's, and its own properties."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer, LearnedPosition

RELEASE = Path(__file__).parent / "data" / "hvq_trans_release.npz"
N_CATEGORIES = 3


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ------------------------------------------------------------------ the release's numbers


@pytest.fixture(scope="module")
def release() -> dict[str, Tensor]:
    with np.load(RELEASE) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def release_codebooks(release: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``codebook.LEVEL.NAME`` with the categories stacked, as VectorQuantizer keeps them."""
    return {
        f"codebook.{level}.{name}": torch.stack(
            [release[f"{prefix}.codebook.{level}.{c}.{name}"] for c in range(N_CATEGORIES)]
        )
        for level in range(5)
        for name in ("embed", "cluster_size", "embed_avg")
    }


@pytest.fixture
def published(release) -> HVQTrans:
    """The release's model of the recorded run, in float64 and in training mode."""
    model = HVQTrans(
        24,
        (4, 4),
        N_CATEGORIES,
        d_model=32,
        dim_feedforward=64,
        dropout=0.0,
        n_codes=16,
        revive_threshold=0.0,
    ).double()
    state = release_codebooks(release, "param")
    for name, value in model.state_dict().items():
        if name not in state:
            state[name] = release[f"param.{name}"].reshape(value.shape)
    n_recorded = sum(name.startswith("param.") for name in release)
    assert len(state) == n_recorded - 5 * 3 * (N_CATEGORIES - 1), "every recorded parameter has its place"
    model.load_state_dict(state)
    return model


def step(model: HVQTrans) -> None:
    for quantizer in model.quantizers:
        quantizer.step()


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def release_map(model: HVQTrans, features: Tensor, category: Tensor) -> Tensor:
    terms = model.anomaly_map(features, category, levels=[0])
    return terms["reconstruction"] + 80 * terms["transport_0"]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_forward_pass_is_the_release_s(release, published, mode):
    n = len(release[f"{mode}.feature_rec"])
    features, category = release["features"][:n], release["category"][:n]
    published.train(mode == "train")
    output = published(features, category)

    states = [level.input[..., :32] for level in output.levels]
    assert_golden(torch.stack(states), release[f"{mode}.encoder_states"])
    in_decoder_order = output.levels[3::-1]
    assert_golden(torch.stack([level.quantized for level in in_decoder_order]), release[f"{mode}.quantized"])
    assert torch.equal(torch.stack([level.indices for level in in_decoder_order]), release[f"{mode}.indices"])
    assert_golden(output.reconstruction, release[f"{mode}.feature_rec"])
    assert_golden(output.commitment.mean(), release[f"{mode}.commitment"].squeeze())


def test_anomaly_map_is_the_release_s(release, published):
    features, category = release["features"], release["category"]
    published.eval()
    terms = published.anomaly_map(features, category)
    assert_golden(terms["transport_0"].flatten(1), release["eval.ot"])
    grid = release_map(published, features, category)
    assert_golden(grid, release["eval.pred_grid"].squeeze(1))
    resized = nn.functional.interpolate(grid[:, None], scale_factor=16, mode="bilinear", align_corners=True)
    assert_golden(resized, release["eval.pred"])
    assert_golden(published.loss(features, category), release["eval.loss"])


def test_reconstruction_error_in_training_is_the_release_s(release, published):
    # In training the release scores by the reconstruction alone.
    terms = published.anomaly_map(release["features"][:3], release["category"][:3])
    assert_golden(terms["reconstruction"], release["train.pred_grid"].squeeze(1))
    resized = nn.functional.interpolate(
        terms["reconstruction"][:, None], scale_factor=16, mode="bilinear", align_corners=True
    )
    assert_golden(resized, release["train.pred"])


def test_loss_gradients_and_codebooks_of_a_training_step_are_the_release_s(release, published):
    loss = published.loss(release["features"][:3], release["category"][:3])
    loss.backward()
    assert_golden(loss, release["train.loss"])
    gradients = {name: p.grad for name, p in published.named_parameters()}
    assert len(gradients) == sum(name.startswith("grad.") for name in release)
    for name, gradient in gradients.items():
        assert_golden(gradient, release[f"grad.{name}"].reshape(gradient.shape))
    step(published)
    state = published.state_dict()
    for name, expected in release_codebooks(release, "after").items():
        assert_golden(state[name], expected)


# ------------------------------------------------------------------ the layers


@pytest.mark.parametrize("layer", [EncoderLayer(64, 4, 128, 0.0), DecoderLayer(64, 4, 128, 0.0)])
def test_layers_in_bfloat16_are_nearly_those_in_float32(layer):
    x, other, slope = torch.randn(3, 4, 30, 64)
    position = torch.randn(30, 64)
    inputs = [x.requires_grad_(), position.requires_grad_(), *layer.parameters()]
    arguments = (other, position) if isinstance(layer, DecoderLayer) else (position,)

    def run(enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = layer(x, *arguments)
        return [output, *torch.autograd.grad(output, inputs, slope.to(output.dtype))]

    exact, rounded_ = run(False), run(True)
    assert all(g.dtype == torch.float32 for g in rounded_[1:])
    for a, b in zip(exact, rounded_):
        # The gradient of the keys' bias is zero but for rounding.
        assert (a - b.float()).norm() < 0.08 * a.norm() + 0.08


def test_what_autocast_leaves_alone_stays_as_it_is():
    model = small().double()
    features, category = batch(0, 1, 1)
    features = features.double()
    expected = model.eval().anomaly_map(features, category)
    with torch.autocast("cpu", torch.bfloat16):
        for name, term in model.anomaly_map(features, category).items():
            torch.testing.assert_close(term, expected[name])
        loss = model.train().loss(features, category)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.isfinite()


def test_encoder_layer_without_position_is_that_of_torch():
    ours = EncoderLayer(12, 3, 20, dropout=0.0).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x, torch.zeros(5, 12)), theirs(x))


def test_decoder_layer_without_position_is_that_of_torch():
    ours = DecoderLayer(12, 3, 20, dropout=0.0).double()
    theirs = nn.TransformerDecoderLayer(12, 3, 20, dropout=0.0, batch_first=True).double()
    theirs.load_state_dict(
        {name.replace("cross_attn", "multihead_attn"): value for name, value in ours.state_dict().items()}
    )
    x, memory = torch.randn(2, 2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x, memory, torch.zeros(5, 12)), theirs(x, memory))


def test_position_moves_queries_and_keys_but_not_values():
    layer = EncoderLayer(8, 2, 16, dropout=0.0).double()
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    attention.load_state_dict(layer.self_attn.state_dict())
    x, position = torch.randn(2, 5, 8).double(), torch.randn(5, 8).double()
    attended = layer.norm1(x + attention(x + position, x + position, x)[0])
    torch.testing.assert_close(layer(x, position), layer.norm2(attended + layer.feed_forward(attended)))


def test_position_of_a_cell_is_its_column_then_its_row():
    position = LearnedPosition((2, 3), 4)
    cells = position()
    assert cells.shape == (6, 4)
    for y in range(2):
        for x in range(3):
            assert torch.equal(cells[y * 3 + x], torch.cat([position.col[x], position.row[y]]))


def test_stacks_go_from_layer_to_layer():
    encoder, decoder = Encoder(2, 8, 2, 16, dropout=0.0), Decoder(2, 8, 2, 16, dropout=0.0)
    x, first, second = torch.randn(3, 2, 6, 8)
    position = torch.randn(6, 8)
    states = encoder(x, position)
    assert [s.shape for s in states] == [x.shape] * 3
    torch.testing.assert_close(states[2], encoder.layers[1](encoder.layers[0](x, position), position))
    passed = decoder.layers[1](decoder.layers[0](first, first, position), second, position)
    torch.testing.assert_close(decoder([first, second], position), decoder.norm(passed))


def test_dropout_acts_in_training_only():
    layer = EncoderLayer(8, 2, 16, dropout=0.5)
    x, position = torch.randn(2, 5, 8), torch.zeros(5, 8)
    assert not torch.equal(layer(x, position), layer(x, position))
    layer.eval()
    assert torch.equal(layer(x, position), layer(x, position))


def test_width_that_the_heads_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"multiple of its 4 heads, got 10"):
        EncoderLayer(10, 4, 8)


# ------------------------------------------------------------------ the whole module


def small(n_categories: int = 3, **parameters) -> HVQTrans:
    defaults = {"d_model": 16, "n_layers": 2, "n_heads": 2, "dim_feedforward": 32, "n_codes": 12}
    return HVQTrans(6, (3, 4), n_categories, **{**defaults, **parameters})


def batch(*category: int) -> tuple[Tensor, Tensor]:
    return torch.randn(len(category), 6, 3, 4), torch.tensor(category)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("transport", ["conditional", "nearest", "sinkhorn", "exact"])
def test_every_depth_and_transport_gives_finite_maps_of_the_grid(n_layers, transport):
    model = small(n_layers=n_layers, transport=transport).eval()
    features, category = batch(2, 0, 2, 1)
    output = model(features, category)
    assert output.reconstruction.shape == features.shape
    assert output.commitment.shape == (4,)
    widths = [level.quantized.shape[-1] for level in output.levels]
    assert widths == [32] * n_layers + [16]
    terms = model.anomaly_map(features, category)
    assert list(terms) == ["reconstruction"] + [f"transport_{j}" for j in range(n_layers + 1)]
    assert all(term.shape == (4, 3, 4) and term.isfinite().all() for term in terms.values())
    assert list(model.anomaly_map(features, category, levels=[1])) == ["reconstruction", "transport_1"]


def test_terms_are_what_they_say():
    model = small(transport="nearest").eval()
    features, category = batch(2, 0)
    output, terms = model(features, category), model.anomaly_map(features, category)
    expected = (output.reconstruction - features).square().sum(1).sqrt()
    torch.testing.assert_close(terms["reconstruction"], expected)
    for j, level in enumerate(output.levels):
        for i, c in enumerate(category):
            codes = model.quantizers[j].embed[c]
            distance = torch.cdist(level.input[i], codes).amin(1).square()
            torch.testing.assert_close(terms[f"transport_{j}"][i].flatten(), distance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_deviations_are_the_error_averaged_over_3_x_3_cells_and_over_tokens(patch_size):
    model = HVQTrans(5, (4, 6), 2, d_model=16, n_layers=1, n_heads=2, n_codes=8, patch_size=patch_size).eval()
    features, category = torch.randn(3, 5, 4, 6), torch.tensor([0, 1, 0])
    error = (model(features, category).reconstruction - features).detach()
    found = model.deviations(features, category)
    assert found["error"].shape == (3, 5, 4 // patch_size, 6 // patch_size)
    averaged = torch.empty_like(error)
    for i in range(4):
        for j in range(6):
            averaged[:, :, i, j] = error[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean((2, 3))
    tokens = averaged.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).mean((3, 5))
    torch.testing.assert_close(found.pop("error"), tokens)
    published = model.anomaly_map(features, category)
    torch.testing.assert_close(published.pop("reconstruction"), error.norm(dim=1))
    assert found.keys() == published.keys() == {"transport_0", "transport_1"}
    for name, cost in found.items():
        assert torch.equal(cost, published[name])


def test_loss_is_squared_error_plus_weighted_commitment():
    model = small(commitment_weight=0.7).eval()
    features, category = batch(2, 0)
    output = model(features, category)
    expected = (output.reconstruction - features).square().mean() + 0.7 * output.commitment.mean()
    torch.testing.assert_close(model.loss(features, category), expected)


@pytest.mark.parametrize("transport", ["conditional", "nearest", "sinkhorn"])
def test_transport_weight_adds_the_mean_transport_and_its_gradient(transport):
    plain = small(transport=transport, dropout=0.0).double()
    plain.initialise_codes([tuple(t.double() if t.is_floating_point() else t for t in batch(0, 1, 2, 0, 1, 2))])
    weighted = copy.deepcopy(plain)
    weighted.transport_weight = 0.5
    features, category = batch(2, 0, 1)
    features = features.double()
    plain.eval()
    terms = plain.anomaly_map(features, category)
    expected = torch.stack([terms[f"transport_{j}"].mean() for j in range(3)]).mean()
    plain.train()
    difference = weighted.loss(features, category) - plain.loss(features, category)
    torch.testing.assert_close(difference, 0.5 * expected)
    difference.backward()
    assert weighted.input_projection.weight.grad.abs().max() > 0


def test_step_touches_only_the_categories_that_are_present():
    model = small(n_categories=5, revive_threshold=0.5)
    before = copy.deepcopy(model.state_dict())
    model.loss(*batch(3, 1, 3)).backward()
    step(model)
    for c, head in enumerate(model.output_projection):
        assert (head.weight.grad is not None) == (c in (1, 3))
    for j, quantizer in enumerate(model.quantizers):
        for name, value in quantizer.state_dict().items():
            assert torch.equal(value[[0, 2, 4]], before[f"codebook.{j}.{name}"][[0, 2, 4]])
        assert not torch.equal(quantizer.embed[[1, 3]], before[f"codebook.{j}.embed"][[1, 3]])


def test_graph_of_a_step_does_not_grow_with_the_number_of_categories():
    def graph_size(model: HVQTrans) -> int:
        seen, stack = set(), [model.loss(*batch(0, 1, 1)).grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [parent for parent, _ in node.next_functions]
        return len(seen)

    assert graph_size(small(n_categories=2)) == graph_size(small(n_categories=40))


@pytest.mark.parametrize("transport", ["conditional", "sinkhorn", "exact"])
def test_map_of_an_image_does_not_depend_on_its_company(transport):
    model = small(transport=transport).double().eval()
    features, category = batch(2, 0, 1, 1, 2)
    features = features.double()
    features[1] *= 30
    together = model.anomaly_map(features, category)
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    for name, term in model.anomaly_map(features[shuffled], category[shuffled]).items():
        torch.testing.assert_close(term, together[name][shuffled])
    for i in range(5):
        for name, term in model.anomaly_map(features[i : i + 1], category[i : i + 1]).items():
            torch.testing.assert_close(term[0], together[name][i])


def test_images_of_the_three_memory_layouts_give_the_same():
    model = small().eval()
    features, category = batch(2, 0)
    channels_last = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(model(features, category).reconstruction, model(channels_last, category).reconstruction)


def trained(seed: int) -> HVQTrans:
    torch.manual_seed(seed)
    model = small(dropout=0.2, revive_threshold=0.3)
    data = [batch(0, 1, 2, 1), batch(2, 2, 0, 1)]
    model.initialise_codes(data)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(6):
        for features, category in data:
            optimizer.zero_grad()
            model.loss(features, category).backward()
            optimizer.step()
            step(model)
    return model


def test_training_is_determined_by_the_seed():
    first, again, other = trained(1).state_dict(), trained(1).state_dict(), trained(2).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["input_projection.weight"], other["input_projection.weight"])


def test_training_lowers_the_reconstruction_error_of_what_was_trained():
    torch.manual_seed(1)
    before = small(dropout=0.0)
    features, category = batch(0, 1, 2, 1)
    model = copy.deepcopy(before)
    model.initialise_codes([(features, category)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(features, category).backward()
        optimizer.step()
        step(model)
    after = model.eval().anomaly_map(features, category)["reconstruction"].mean()
    assert after < 0.6 * before.eval().anomaly_map(features, category)["reconstruction"].mean()


def test_initialised_codes_are_used_and_near_the_encoder_s_outputs():
    torch.manual_seed(3)
    # A few kinds of cells, so that the encoder's outputs are clustered.
    kinds = torch.randn(40, 6)
    cells = kinds[torch.randint(40, (30, 12))] + 0.01 * torch.randn(30, 12, 6)
    features, category = cells.mT.reshape(30, 6, 3, 4), torch.arange(30) % 3
    model = small(n_codes=16)
    far = copy.deepcopy(model).eval()(features, category).commitment.mean()
    model.initialise_codes([(features[:15], category[:15]), (features[15:], category[15:])])
    assert model.training
    for quantizer in model.quantizers:
        assert (quantizer.perplexity() > 8).all()
    assert model.eval()(features, category).commitment.mean() < 0.3 * far


def test_initialising_codes_touches_only_the_categories_that_came_and_no_global_state():
    model = small()
    before = copy.deepcopy(model.state_dict())
    data = [batch(0, 2), batch(2, 2)]
    state = torch.get_rng_state()
    model.initialise_codes(data, generator=torch.Generator().manual_seed(1), max_vectors=20)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    for name, value in before.items():
        if name.startswith("codebook"):
            assert torch.equal(after[name][1], value[1])
            assert not torch.equal(after[name][[0, 2]], value[[0, 2]])
        else:
            assert torch.equal(after[name], value)


def test_batches_that_can_be_gone_through_only_once_are_refused():
    with pytest.raises(TypeError, match="twice"):
        small().initialise_codes(iter([batch(0)]))


@pytest.mark.parametrize("n", [1, 2])
def test_added_category_leaves_the_others_bit_identical(n):
    model = trained(1).eval()
    features, category = batch(2, 0, 1)
    before = model.anomaly_map(features, category)
    assert [model.add_category() for _ in range(n)] == [3, 4][:n]
    assert model.n_categories == 3 + n
    for name, term in model.anomaly_map(features, category).items():
        assert torch.equal(term, before[name])
    new = batch(2 + n, 0, 2 + n)
    model.initialise_codes([new])
    assert all(term.isfinite().all() for term in model.anomaly_map(*new).values())


def test_state_dict_carries_the_whole_model():
    model = trained(1).eval()
    fresh = small(dropout=0.2).eval()
    fresh.load_state_dict(model.state_dict())
    features, category = batch(2, 0, 1)
    for name, term in fresh.anomaly_map(features, category).items():
        assert torch.equal(term, model.anomaly_map(features, category)[name])


def test_step_under_bfloat16_autocast_is_close_to_the_full_precision():
    exact = small(dropout=0.0)
    rough = copy.deepcopy(exact)
    features, category = batch(0, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = rough.loss(features, category)
    loss.backward()
    reference = exact.loss(features, category)
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)
    mine, theirs = rough.decoder.norm.weight.grad, exact.decoder.norm.weight.grad
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.95
    assert rough.quantizers[0].embed.dtype == torch.float32


@pytest.mark.parametrize("transport", ["conditional", "nearest", "sinkhorn", "exact"])
def test_maps_under_bfloat16_autocast_are_close_to_the_full_precision(transport):
    model = small(transport=transport).eval()
    features, category = batch(0, 1, 2, 2)
    exact = model.anomaly_map(features, category)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.anomaly_map(features, category)
    for name, term in rough.items():
        assert term.dtype == torch.float32
        deviation = (term - exact[name]).abs().mean() / exact[name].abs().mean()
        assert deviation < 0.1, name


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"transport": "optimal"}, "transport must be one of .*; got 'optimal'"),
        ({"transport": "exact", "transport_weight": 0.1}, "has no gradient; use 'sinkhorn'"),
        ({"d_model": 15}, "must be even, got 15"),
    ],
)
def test_parameters_that_cannot_work_are_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        small(**parameters)


# ------------------------------------------------------------------ patches and the projection's start


def test_patches_fold_and_unfold_without_loss():
    model = HVQTrans(5, (6, 8), 1, d_model=8, n_layers=1, n_heads=2, dim_feedforward=8, n_codes=4, patch_size=2)
    features = torch.randn(3, 5, 6, 8)
    tokens = model._tokens(features)
    assert tokens.shape == (3, 12, 20)
    # Token (row 1, column 2) is the patch of rows 2..3 and columns 4..5.
    assert torch.equal(tokens[:, 6].sort(-1).values, features[:, :, 2:4, 4:6].flatten(1).sort(-1).values)
    assert torch.equal(model._untokenise(tokens), features)


def test_map_of_patches_is_on_the_grid_of_the_features():
    model = HVQTrans(
        5, (6, 8), 1, d_model=8, n_layers=1, n_heads=2, dim_feedforward=8, n_codes=4, patch_size=2, transport="nearest"
    ).eval()
    features, category = torch.randn(3, 5, 6, 8), torch.zeros(3, dtype=torch.long)
    terms = model.anomaly_map(features, category)
    assert {tuple(term.shape) for term in terms.values()} == {(3, 6, 8)}
    with torch.no_grad():
        error = model(features, category).reconstruction - features
    torch.testing.assert_close(terms["reconstruction"], error.square().sum(1).sqrt())


def test_patch_size_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="patch_size=2 does not divide the grid of 6 x 7"):
        HVQTrans(5, (6, 7), 1, d_model=8, patch_size=2)


def test_projection_starts_as_principal_components():
    torch.manual_seed(0)
    mixing = torch.randn(12, 12)
    features = [torch.einsum("nchw,cd->ndhw", torch.randn(8, 12, 4, 4), mixing) + 3 for _ in range(4)]
    category = torch.zeros(8, dtype=torch.long)
    model = HVQTrans(12, (4, 4), 1, d_model=8, n_layers=1, n_heads=2, dim_feedforward=8, n_codes=4)
    model.initialise_projection([(f, category) for f in features])
    tokens = torch.cat([model._tokens(f).flatten(0, 1) for f in features])
    projected = model.input_projection(tokens).detach()
    covariance = projected.T.cov()
    assert projected.mean(0).abs().max() < 1e-4  # centred
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3  # uncorrelated
    assert covariance.diagonal().mean() == pytest.approx(1, abs=1e-2)  # of variance 1 in the mean
    # No linear map to as many dimensions keeps more: compare with the singular values.
    singular = torch.linalg.svdvals(tokens - tokens.mean(0))
    share = covariance.diagonal() / covariance.diagonal().sum()
    torch.testing.assert_close(share, singular[:8].square() / singular[:8].square().sum(), rtol=1e-3, atol=1e-4)
