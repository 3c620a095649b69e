"""Names that people, archives and other systems give to files and classes, all legal on Linux."""

from __future__ import annotations

import os

NAMES = (
    "[unknown]",
    "[red]",
    os.fsdecode(b"caf\xe9"),
    os.fsdecode(b"\xff\xfe"),
    "é",
    "e\u0301",
    "two\nlines",
    "\x1b[31mred\x07",
    "comma, \"quote\" and 'quote'",
    "<script>alert(1)<!-- & {{ 7 * 7 }} {} %s",
    "🪨 :smile: \u202egpj",
    "=1+1",
    "`tick` *star* _under_ | pipe",
    "back\\slash",
    "a" * 246,
    "大" * 82,
)
