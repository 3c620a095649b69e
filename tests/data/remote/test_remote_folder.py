"""A remote folder is a data folder: the same images, classes and batches as on this machine, whatever its store does.

It is read from an object store in this process.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from fpcn_dist.data.ahead import BATCHES_AHEAD
from fpcn_dist.data.batch import Batch
from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.shapes.remote import as_listing
from fpcn_dist.data.loader import EvalLoader, TrainLoader
from fpcn_dist.data.remote.reading import reader
from fpcn_dist.data.synthetic import generate
from fpcn_dist.recipe import command_line
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.address import RemoteFolder, address
from fpcn_dist.runtime.errors import Outage, UserError
from tests.helpers.backends import BACKENDS
from tests.helpers.objects import FaultyStore

CPU = torch.device("cpu")
CONFIG = DataConfig(
    backend="torchvision", resize=40, crop=32, images_per_class=2, eval_batch_size=4, val_fraction=0.25, threads=2
)
LOST = ConnectionResetError(104, "Connection reset by peer")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    generate(folder, images_per_class=8, seed=3, min_side=40, max_side=48)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def folder(photographs: Path, faulty: type[FaultyStore]) -> RemoteFolder:
    """The photographs in the object store of this process."""
    found = address(faulty.upload(photographs, "bucket/photographs") + "/")
    assert isinstance(found, RemoteFolder)
    return found


@pytest.fixture
def manifest(folder: RemoteFolder) -> Manifest:
    return build_manifest(folder, CONFIG, seed=0)


def _train(manifest: Manifest, config: DataConfig = CONFIG, start_step: int = 0) -> TrainLoader:
    return TrainLoader(manifest, config, 5, rank=0, world_size=1, device=CPU, start_step=start_step)


def _take(loader: TrainLoader, count: int) -> list[Batch]:
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def _evaluate(manifest: Manifest, split: str = "val") -> Iterator[Batch]:
    return iter(EvalLoader.from_manifest(manifest, split, CONFIG, rank=0, world_size=1, device=CPU))


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.image_ids, y.image_ids) for x, y in zip(a, b, strict=True)
    )


@dataclass(frozen=True)
class _Args:
    """A command."""

    data: command_line.Data
    other: command_line.Data | None = None


def test_command_lines_take_paths_and_urls(tmp_path: Path) -> None:
    args = command_line.parse(_Args, ["--data", "s3://bucket//photos/", "--other", str(tmp_path)])
    assert args == _Args(RemoteFolder("s3://bucket//photos"), tmp_path)
    assert command_line.parse(_Args, ["--data", "photos/"]) == _Args(Path("photos"))


def test_addresses_keep_the_slashes_of_a_url(tmp_path: Path) -> None:
    assert str(address("s3://bucket/a//b/").resolve()) == "s3://bucket/a//b"
    assert address("s3://bucket/photos").resolve().name == "photos"
    assert address(f"file://{tmp_path}") == address(str(tmp_path)) == tmp_path


def test_the_manifest_is_that_of_the_same_folder_here(photographs: Path, manifest: Manifest) -> None:
    local = build_manifest(photographs, CONFIG, seed=0)
    assert manifest.hash == local.hash and manifest.images == local.images
    assert manifest.root == "faulty://bucket/photographs"
    assert manifest.notices == local.notices
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_batches_are_those_of_the_same_folder_here(photographs: Path, manifest: Manifest) -> None:
    local = build_manifest(photographs, CONFIG, seed=0)
    assert _same(_take(_train(manifest), 3), _take(_train(local), 3))
    assert _same(list(_evaluate(manifest)), list(_evaluate(local)))


def test_every_object_is_read_once_and_checked_once(folder: RemoteFolder, manifest: Manifest) -> None:
    reads = FaultyStore.reads.copy()
    assert set(reads.values()) == {1} and len(reads) == len(manifest.images)
    assert build_manifest(folder, CONFIG, seed=0) == manifest
    _take(_train(manifest), 5)
    assert FaultyStore.reads == reads


def test_without_a_cache_everything_is_fetched_when_it_is_due(folder: RemoteFolder, own_cache: Path) -> None:
    config = CONFIG.changed(cache_gib=0)
    manifest = build_manifest(folder, config, seed=0)
    assert _same(_take(_train(manifest, config), 3), _take(_train(manifest), 3))
    assert not list(own_cache.glob("*.tmp"))


def test_an_object_that_is_replaced_is_checked_again(folder: RemoteFolder, manifest: Manifest) -> None:
    path = manifest.images[0].path
    FaultyStore().pipe_file(f"{folder}/{path}", b"no image at all")
    again = build_manifest(folder, CONFIG, seed=0)
    assert [refused.path for refused in again.refused] == [path]
    assert FaultyStore.reads.total() == len(manifest.images) + 1


def test_the_next_batches_are_fetched_while_one_is_waited_for(manifest: Manifest, own_cache: Path) -> None:
    for entry in own_cache.iterdir():
        entry.unlink()
    FaultyStore.reads.clear()
    loader = _train(manifest)
    next(loader)
    for future, _ in list(reader()._ahead.values()):
        future.result()
    planned = {image_id for plan in loader._planned for image_id in plan.image_ids.tolist()}
    assert len(loader._planned) > BATCHES_AHEAD
    read = {path.removeprefix("/bucket/photographs/") for path in FaultyStore.reads}
    assert {manifest.images[image_id].path for image_id in planned} <= read
    loader.close()
    assert not reader()._ahead


def _forget(own_cache: Path) -> None:
    for entry in own_cache.iterdir():
        entry.unlink()


def test_a_connection_that_comes_back_changes_nothing(manifest: Manifest, own_cache: Path) -> None:
    expected = _take(_train(manifest), 3)
    _forget(own_cache)
    for image in manifest.images:
        FaultyStore.faults[image.path] = deque([LOST, lambda content: content[: len(content) // 2]])
    assert _same(_take(_train(manifest), 3), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lost_connection_ends_the_training_with_the_url(manifest: Manifest, own_cache: Path, backend: str) -> None:
    _forget(own_cache)
    FaultyStore.always = LOST
    with pytest.raises(Outage, match=r"--data faulty://bucket/photographs/.*cannot be reached.*same command"):
        _take(_train(manifest, CONFIG.changed(backend=backend)), 1)
    with pytest.raises(Outage, match=r"--data faulty://bucket/photographs/"):
        list(_evaluate(manifest))


def test_a_lost_connection_ends_the_check_with_the_url(folder: RemoteFolder) -> None:
    store = FaultyStore()
    for path in store.find(str(folder)):
        FaultyStore.faults[path] = deque([LOST] * 100)
    with pytest.raises(Outage, match=r"--data faulty://bucket/photographs/.*cannot be reached"):
        build_manifest(folder, CONFIG, seed=0)


def test_an_object_that_goes_in_the_middle_of_a_run_is_replaced_and_named(manifest: Manifest, own_cache: Path) -> None:
    _forget(own_cache)
    shown = _take(_train(manifest), 1)[0].image_ids.tolist()
    _forget(own_cache)
    gone = manifest.images[shown[0]].path
    FaultyStore().rm_file(f"{manifest.root}/{gone}")
    loader = _train(manifest)
    batch = _take(loader, 1)[0]
    assert shown[0] not in batch.image_ids.tolist()
    assert [replacement.path for replacement in loader.replaced] == [f"{manifest.root}/{gone}"]
    assert "there is no such object any more" in loader.replaced[0].reason


def test_an_object_that_has_changed_is_refused_by_url(manifest: Manifest, own_cache: Path) -> None:
    _forget(own_cache)
    changed = manifest.images[int(manifest.ids("val")[0])].path
    other = next(image.path for image in manifest.images if image.path != changed)
    store = FaultyStore()
    store.pipe_file(f"{manifest.root}/{changed}", store.cat_file(f"{manifest.root}/{other}"))
    with pytest.raises(UserError, match=f"image {manifest.root}/{re.escape(changed)}.*another one than when"):
        list(_evaluate(manifest))


def test_a_listing_of_objects_is_a_listing_of_folders() -> None:
    listing = as_listing(["notes.txt", "cat/1.jpg", "cat/b/2.jpg", ".hidden/cat/1.jpg", "cat/.keep"])
    assert listing.folders == {"": ["notes.txt"], "cat": ["1.jpg", ".keep"], "cat/b": ["2.jpg"]}


def test_shards_are_refused_by_what_they_are(faulty: type[FaultyStore]) -> None:
    faulty().pipe_file("faulty://bucket/shards/train-000.tar", b"")
    with pytest.raises(UserError, match="it holds tar shards"):
        build_manifest(RemoteFolder("faulty://bucket/shards"), CONFIG, seed=0)
