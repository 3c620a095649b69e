"""Names of any bytes are shown on one line, in any encoding, and make file names that any file system takes."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import write_text
from fpcn_dist.runtime.names import ESCAPE, file_stem, first_few, is_utf8, markdown, printable, printable_lines
from fpcn_dist.runtime.output import quiet_without_reader
from fpcn_dist.runtime.terminal import Terminal
from tests.helpers.names import NAMES


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x1b[31mred\x9b0m\x7f", "\\x1b[31mred\\x9b0m\\x7f"),
        ("\u202egpj.exe\u2028", "\\u202egpj.exe\\u2028"),
        ("\ud800", "\\ud800"),
        ("Marmor, ä, 大理石, 🪨, [/], <b>, \\n", "Marmor, ä, 大理石, 🪨, [/], <b>, \\n"),
    ],
)
def test_what_is_unfit_is_written_as_python_escapes_it(name: str, shown: str) -> None:
    assert printable(name) == shown and printable_lines(f"{name}\n") == printable_lines(name) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_one_line_of_utf_8(name: str) -> None:
    shown = printable(name)
    assert shown.encode().decode() == shown and len(shown.splitlines()) == 1
    assert "\n" not in markdown(name) and "<script" not in markdown(name).replace("\\<", "")
    assert (
        "error" in str(UserError("error", name, name, name))
        and len(str(UserError("e", name, "", "")).splitlines()) == 1
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_made_of_a_name_can_be_written_and_is_short(name: str, tmp_path: Path) -> None:
    stem = file_stem(name)
    assert stem.isprintable() and len(stem.encode()) <= 100 and "/" not in stem and stem not in ("", ".", "..")
    write_text(tmp_path / f"{stem}-0123456789ab.json", name)
    assert file_stem(stem) == stem


def test_other_names_stay_as_they_are() -> None:
    assert [file_stem(name) for name in ("good [1]", "ä 🪨", "a.b")] == ["good [1]", "ä 🪨", "a.b"]
    assert [file_stem(name) for name in ("", "..", "a/b", "a\n", " x. ")] == ["_", "_", "a_b", "a_", "x"]
    assert file_stem("a\u0301") == file_stem("á"), "composed and decomposed are one name to some file systems"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_streams_of_any_encoding_take_any_name(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table(*NAMES[:2], title=NAMES[0])
    with quiet_without_reader():
        for name in NAMES:
            print(printable(name))
            print(name)
            Terminal(width=1000).print(f"{name}: [b]{name}[/b] [/]")
            table.add_row(name, name)
        Terminal(width=1000).print(table)
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "[unknown]: [b][unknown][/b] [/]" in text and ":smile:" in text
    assert "caf\\xe9" in text or encoding == "latin-1"


def test_files_take_any_name_and_commas_stay_in_their_cell(tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerow(NAMES)
    write_text(tmp_path / "names.csv", text.getvalue())
    with open(tmp_path / "names.csv", encoding="utf-8", newline="") as file:
        (row,) = csv.reader(file)
    assert row == [name.encode("utf-8", ESCAPE).decode() for name in NAMES]


def test_lists_of_names_stay_short() -> None:
    assert first_few(["a", "b\n"]) == "a, b\\n" and first_few(range(9), 2) == "0, 1 and 7 more"


def test_what_is_utf_8() -> None:
    assert is_utf8(Path("ä/🪨\n")) and not is_utf8(Path(os.fsdecode(b"a/caf\xe9/b")))
