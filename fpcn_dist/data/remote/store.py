"""What is asked of an object store, through fsspec: the objects of a folder, and the bytes of one.

What a lost connection may explain is tried again, with pauses that grow; what then remains, and what trying again does
not mend, becomes a :class:`UserError` that names the URL. Credentials and endpoints are those that the store's own
package finds in the environment.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping
from time import sleep
from typing import Any, NamedTuple, TypeVar

from fpcn_dist.runtime.errors import Outage, UserError, nearest

T = TypeVar("T")

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds to wait after each failed attempt but the last."""
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "version_id", "updated", "LastModified")
_VERSIONS += ("last_modified", "mtime", "created")
"""What stores call what changes with an object, the most telling first."""
_REFUSALS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, getattr(errno, "EREMCHG", -1)}
"""Error numbers of requests that are wrong, and stay so."""
_OPTIONS = {protocol: {"max_concurrency": 1} for protocol in ("s3", "s3a")}
"""Options of file systems. s3fs would ask for the size of each object first, and fetch large ones in several parts."""
_OF_OUR_EXTRA = "s3fs"
"""The package that fpcn-dist[remote] brings."""


class Listed(NamedTuple):
    """An object as the listing of its folder shows it: its bytes, and what changes when it is replaced."""

    size: int
    version: str


def list_objects(url: str) -> dict[str, Listed]:
    """All objects below a folder, by their path relative to it, sorted.

    Raises:
        UserError: the package of the protocol is missing, there is no such folder, or it cannot be read.
    """
    system, path = _open(url)

    def found() -> Mapping[str, Mapping[str, Any]]:
        system.invalidate_cache()
        return system.find(path, detail=True)

    try:
        objects = _insisting(found, url)
    except FileNotFoundError:
        objects = {}
    prefix = path.rstrip("/") + "/"
    listed = {
        name.removeprefix(prefix): Listed(int(info.get("size") or 0), _version(info))
        for name, info in sorted(objects.items())
        if name.startswith(prefix) and not name.endswith("/")
    }
    if not listed:
        raise UserError("--data", url, "there is no such folder, or nothing in it", "check bucket and path")
    return listed


def reach(url: str) -> None:
    """See whether a folder can be listed.

    Raises:
        UserError: it cannot, or there is none.
    """
    system, path = _open(url)
    try:
        _insisting(lambda: system.ls(path, detail=False), url)
    except FileNotFoundError:
        raise UserError("--data", url, "there is no such folder", "check bucket and path") from None


def fetch(url: str, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of an object, or ``size`` of them from ``start`` on.

    Raises:
        FileNotFoundError: there is no such object.
        UserError: access is denied; or, as an :class:`Outage`, the connection was lost for longer than was waited for.
    """
    system, path = _open(url)
    end = None if size is None else start + size
    data = _insisting(lambda: system.cat_file(path, start=start or None, end=end), url)
    return data if isinstance(data, bytes) else bytes(data)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, as fsspec keeps one for each process, and the path in it."""
    import fsspec
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        known = known_implementations.get(protocol, {"class": error.name or protocol})
        package = known["class"].partition(".")[0]
        hint = f"pip install {'fpcn-dist[remote]'!r}" if package == _OF_OUR_EXTRA else f"pip install {package}"
        raise UserError("--data", url, f"{protocol}:// needs {package}, which is not installed", hint) from None
    except ValueError:
        reason = f"fsspec knows no protocol {protocol!r}"
        raise UserError("--data", url, reason, nearest(protocol, ["s3", "gs", "hf", "az", "http", "https"])) from None
    except Exception as error:
        raise _refusal(url, error) or _outage(url, error, 1) from error


def _insisting(ask: Callable[[], T], url: str) -> T:
    """What ``ask`` gives, in the first attempt that goes well.

    Raises:
        FileNotFoundError: there is no such thing.
        UserError: see :func:`fetch`.
    """
    for pause in (*_PAUSES, None):
        try:
            return ask()
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own kinds
            if (refusal := _refusal(url, error)) is not None:
                raise refusal from error
            if pause is None:
                raise _outage(url, error, len(_PAUSES) + 1) from error
            sleep(pause * random.uniform(0.5, 1.5))  # so that the ranks do not all come back at once
    raise AssertionError


def _refusal(url: str, error: Exception) -> UserError | None:
    """What to say of an error that trying again does not mend."""
    kind = type(error).__name__
    if "Credential" in kind or kind == "LocalTokenNotFoundError":
        hint = "provide credentials as the store's own tools expect them (docs/data.md)"
        return UserError("--data", url, f"there are no credentials for it ({_in_short(error)})", hint)
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        hint = "see that the credentials are right, have not expired, and may list and read there"
        return UserError("--data", url, f"access is denied ({_in_short(error)})", hint)
    if (isinstance(error, OSError) and error.errno in _REFUSALS) or "Validation" in kind:
        return UserError("--data", url, f"the store refuses to read it ({_in_short(error)})", "check the URL")
    return None


def _outage(url: str, error: Exception, attempts: int) -> Outage:
    reason = f"cannot be reached, {attempts} attempts failed ({_in_short(error)})"
    return Outage("--data", url, reason, "check the connection, then start the same command again")


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of any package carries, if it does."""
    response = getattr(error, "response", None)
    found = [str(getattr(error, name, "")) for name in ("status", "code")] + [str(getattr(response, "status_code", ""))]
    return next((int(status) for status in found if status.isdigit()), None)


def _in_short(error: Exception) -> str:
    """One line of an error of any package."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
