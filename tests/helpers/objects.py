"""An object store in this process, ``faulty://``, whose objects can be made to fail in the ways that networks do."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem

Fault = Exception | Callable[[bytes], bytes]
"""What is raised in the place of an answer, or what becomes of the bytes."""


class FaultyStore(MemoryFileSystem):
    """Objects in memory; all instances show the same.

    Attributes:
        faults: by the name of an object (the end of its path) what happens to the next readings of it.
        always: what happens to every reading and every listing; ``None``: nothing.
        reads: how often each object was read, by its path.
    """

    protocol = ("faulty",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[dict[str, deque[Fault]]] = {}
    always: ClassVar[Exception | None] = None
    reads: ClassVar[Counter[str]] = Counter()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("faulty://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        path = self._strip_protocol(path)
        with self._lock:
            self.reads[path] += 1
            waiting = next((faults for name, faults in self.faults.items() if path.endswith(name) and faults), None)
            fault = waiting.popleft() if waiting else self.always
        if isinstance(fault, Exception):
            raise fault
        content = super().cat_file(path, start=start, end=end)
        return fault(content) if fault else content

    def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
        if self.always is not None:
            raise self.always
        return super().find(path, maxdepth=maxdepth, withdirs=withdirs, **options)

    @classmethod
    def reset(cls) -> None:
        """Forget all objects and all faults."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.faults.clear()
        cls.reads.clear()
        cls.always = None

    @classmethod
    def upload(cls, folder: Path, name: str) -> str:
        """Put a folder there under a name; gives its URL."""
        store = cls()
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                store.pipe_file(f"faulty://{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"faulty://{name}"
