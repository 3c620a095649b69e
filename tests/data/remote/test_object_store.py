"""Training, evaluation and doctor on ``s3://``, from a server that this process starts and makes fail."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.remote.store import fetch, list_objects
from fpcn_dist.data.synthetic import generate
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.address import RemoteFolder
from fpcn_dist.runtime.errors import Outage, UserError
from tests.helpers import s3
from tests.helpers.s3 import BUCKET, Server

CONFIG = DataConfig(backend="torchvision", resize=40, crop=32, images_per_class=2, val_fraction=0.25, threads=1)
IMAGE = b"image" * 1000
URL = f"s3://{BUCKET}/a.jpg"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    generate(folder, images_per_class=8, seed=3, min_side=40, max_side=48)
    return folder


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server().serving() as server:
        yield server


@pytest.fixture
def server(running: Server, own_cache: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with an empty bucket; a client that does not try again by itself."""
    system = running.reset()
    monkeypatch.setattr(type(system), "retries", 1)
    return running


def _put(content: bytes = IMAGE) -> None:
    fsspec.url_to_fs(URL)[0].pipe_file(URL, content)


@pytest.mark.parametrize("fault", [s3.reset, s3.busy, s3.cut, s3.slow], ids=lambda fault: fault.__name__)
def test_what_a_network_does_is_tried_again(server: Server, fault: s3.Fault) -> None:
    _put()
    server.faults["a.jpg"] = deque([fault])
    assert fetch(URL) == IMAGE
    assert server.gets[f"/{BUCKET}/a.jpg"] == 2


@pytest.mark.parametrize("fault", [s3.reset, s3.busy, s3.cut], ids=lambda fault: fault.__name__)
def test_what_a_network_keeps_doing_is_reported_by_url(server: Server, fault: s3.Fault) -> None:
    _put()
    server.always = fault
    with pytest.raises(Outage, match=rf"--data {URL}: cannot be reached, 6 attempts failed \(.+\); check the conn"):
        fetch(URL)
    if fault is not s3.cut:
        with pytest.raises(Outage, match=f"--data s3://{BUCKET}: cannot be reached"):
            list_objects(f"s3://{BUCKET}")


def test_denied_access_is_said_at_once(server: Server, pauses: list[float]) -> None:
    _put()
    server.always = s3.denied
    for ask, url in ((lambda: fetch(URL), URL), (lambda: list_objects(f"s3://{BUCKET}"), f"s3://{BUCKET}")):
        with pytest.raises(
            UserError, match=rf"--data {url}: access is denied \(.+\); see that the credentials"
        ) as caught:
            ask()
        assert not isinstance(caught.value, Outage)
    assert not pauses


def test_there_is_no_such_bucket_or_folder(server: Server) -> None:
    for url in ("s3://no-such-bucket/photos", f"s3://{BUCKET}/photos"):
        with pytest.raises(UserError, match=f"--data {url}: there is no such folder"):
            list_objects(url)
    with pytest.raises(FileNotFoundError):
        fetch(URL)


def test_missing_credentials_are_said_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pauses: list[float]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    options = {name: value for name, value in fsspec.config.conf["s3"].items() if name not in ("key", "secret")}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    with pytest.raises(UserError, match="there are no credentials for it"):
        list_objects(f"s3://{BUCKET}")
    assert not pauses


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, name, None)
    for protocol in ("s3", "gs"):
        monkeypatch.delitem(_registry, protocol, raising=False)
    for protocol, package, wanted in (("s3", "s3fs", r"'fpcn-dist\[remote\]'"), ("gs", "gcsfs", "gcsfs")):
        words = rf"{protocol}:// needs {package}, which is not installed; pip install {wanted}"
        with pytest.raises(UserError, match=words):
            list_objects(f"{protocol}://bucket/photos")


def test_an_object_is_known_by_its_etag(server: Server) -> None:
    _put()
    before = list_objects(f"s3://{BUCKET}")["a.jpg"]
    assert before == list_objects(f"s3://{BUCKET}")["a.jpg"] and before.size == len(IMAGE)
    _put(bytes(len(IMAGE)))
    assert list_objects(f"s3://{BUCKET}")["a.jpg"].version != before.version


def test_the_manifest_is_that_of_the_same_folder_here(server: Server, photographs: Path) -> None:
    url = server.upload(photographs, "photographs")
    for file in photographs.rglob("*.jpg"):
        server.faults[f"{file.parent.name}/{file.name}"] = deque([s3.reset, s3.busy, s3.cut])
    manifest = build_manifest(RemoteFolder(url), CONFIG, seed=0)
    assert manifest.images == build_manifest(photographs, CONFIG, seed=0).images
    assert build_manifest(RemoteFolder(url), CONFIG, seed=0) == manifest
    assert set(server.gets.values()) == {4}


_RECIPE = """
name: tiny
task: classify
data: {backend: torchvision, resize: 40, crop: 32, images_per_class: 2, val_fraction: 0.25, threads: 1}
model: {backbone: lenet, pretrained: false}
train: {epochs: 1}
"""


def _run(main: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(f"launch.{main}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [f"launch/{main}.py", *words])
    module.main()


@pytest.mark.slow
def test_train_evaluate_and_doctor_take_a_url(
    server: Server, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.upload(photographs, "photographs")
    (tmp_path / "tiny.yaml").write_text(_RECIPE)
    run = str(tmp_path / "run")
    words = ("--recipe", str(tmp_path / "tiny.yaml"), "--data", f"{url}/", "--output", run)
    _run("train", *words, monkeypatch=monkeypatch)
    assert set(server.gets.values()) == {1}  # all later readings come from the cache
    _run("evaluate", run, "--data", url, monkeypatch=monkeypatch)
    assert set(server.gets.values()) == {1}
    from fpcn_dist.doctor.computing import data, data_is_here

    assert "3 classes" in next(iter(data(RemoteFolder(url)))).found
    assert next(iter(data_is_here(RemoteFolder(url)))).status == "ok"
