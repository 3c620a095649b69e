"""Views are pure functions of (seed, image, view number), in bounds, and drawn from published streams."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcn_dist.data.views import CROP, VIEW, Views, centre_views, crops, views
from fpcn_dist.recipe.augment import AugmentConfig
from fpcn_dist.recipe.schema import DataConfig

FAST = settings(max_examples=40, deadline=None)
EVERYTHING = AugmentConfig(
    random_resized_crop=(0.2, 0.9), brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1, policy="rand", erasing=0.7
)


def _pixels(views: Views, config: DataConfig) -> list[list[int]]:
    """Crop row, crop column and flip of plain views of a square frame."""
    room = config.resize - config.crop
    pixels = np.stack([views["down"] * room, views["right"] * room, views["flip"]], axis=1)
    return pixels.round().astype(int).tolist()


def test_the_streams_are_the_published_ones() -> None:
    """Resuming an old run on a newer NumPy must give the same views: these numbers must never change."""
    ids, view_ids = np.array([1001, 1005, 1000, 1010]), np.ones(4, dtype=np.int64)
    plain = views(11, ids, view_ids, DataConfig())
    assert _pixels(plain, DataConfig()) == [[24, 25, 0], [31, 16, 1], [48, 39, 0], [16, 36, 1]]
    changed = views(11, ids[:1], view_ids[:1], DataConfig(augment=EVERYTHING))[0]
    expected = {"down": 0.885986, "right": 0.14209, "flip": 0, "scale": 0.537564, "ratio": 1.158024}
    expected |= {"brightness": 1.272054, "contrast": 0.789601, "saturation": 0.841442, "hue": 0.035243}
    expected |= {"operations": [3, 0], "magnitudes": [60.906344, 0], "erased": [0, 0, 0, 0]}
    assert set(expected) == set(VIEW.names or ())
    for name, value in expected.items():
        np.testing.assert_allclose(changed[name], value, atol=1e-6)


@FAST
@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_plain_views_are_whole_pixels_in_bounds(seed: int, crop: int, slack: int, flip: bool) -> None:
    config = DataConfig(resize=crop + slack, crop=crop, flip=flip)
    plain = views(seed, np.arange(50), np.arange(50) % 4, config)
    for name in ("down", "right"):
        pixels = plain[name] * slack
        assert pixels.min() >= 0 and pixels.max() <= slack and np.abs(pixels - pixels.round()).max() < 1e-12
    assert set(plain["flip"].tolist()) <= {0, int(flip)}
    unchanged = centre_views(50)
    assert all((plain[name] == unchanged[name]).all() for name in VIEW.fields or () if name not in CROP)


@FAST
@given(st.integers(0, 2**31 - 1), st.sampled_from(["squeeze", "pad", "short_side"]), st.booleans())
def test_a_view_depends_on_seed_image_and_number_alone(seed: int, fit, everything: bool) -> None:
    config = DataConfig(resize=40, crop=32, fit=fit, augment=EVERYTHING if everything else AugmentConfig())
    ids, view_ids = np.arange(50), np.arange(50) % 4
    whole = views(seed, ids, view_ids, config)
    order = np.argsort(ids[::-1] % 7)
    np.testing.assert_array_equal(views(seed, ids[order], view_ids[order], config), whole[order])
    assert crops(whole).shape == (50, 5) and not (whole == views(seed + 1, ids, view_ids, config)).all()


def test_plain_views_cover_all_positions_and_flip_half_of_them() -> None:
    config = DataConfig(resize=12, crop=8)
    pixels = np.array(_pixels(views(0, np.arange(4000) // 2, np.arange(4000) % 2, config), config))
    for column, span in ((0, 5), (1, 5), (2, 2)):
        counts = np.bincount(pixels[:, column], minlength=span)
        assert counts.size == span and abs(counts / 4000 - 1 / span).max() < 0.03
    assert not np.array_equal(pixels[::2], pixels[1::2])


def test_what_is_switched_on_changes_nothing_else() -> None:
    ids, view_ids = np.arange(20), np.zeros(20, dtype=np.int64)
    both = views(3, ids, view_ids, DataConfig(augment=AugmentConfig(hue=0.1, brightness=0.4)))
    for name, value in (("hue", 0.1), ("brightness", 0.4)):
        alone = views(3, ids, view_ids, DataConfig(augment=AugmentConfig(**{name: value})))
        np.testing.assert_array_equal(alone[name], both[name])
        np.testing.assert_array_equal(alone["down"], both["down"])


def test_numbers_fill_their_ranges() -> None:
    ids = np.arange(4000)
    drawn = views(1, ids, ids % 3, DataConfig(augment=EVERYTHING))
    ranges = {"scale": (0.2, 0.9), "ratio": (3 / 4, 4 / 3), "down": (0, 1), "right": (0, 1), "hue": (-0.1, 0.1)}
    ranges |= {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0, 2.5)}
    for name, (low, high) in ranges.items():
        values = np.log(drawn[name]) if name == "ratio" else drawn[name]
        low, high = (np.log(low), np.log(high)) if name == "ratio" else (low, high)
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert counts.sum() == 4000 and abs(counts / 400 - 1).max() < 0.25, name
    correlation = np.corrcoef([drawn[name] for name in ranges])
    assert np.abs(correlation - np.eye(len(ranges))).max() < 0.06
