"""Fields of vectors that are read off maps."""

import torch

from vqad.nn.fields import MAX_CELLS, averaged, feature_fields


def maps(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, h, w, generator=g) for c, h, w in shapes]


def test_of_a_pyramid_they_are_fine_middle_deep_and_whole():
    _, eight, sixteen, deep = made = maps((3, 16, 16), (4, 8, 8), (5, 4, 4), (6, 2, 2))
    fields = feature_fields(made, (4, 8, 16, 32))
    assert {k: tuple(v.shape[1:]) for k, v in fields.items()} == {
        "fine": (4, 8, 8), "middle": (9, 4, 4), "deep": (6, 2, 2), "whole": (6, 1, 1),
    }  # fmt: skip
    torch.testing.assert_close(fields["fine"], averaged(eight))
    torch.testing.assert_close(fields["middle"][:, 4:], averaged(sixteen))
    blocks = averaged(eight).unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(fields["middle"][:, :4], blocks)
    assert fields["deep"] is deep
    torch.testing.assert_close(fields["whole"][:, :, 0, 0], deep.mean((2, 3)))


def test_grids_that_do_not_divide_are_resized():
    fields = feature_fields(maps((4, 9, 7), (5, 5, 4), (6, 3, 2)), (8, 16, 32))
    assert fields["middle"].shape == (2, 9, 5, 4)


def test_where_all_strides_are_one_every_map_but_the_last_is_near():
    fields = feature_fields(maps((3, 4, 4), (3, 4, 4), (3, 4, 4)), (14, 14, 14))
    assert fields["middle"].shape == (2, 6, 4, 4)


def test_of_a_single_map_and_of_rows():
    (single,) = made = maps((3, 5, 4))
    fields = feature_fields(made)
    assert list(fields) == ["features", "whole"]
    torch.testing.assert_close(fields["features"], averaged(single))
    rows = maps((3, 1, 1))
    assert feature_fields(rows)["features"] is rows[0]
    assert list(feature_fields(rows)) == ["features"]


def test_large_maps_are_averaged():
    (field, _) = feature_fields(maps((1, 3 * MAX_CELLS, 100))).values()
    assert max(field.shape[2:]) <= MAX_CELLS


def test_an_average_is_of_the_cells_that_are_there():
    assert torch.equal(averaged(torch.ones(1, 1, 3, 3)), torch.ones(1, 1, 3, 3))
