"""Names that others gave, of files, folders and classes, made fit to be shown. Needs the standard library alone.

A name may be of any bytes but two: Python writes those that are not UTF-8 as lone surrogates, which no stream and no
file in UTF-8 takes. It may hold line breaks and orders to the terminal, and be as long as the file system allows.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable

ESCAPE = "fpcn_dist.escape"
"""How streams and files deal with characters that their encoding lacks: they are written as Python escapes them."""
_LONGEST = 100
"""Bytes of a file name that is made of another: with a digest, a suffix and what a temporary name adds, they stay far
below the 255 that file systems allow (143 where they are encrypted)."""
# Lone surrogates; C0 and C1 controls; separators of lines; and what turns the direction of all text behind it.
_UNFIT = re.compile("[\ud800-\udfff\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_RESERVED = re.compile(r'[/\\:*?"<>|]')


def printable(name: object) -> str:
    """The name on one line, as any stream in UTF-8 takes it: what is unfit is written as Python escapes it.

    A byte that is not UTF-8 is written as that byte (``caf\\xe9``), a line break as ``\\n``.
    """
    return _UNFIT.sub(lambda found: _escaped(found[0]), str(name))


def printable_lines(text: str) -> str:
    """Text of several lines, each as :func:`printable` gives it."""
    return "\n".join(map(printable, text.split("\n")))


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line, and in a cell of a table."""
    return re.sub(r"([\\`*\[\]<>&|~]|(?<!\w)_|_(?!\w))", r"\\\1", printable(" ".join(text.split())))


def is_utf8(name: object) -> bool:
    """Whether the name has no bytes that are not UTF-8, so that any library takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in str(name))


def file_stem(name: str) -> str:
    """A file name without suffix that any file system takes, made of another name; not unique."""
    stem = _RESERVED.sub("_", _UNFIT.sub("_", unicodedata.normalize("NFC", name)))
    return stem.encode()[:_LONGEST].decode(errors="ignore").strip(" .") or "_"


def first_few(names: Iterable[object], most: int = 10) -> str:
    """The first names, for a message of one line, and how many others there are."""
    names = [printable(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python writes a byte
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escaped, error.object[error.start : error.end])), error.end


codecs.register_error(ESCAPE, _escape)
