"""The loaders: what a batch says about itself is true, restarts are exact, and files that go bad are dealt with."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fpcn_dist.data.batch import Batch, BatchRequest
from fpcn_dist.data.decoding.backends import open_backend
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.loader import EvalLoader, TrainLoader, ViewLoader
from fpcn_dist.data.synthetic import generate
from fpcn_dist.data.views import centre_views, crops, views
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError
from tests.helpers.views import views_cut_as

pytestmark = pytest.mark.usefixtures("backend")

CPU = torch.device("cpu")
CONFIG = DataConfig(resize=40, crop=32, images_per_class=4, eval_batch_size=4, val_fraction=0.2, threads=2)
COLUMNS = ("images", "labels", "image_ids", "view_ids", "crops")


@pytest.fixture(scope="module")
def manifest(rocks: Path, backend: str) -> Manifest:
    return build_manifest(rocks, CONFIG, seed=0)


@pytest.fixture
def fragile(tmp_path: Path, backend: str) -> Manifest:
    """A manifest of images that a test may damage."""
    generate(tmp_path / "data", images_per_class=24, seed=1, min_side=48, max_side=64)
    return build_manifest(tmp_path / "data", CONFIG, seed=0)


def _train(
    manifest: Manifest, config: DataConfig = CONFIG, *, rank: int = 0, world_size: int = 1, start_step: int = 0
) -> TrainLoader:
    return TrainLoader(manifest, config, 5, rank=rank, world_size=world_size, device=CPU, start_step=start_step)


def _take(loader: Iterator[Batch], count: int) -> list[Batch]:
    return list(islice(loader, count))


def _same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def _joined(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in COLUMNS))


def _decoded(manifest: Manifest, image_ids: Tensor, crops: Tensor) -> Tensor:
    """The images, each decoded on its own."""
    requests = [
        BatchRequest([manifest.blob(i)], views_cut_as(crops[None]))
        for i, crops in zip(image_ids.tolist(), crops, strict=True)
    ]
    decoding = open_backend("auto").decoding(iter(requests), CONFIG, CPU, 1, 1)
    return torch.cat([decoding.next() for _ in requests])


def test_a_batch_tells_the_truth(manifest: Manifest) -> None:
    for batch in _take(_train(manifest), 3):
        assert batch.images.shape == (12, 3, 32, 32) and batch.images.dtype == torch.float32
        assert all(getattr(batch, name).dtype == torch.int64 for name in COLUMNS[1:-1])
        assert batch.labels.tolist() == manifest.labels[batch.image_ids.numpy()].tolist()
        assert batch.labels.bincount().tolist() == [4, 4, 4]
        assert set(batch.image_ids.tolist()) <= set(manifest.ids("train").tolist())
        expected = views(5, batch.image_ids.numpy(), batch.view_ids.numpy(), CONFIG)
        assert batch.crops.tolist() == crops(expected).tolist()
        assert torch.equal(batch.images, _decoded(manifest, batch.image_ids, batch.crops))


def test_sizes(manifest: Manifest) -> None:
    loader = _train(manifest, world_size=2)
    assert loader.batch_size == 12 and len(next(loader)) == 6
    assert loader.steps_per_epoch == len(manifest.ids("train")) // 12 == 4
    assert _train(manifest, CONFIG.changed(images_per_class=17)).steps_per_epoch == 1


def test_batches_stay_as_they_were(manifest: Manifest) -> None:
    """The pipeline must not write into the memory of a batch that someone still holds."""
    loader = _train(manifest)
    first = next(loader)
    copy = first.images.clone()
    _take(loader, 6)
    assert torch.equal(first.images, copy)


def test_restart_is_bit_identical_with_any_number_of_threads(manifest: Manifest) -> None:
    whole = _take(_train(manifest), 7)
    for threads in (1, 3):
        restarted = _train(manifest, CONFIG.changed(threads=threads), start_step=4)
        assert all(_same(a, b) for a, b in zip(whole[4:], _take(restarted, 3), strict=True))
    assert not _same(whole[0], whole[1])


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_join_to_the_batch_of_one(manifest: Manifest, world_size: int) -> None:
    ranks = [_train(manifest, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole in _take(_train(manifest), 2):
        assert _same(whole, _joined([next(rank) for rank in ranks]))


def test_batch_that_does_not_divide(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="4 x 3 classes = 12 images do not divide by 5 ranks; try 5"):
        _train(manifest, world_size=5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [14, 13, 2])
def test_evaluation_sees_each_image_once(manifest: Manifest, world_size: int, count: int) -> None:
    ids = manifest.ids("val")[:count]
    blobs = [manifest.blob(i) for i in ids]
    seen = []
    for rank in range(world_size):
        loader = EvalLoader(blobs, manifest.labels[ids], ids, CONFIG, rank=rank, world_size=world_size, device=CPU)
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch) == 4 for batch in batches[:-1])
        for batch in batches:
            assert batch.labels.tolist() == manifest.labels[batch.image_ids.numpy()].tolist()
            assert batch.crops.tolist() == crops(centre_views(len(batch))).tolist() and set(
                batch.view_ids.tolist()
            ) == {-1}
            assert torch.equal(batch.images, _decoded(manifest, batch.image_ids, batch.crops))
        seen += [i for batch in batches for i in batch.image_ids.tolist()]
    assert sorted(seen) == ids.tolist()


def test_views_are_shown_in_turn(manifest: Manifest) -> None:
    """With two views of each image, the third time that it is due shows the first again."""
    config = CONFIG.changed(views=2)
    endless, in_turn = _take(_train(manifest), 18), _take(_train(manifest, config), 18)
    shown: dict[tuple[int, int], Tensor] = {}
    repeated = 0
    for free, batch in zip(endless, in_turn, strict=True):
        assert torch.equal(batch.image_ids, free.image_ids) and torch.equal(batch.view_ids, free.view_ids % 2)
        expected = views(5, batch.image_ids.numpy(), batch.view_ids.numpy(), CONFIG)
        assert batch.crops.tolist() == crops(expected).tolist()
        for image, *view in zip(batch.images, batch.image_ids.tolist(), batch.view_ids.tolist(), strict=True):
            repeated += tuple(view) in shown
            assert torch.equal(shown.setdefault(tuple(view), image), image)
    assert max(batch.view_ids.max() for batch in endless) >= 3 and repeated > 50
    assert all(_same(a, b) for a, b in zip(in_turn[7:9], _train(manifest, config, start_step=7), strict=False))


def _labels_that_name_views(image_ids: np.ndarray, view_ids: np.ndarray) -> np.ndarray:
    return np.stack([image_ids, view_ids], axis=1).astype(np.float32)


def test_soft_labels_are_those_of_the_views_that_are_shown(fragile: Manifest) -> None:
    """On each rank, in each part of a batch, and where an image stands in for one that turned bad."""
    whole = _take(_train(fragile), 8)
    loaders = [
        TrainLoader(fragile, CONFIG, 5, rank=r, world_size=2, device=CPU, soft_labels=_labels_that_name_views)
        for r in range(2)
    ]
    assert whole[0].teacher_logits is None and whole[0].split(3)[0].teacher_logits is None
    for step, batch in enumerate(whole):
        if step == 2:
            _damage(_path(fragile, int(whole[5].image_ids[0])), "cut short")
        shares = [next(loader) for loader in loaders]
        assert torch.equal(torch.cat([share.view_ids for share in shares]), batch.view_ids)
        for part in [*shares, *shares[0].split(4), *shares[1].split(4)]:
            assert part.teacher_logits is not None and part.teacher_logits.dtype == torch.float32
            assert torch.equal(part.teacher_logits, torch.stack([part.image_ids, part.view_ids], dim=1).float())
    assert len(loaders[0].replaced) == 1


def test_given_views_come_in_order_and_are_those_of_training(manifest: Manifest) -> None:
    batch = _take(_train(manifest), 5)[4]
    image_ids, view_ids = batch.image_ids.numpy()[::-1][:10].copy(), batch.view_ids.numpy()[::-1][:10].copy()
    loader = ViewLoader(manifest, CONFIG, 5, image_ids, view_ids, CPU)
    found = list(loader)
    assert [len(part) for part in found] == [4, 4, 2] and len(loader) == 3
    backwards = {name: getattr(batch, name).flip(0)[:10] for name in COLUMNS}
    assert _same(_joined(found), Batch(**backwards))


def test_a_given_view_that_cannot_be_read_is_named(fragile: Manifest) -> None:
    ids = fragile.ids("train")[:6]
    _damage(_path(fragile, int(ids[5])), "deleted")
    with pytest.raises(UserError, match=f"image {_path(fragile, int(ids[5]))}: cannot be read"):
        list(ViewLoader(fragile, CONFIG, 5, ids, ids * 0, CPU))


def test_evaluation_of_a_split_can_be_repeated(manifest: Manifest) -> None:
    loader = EvalLoader.from_manifest(manifest, "val", CONFIG, rank=0, world_size=1, device=CPU)
    first = list(loader)
    next(iter(loader))  # given up half-way
    assert all(_same(a, b) for a, b in zip(first, loader, strict=True))
    assert _joined(first).image_ids.tolist() == manifest.ids("val").tolist()


def test_evaluation_in_inference_mode(manifest: Manifest) -> None:
    loader = EvalLoader.from_manifest(manifest, "val", CONFIG, rank=0, world_size=1, device=CPU)
    with torch.inference_mode():
        batches = list(loader)
    assert all(_same(a, b) for a, b in zip(batches, loader, strict=True))


def test_evaluation_of_nothing(manifest: Manifest) -> None:
    loader = EvalLoader([], np.array([]), np.array([]), CONFIG, rank=0, world_size=1, device=CPU)
    assert len(loader) == 0 and list(loader) == []


def _path(manifest: Manifest, image_id: int) -> Path:
    return Path(manifest.blob(image_id).path)


def _damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if how == "cut short" else b"")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut short", "the image data are truncated or damaged"),
        ("emptied", "the file is empty"),
        ("deleted", "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_turns_bad_is_replaced(fragile: Manifest, how: str, reason: str) -> None:
    intact = _take(_train(fragile), 10)
    loader = _train(fragile)
    before = _take(loader, 2)
    read_ahead = {i for batch in intact[2:6] for i in batch.image_ids.tolist()}
    bad = next(i for i in intact[6].image_ids.tolist() if i not in read_ahead)
    _damage(_path(fragile, bad), how)
    batches = before + _take(loader, 8)

    assert loader.replaced == [(bad, str(_path(fragile, bad)), reason)]
    hit = [step for step, batch in enumerate(intact) if bad in batch.image_ids.tolist()]
    assert 6 in hit
    for step, (whole, batch) in enumerate(zip(intact, batches, strict=True)):
        kept = batch.image_ids == whole.image_ids
        assert kept.sum() == 12 - (step in hit and step >= 6)
        for name in COLUMNS:
            assert torch.equal(getattr(batch, name)[kept], getattr(whole, name)[kept])
    for step in (step for step in hit if step >= 6):
        batch, whole = batches[step], intact[step]
        (place,) = (batch.image_ids != whole.image_ids).nonzero()[:, 0].tolist()
        assert bad not in batch.image_ids.tolist() and len(set(batch.image_ids.tolist())) == 12
        assert torch.equal(batch.labels, whole.labels) and torch.equal(batch.view_ids, whole.view_ids)
        at = slice(place, place + 1)
        assert torch.equal(batch.images[at], _decoded(fragile, batch.image_ids[at], batch.crops[at]))
        expected = views(5, batch.image_ids[at].numpy(), batch.view_ids[at].numpy(), CONFIG)
        assert batch.crops[at].tolist() == crops(expected).tolist()


def test_replacement_does_not_depend_on_history_or_ranks(fragile: Manifest) -> None:
    loader = _train(fragile)
    before = _take(loader, 1)
    for label in range(3):
        ids = fragile.ids("train")
        _damage(_path(fragile, int(ids[fragile.labels[ids] == label][label])), "cut short")
    batches = before + _take(loader, 5)
    assert len(loader.replaced) == 3
    restarted = _train(fragile, start_step=4)
    assert all(_same(a, b) for a, b in zip(batches[4:], _take(restarted, 2), strict=True))
    ranks = [_train(fragile, rank=rank, world_size=2, start_step=4) for rank in range(2)]
    assert all(_same(whole, _joined([next(rank) for rank in ranks])) for whole in batches[4:])


def test_too_many_bad_files_stop_the_run(fragile: Manifest) -> None:
    loader = _train(fragile, CONFIG.changed(max_bad_images=1))
    next(loader)
    bad = [_path(fragile, i) for i in fragile.ids("train").tolist()[::5]]
    for path in bad:
        _damage(path, "cut short")
    with pytest.raises(UserError) as error:
        _take(loader, 20)
    assert error.value.field == "data.max_bad_images" and "turned unreadable during the run" in error.value.reason
    assert sum(str(path) in str(error.value) for path in bad) >= 2


def test_a_class_without_readable_images_stops_the_run(fragile: Manifest) -> None:
    loader = _train(fragile, CONFIG.changed(max_bad_images=50))
    next(loader)
    for path in Path(fragile.root, "marble").iterdir():
        _damage(path, "emptied")
    with pytest.raises(UserError, match="all training images of class 'marble' turned unreadable"):
        _take(loader, 20)


def test_evaluation_names_the_bad_file(fragile: Manifest) -> None:
    bad = _path(fragile, int(fragile.ids("val")[5]))
    _damage(bad, "cut short")
    loader = EvalLoader.from_manifest(fragile, "val", CONFIG, rank=0, world_size=1, device=CPU)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value) == (
        f"image {bad}: the image data are truncated or damaged; restore it, or leave it out and evaluate anew"
    )


def test_a_file_that_was_away_for_a_moment_is_read_again(fragile: Manifest, backend: str) -> None:
    step = 5 if backend == "dali" else 3  # the first whose files have not been read after two batches
    intact = _take(_train(fragile), step + 2)
    loader = _train(fragile)
    batches = _take(loader, 2)
    read = {i for batch in intact[2:step] for i in batch.image_ids.tolist()}
    path = _path(fragile, next(i for i in intact[step].image_ids.tolist() if i not in read))
    path.rename(path.with_suffix(".away"))
    batches += _take(loader, step - 2)
    time.sleep(0.5)  # the step is decoded ahead, and fails
    path.with_suffix(".away").rename(path)
    batches += _take(loader, 2)
    assert all(_same(a, b) for a, b in zip(intact, batches, strict=True)) and loader.replaced == []
    assert loader._retried_step == step  # or the file was not missed at all


@pytest.mark.slow
def test_a_process_ends_while_the_pipeline_works(rocks: Path, backend: str) -> None:
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from fpcn_dist.recipe.schema import DataConfig; from fpcn_dist.data.loader import TrainLoader\n"
        "from fpcn_dist.data.index.build import build_manifest\n"
        "config = DataConfig(images_per_class=16, backend=sys.argv[2])\n"
        "manifest = build_manifest(Path(sys.argv[1]), config, 0)\n"
        "loader = TrainLoader(manifest, config, 0, rank=0, world_size=1, device=torch.device('cpu'))\n"
        "print(len(next(loader)))"
    )
    run = subprocess.run([sys.executable, "-c", script, rocks, backend], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, "48"), run.stderr
