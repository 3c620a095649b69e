"""The manifest: a hash that follows what matters, and files that are read back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import UserError

CONFIG = DataConfig(images_per_class=2, classes_per_batch=None)


def test_hash_ignores_place_and_time(folder: Path, tmp_path: Path) -> None:
    before = build_manifest(folder, CONFIG, seed=0)
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    for file in moved.rglob("*.jpg"):
        os.utime(file, (0, 0))
    after = build_manifest(moved, CONFIG, seed=0)
    assert after.hash == before.hash and after.root != before.root


def test_hash_follows_content_name_split_and_class(folder: Path) -> None:
    hashes = [build_manifest(folder, CONFIG, seed=0).hash, build_manifest(folder, CONFIG, seed=1).hash]
    (folder / "basalt" / "0003.jpg").rename(folder / "basalt" / "renamed.jpg")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    with open(folder / "basalt" / "renamed.jpg", "ab") as file:
        file.write(b"\0")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    (folder / "basalt" / "renamed.jpg").unlink()
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    (folder / "basalt").rename(folder / "andesite")
    hashes.append(build_manifest(folder, CONFIG, seed=0).hash)
    assert len(set(hashes)) == len(hashes)


def test_written_manifest_reads_back(folder: Path, tmp_path: Path) -> None:
    (folder / "marble" / "0000.jpg").write_bytes(b"")
    manifest = build_manifest(folder, CONFIG, seed=0)
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert Manifest.from_json(manifest.to_json()).hash == manifest.hash


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: text[:-20], lambda text: text.replace("val", "train")]
)
def test_damaged_manifest_is_refused(folder: Path, tmp_path: Path, damage) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(damage(build_manifest(folder, CONFIG, seed=0).to_json()))
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        Manifest.load(file)
