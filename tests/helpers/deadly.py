"""A decoder that files can kill: what it does is what they say."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time


class Decoder:
    """Takes a file whose text is one of its verbs; anything else is a good image."""

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        verb, *rest = data.decode().split()
        if verb == "kill":
            os.kill(os.getpid(), getattr(signal, rest[0]))
        if verb == "killed_once" and not os.path.exists(rest[0]):
            os.close(os.open(rest[0], os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "read_null":
            ctypes.string_at(0)
        if verb == "exit":
            os._exit(int(rest[0]))
        if verb == "spin":
            while True:
                pass
        if verb == "sleep":
            time.sleep(3600)
        if verb == "raise":
            raise ValueError("of a parser")
        if verb == "swell":
            bytearray(1 << 40)
        if verb == "print":
            os.write(1, b"not an answer\n")
            print("a warning", file=sys.stderr, flush=True)
        return "it is bad" if verb == "bad" else None
