"""Objects are fetched once, ahead of their use, again where a connection is lost, and never taken for what they are
not."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fpcn_dist.data.blob import Blob, Stored
from fpcn_dist.data.remote.cache import Cache
from fpcn_dist.data.remote.reading import Piece, Reader, bound_cache, reader
from fpcn_dist.data.remote.store import fetch, list_objects, reach
from fpcn_dist.runtime.errors import Outage, UserError
from tests.helpers.objects import FaultyStore

LOST = ConnectionResetError(104, "Connection reset by peer")
IMAGE = b"image" * 100
URL = "faulty://bucket/photos"


class NoCredentialsError(Exception):
    """As botocore calls it."""


def _put(name: str, content: bytes = IMAGE) -> str:
    FaultyStore().pipe_file(f"{URL}/{name}", content)
    return f"{URL}/{name}"


def _piece(name: str, content: bytes = IMAGE) -> Piece:
    return Piece(_put(name, content), digest=hashlib.sha256(content).hexdigest())


@pytest.fixture
def source(faulty: type[FaultyStore], own_cache: Path) -> Reader:
    return Reader(Cache(own_cache, 2**20))


@pytest.mark.usefixtures("faulty")
def test_a_lost_connection_is_tried_again(pauses: list[float]) -> None:
    url = _put("a.jpg")
    FaultyStore.faults["a.jpg"] = deque([LOST, TimeoutError(), OSError(16, "Please reduce your request rate.")])
    assert fetch(url) == IMAGE
    assert FaultyStore.reads["/bucket/photos/a.jpg"] == 4
    assert len(pauses) == 3 and 0 < pauses[0] < pauses[2]


@pytest.mark.usefixtures("faulty")
def test_a_connection_that_stays_lost_is_reported_by_url(pauses: list[float]) -> None:
    url = _put("a.jpg")
    FaultyStore.always = LOST
    with pytest.raises(Outage) as caught:
        fetch(url)
    said = str(caught.value)
    assert url in said and "6 attempts" in said and "Connection reset by peer" in said and "same command" in said
    assert len(pauses) == 5
    with pytest.raises(Outage, match=URL):
        list_objects(URL)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Access Denied"), "access is denied (Access Denied)"),
        (NoCredentialsError("Unable to locate credentials"), "no credentials for it (Unable to locate credentials)"),
        (OSError(22, "The specified bucket is not valid."), "the store refuses to read it"),
    ],
)
def test_what_trying_again_does_not_mend_is_said_at_once(error: Exception, words: str, pauses: list[float]) -> None:
    url = _put("a.jpg")
    FaultyStore.always = error
    for ask in (lambda: fetch(url), lambda: list_objects(URL)):
        with pytest.raises(UserError) as caught:
            ask()
        assert words in str(caught.value) and URL in str(caught.value) and "\n" not in str(caught.value)
    assert not pauses


@pytest.mark.usefixtures("faulty")
def test_a_folder_is_listed_with_paths_relative_to_it() -> None:
    _put("cat/1.jpg"), _put("cat/b/2.jpg", b"xy"), _put("dog/1.jpg")
    FaultyStore().pipe_file("faulty://bucket/photos-of-others/cat/1.jpg", b"")
    listed = list_objects(URL)
    assert list(listed) == ["cat/1.jpg", "cat/b/2.jpg", "dog/1.jpg"]
    assert listed["cat/b/2.jpg"].size == 2 and listed["cat/b/2.jpg"].version
    reach(URL)


@pytest.mark.usefixtures("faulty")
def test_there_is_no_such_folder() -> None:
    for ask in (lambda: list_objects(URL), lambda: reach(URL)):
        with pytest.raises(UserError, match=f"--data {URL}: there is no such folder"):
            ask()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sftp://host/photos", r"sftp:// needs .*, which is not installed; pip install .*"),
        ("s4://bucket/photos", r"fsspec knows no protocol 's4'; did you mean 's3'"),
    ],
)
def test_a_protocol_that_cannot_be_read_names_what_is_needed(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list_objects(url)


def test_an_object_is_fetched_once(source: Reader) -> None:
    piece = _piece("a.jpg")
    assert source.read(piece) == source.read(piece) == IMAGE
    assert FaultyStore.reads["/bucket/photos/a.jpg"] == 1


def test_a_part_of_an_object_is_an_entry_of_its_own(source: Reader) -> None:
    url = _put("a.tar", bytes(range(100)))
    assert source.read(Piece(url, 10, 5)) == bytes(range(10, 15))
    assert source.read(Piece(url, 0, 5)) == bytes(range(5))
    assert source.read(Piece(url)) == bytes(range(100))


def test_an_object_that_is_listed_in_another_version_is_fetched_again(source: Reader) -> None:
    url = _put("a.jpg", b"old")
    assert source.read(Piece(url, version="1")) == b"old"
    _put("a.jpg", b"new")
    assert source.read(Piece(url, version="1")) == b"old"
    assert source.read(Piece(url, version="2")) == b"new"


def test_what_was_damaged_on_its_way_is_fetched_again(source: Reader) -> None:
    piece = _piece("a.jpg")
    FaultyStore.faults["a.jpg"] = deque([lambda content: content[:100]])
    assert source.read(piece) == IMAGE


def test_an_object_that_has_changed_since_it_was_checked_is_refused(source: Reader) -> None:
    piece = _piece("a.jpg")
    _put("a.jpg", b"another image")
    with pytest.raises(OSError, match="another one than when it was checked") as caught:
        source.read(piece)
    assert caught.value.filename == piece.url


def test_what_is_in_the_cache_is_read_though_the_object_is_gone(source: Reader) -> None:
    piece = _piece("a.jpg")
    source.read(piece)
    FaultyStore.store.clear()
    assert source.read(piece) == IMAGE
    with pytest.raises(FileNotFoundError, match="no such object any more"):
        source.read(piece._replace(url=f"{URL}/b.jpg"))


def test_a_damaged_entry_of_the_cache_is_fetched_again(source: Reader) -> None:
    piece = _piece("a.jpg")
    source.read(piece)
    source.cache.path(piece.key).write_bytes(b"")
    assert source.read(piece) == IMAGE
    assert FaultyStore.reads["/bucket/photos/a.jpg"] == 2


def _held(source: Reader) -> int:
    return len(source._ahead)


@pytest.mark.parametrize("limit", [2**20, 0], ids=["cache", "no cache"])
def test_what_is_asked_for_ahead_is_there_when_it_is_read(source: Reader, limit: int) -> None:
    source.cache.limit, source.cache.writable = limit, limit > 0
    pieces = [_piece(f"{i}.jpg", b"%d" % i) for i in range(8)]
    begun = source.ahead([*pieces, pieces[0]])
    assert len(begun) == 9
    for future, _ in list(source._ahead.values()):
        future.result()
    FaultyStore.always = LOST  # from now on nothing can be fetched
    assert [source.read(piece) for piece in pieces] == [b"%d" % i for i in range(8)]
    source.release(begun[:8])
    assert source.read(pieces[0]) == b"0" and _held(source) == 1
    source.release(begun[8:])
    assert _held(source) == 0


def test_what_is_asked_for_ahead_is_pinned_until_it_is_released(source: Reader) -> None:
    source.cache.limit = 5 * (100 + 48)
    pieces = [_piece(f"{i}.jpg", bytes([i]) * 100) for i in range(10)]
    begun = source.ahead(pieces[:5])
    for future, _ in list(source._ahead.values()):
        future.result()
    for piece in pieces[5:]:
        source.read(piece)
    assert all(source.cache.path(piece.key).exists() for piece in pieces[:5])
    open_files = len(os.listdir("/proc/self/fd"))
    source.release(begun)
    assert len(os.listdir("/proc/self/fd")) == open_files - 5
    source.read(pieces[5])
    assert source.cache.path(pieces[5].key).exists()


def test_what_fails_ahead_of_time_is_tried_again_when_it_is_read(source: Reader) -> None:
    piece = _piece("a.jpg")
    FaultyStore.always = LOST
    begun = source.ahead([piece])
    assert source._ahead[piece][0].exception() is not None
    FaultyStore.always = None
    assert source.read(piece) == IMAGE
    source.release(begun)


def test_what_another_loader_gives_up_while_it_is_waited_for_is_fetched(source: Reader) -> None:
    piece = _piece("a.jpg")
    begun = source.ahead([piece])
    given_up: Future[Any] = Future()
    given_up.cancel()
    source._ahead[piece] = given_up, 1
    assert source.read(piece) == IMAGE
    source.release(begun)


def test_a_cache_that_is_full_of_pins_lets_everything_be_read(source: Reader) -> None:
    source.cache.limit = 300
    pieces = [_piece(f"{i}.jpg", bytes([i]) * 100) for i in range(10)]
    begun = source.ahead(pieces)
    assert [source.read(piece) for piece in pieces] == [bytes([i]) * 100 for i in range(10)]
    assert FaultyStore.reads.total() == 10
    source.release(begun)


@pytest.mark.parametrize("limit", [2**20, 0], ids=["cache", "no cache"])
def test_a_copy_is_a_file_of_this_machine(source: Reader, limit: int) -> None:
    source.cache.limit, source.cache.writable = limit, limit > 0
    copy = source.copy(_piece("a.jpg"))
    assert Path(copy.path).read_bytes()[: copy.size] == IMAGE
    copy.close()
    assert Path(copy.path).exists() == (limit > 0)


def test_many_threads_read_the_same(source: Reader) -> None:
    pieces = [_piece(f"{i}.jpg", bytes([i]) * 1000) for i in range(20)]
    source.cache.limit = 5000
    wrong: list[Piece] = []

    def read_all() -> None:
        for piece, i in zip(pieces, range(20), strict=True):
            if source.read(piece) != bytes([i]) * 1000:
                wrong.append(piece)

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_blob_reads_a_url_through_the_cache_that_the_recipe_bounds(
    faulty: type[FaultyStore], own_cache: Path
) -> None:
    url = _put("a.jpg")
    blob = Blob(url, stored=Stored(len(IMAGE), digest=hashlib.sha256(IMAGE).hexdigest()))
    bound_cache(0)
    assert blob.read() == IMAGE and not own_cache.exists()
    bound_cache(1)
    assert blob.read() == IMAGE and reader().cache.limit == 2**30 and len(list(own_cache.iterdir())) == 2
    assert str(blob) == blob.key == url
