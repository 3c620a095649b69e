"""The sampler's promises, for any composition: balance, coverage, disjoint shares, and no memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpcn_dist.data.sampler import (
    BalancedSampler,
    WholeSampler,
    check_division,
    check_whole_division,
    share,
    substitutes,
)
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError

FAST = settings(max_examples=40, deadline=None)


@st.composite
def compositions(draw: st.DrawFn) -> tuple[list[int], int | None, int, int]:
    """Images of each class, classes per batch, images per class, seed."""
    images_per_class = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(images_per_class, 17), min_size=2, max_size=7))
    classes_per_batch = draw(st.one_of(st.none(), st.integers(1, len(counts))))
    return counts, classes_per_batch, images_per_class, draw(st.integers(0, 2**31 - 1))


def _sampler(counts: list[int], classes_per_batch: int | None, images_per_class: int, seed: int) -> BalancedSampler:
    config = DataConfig(classes_per_batch=classes_per_batch, images_per_class=images_per_class)
    ids = np.split(np.arange(1000, 1000 + sum(counts)), np.cumsum(counts)[:-1])
    return BalancedSampler([f"class {i}" for i in range(len(counts))], ids, config, seed)


def _labels(counts: list[int], ids: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)[ids - 1000]


@FAST
@given(compositions(), st.integers(0, 10**6))
def test_a_batch_holds_m_different_images_of_each_of_n_classes(composition, step: int) -> None:
    counts, classes_per_batch, images_per_class, _ = composition
    ids, view_ids = _sampler(*composition).batch(step)
    assert len(ids) == len(set(ids.tolist())) == len(view_ids) == (classes_per_batch or len(counts)) * images_per_class
    assert set(Counter(_labels(counts, ids).tolist()).values()) == {images_per_class}
    assert len(set(_labels(counts, ids).tolist())) == (classes_per_batch or len(counts))


@FAST
@given(compositions(), st.integers(0, 3))
def test_in_a_round_of_k_steps_each_class_appears_n_times(composition, round_: int) -> None:
    counts, classes_per_batch, images_per_class, _ = composition
    sampler, num_classes = _sampler(*composition), len(counts)
    steps = range(round_ * num_classes, (round_ + 1) * num_classes)
    seen = Counter(label for step in steps for label in _labels(counts, sampler.batch(step)[0]).tolist())
    assert seen == {label: (classes_per_batch or num_classes) * images_per_class for label in range(num_classes)}


@FAST
@given(compositions())
def test_a_pass_shows_an_image_at_most_once_and_leaves_out_fewer_than_m(composition) -> None:
    counts, _, images_per_class, _ = composition
    sampler = _sampler(*composition)
    shown = Counter()
    for step in range(60):
        ids, view_ids = sampler.batch(step)
        shown.update(zip(ids.tolist(), view_ids.tolist(), strict=True))
    assert set(shown.values()) == {1}
    for label, count in enumerate(counts):
        by_pass = Counter(view for image, view in shown if _labels(counts, np.array([image]))[0] == label)
        complete = [by_pass[view] for view in range(max(by_pass))]
        assert all(images == count // images_per_class * images_per_class for images in complete)


@FAST
@given(compositions(), st.integers(0, 1000))
def test_a_batch_depends_on_nothing_but_its_step(composition, step: int) -> None:
    used = _sampler(*composition)
    for other in (5, 0, 77):
        used.batch(other)
    for mine, fresh in zip(used.batch(step), _sampler(*composition).batch(step), strict=True):
        np.testing.assert_array_equal(mine, fresh)


@FAST
@given(compositions(), st.integers(0, 1000))
def test_shares_are_disjoint_balanced_and_join_to_the_same_batch_for_any_world_size(composition, step: int) -> None:
    counts = composition[0]
    ids, _ = _sampler(*composition).batch(step)
    for world_size in (n for n in range(1, len(ids) + 1) if len(ids) % n == 0):
        shares = [share(ids, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(shares), ids)
        assert {len(part) for part in shares} == {len(ids) // world_size}
        for part in shares:
            held = Counter(_labels(counts, part).tolist())
            assert max(held.values()) - (min(held.values()) if len(held) == len(set(_labels(counts, ids))) else 0) <= 1


def test_batches_and_their_order_change_with_seed_and_pass() -> None:
    batches = [_sampler([12, 12, 12], None, 4, seed).batch(step)[0].tolist() for seed in (0, 1) for step in (0, 1, 3)]
    assert len(set(map(tuple, batches))) == len(batches)


def test_the_stream_is_the_published_one() -> None:
    """Resuming an old run on a newer NumPy must give the same batches: these numbers must never change."""
    ids, view_ids = _sampler([5, 6, 4], 2, 2, 11).batch(4)
    assert ids.tolist() == [1001, 1005, 1000, 1010] and view_ids.tolist() == [1, 1, 1, 1]


def test_substitutes_are_a_keyed_order_of_the_candidates() -> None:
    candidates = np.arange(100, 120)
    orders = [substitutes(0, image, step, candidates).tolist() for image in (1, 2) for step in (0, 1)]
    assert all(sorted(order) == candidates.tolist() for order in orders) and len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize(
    ("counts", "classes_per_batch", "images_per_class", "message"),
    [
        (
            [20, 3, 9],
            3,
            5,
            "data.images_per_class 5: class 'class 1' has 3 training image(s), but a batch needs 5 of a class; "
            "add images of 'class 1', or lower it to at most 3",
        ),
    ],
)
def test_data_that_do_not_fit_the_batch(counts, classes_per_batch, images_per_class, message: str) -> None:
    with pytest.raises(UserError) as error:
        _sampler(counts, classes_per_batch, images_per_class, 0)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("classes", "images", "world_size", "hint"),
    [(3, 13, 4, "try 12 or 16"), (3, 1, 2, "try 2"), (4, 3, 8, "try 2 or 4"), (3, 14, 5, "try 10 or 15")],
)
def test_batch_that_does_not_divide_by_the_ranks(classes: int, images: int, world_size: int, hint: str) -> None:
    with pytest.raises(UserError) as error:
        check_division(classes, images, world_size)
    expected = f"{images} x {classes} classes = {images * classes} images do not divide by {world_size} ranks; {hint}"
    assert str(error.value) == f"data.images_per_class {images}: {expected}"


def test_all_images_at_once_in_another_order_at_every_step():
    ids = np.array([2, 3, 5, 7, 11])
    sampler, again = WholeSampler(ids, 2, seed=4), WholeSampler(ids, 2, seed=4)
    orders = []
    for step in range(6):
        image_ids, view_ids = sampler.batch(step)
        assert sorted(image_ids.tolist()) == ids.tolist() and set(view_ids.tolist()) == {step}
        assert np.array_equal(again.batch(step)[0], image_ids)
        orders.append(tuple(image_ids.tolist()))
    assert sampler.batch_size == 5 and len(set(orders)) > 3


def test_all_images_that_do_not_divide_by_the_ranks():
    check_whole_division(12, 3)
    with pytest.raises(UserError) as error:
        check_whole_division(42, 4)
    expected = "all 42 training images do not divide by 4 ranks; start 3 rank(s), or give a number"
    assert str(error.value) == f"data.images_per_class: {expected}"


@pytest.mark.parametrize(("classes", "images", "world_size"), [(3, 14, 6), (1, 1, 1), (4, 2, 8)])
def test_batch_that_divides(classes: int, images: int, world_size: int) -> None:
    check_division(classes, images, world_size)


def test_a_cap_beyond_the_classes_changes_nothing() -> None:
    capped, whole = _sampler([20, 20, 9], 24, 4, 1), _sampler([20, 20, 9], None, 4, 1)
    assert capped.batch_size == whole.batch_size == 12
    assert all(np.array_equal(capped.batch(step), whole.batch(step)) for step in range(5))
