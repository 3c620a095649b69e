"""What a terminal prints of tables into a file."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from fpcn_dist.runtime.terminal import Terminal


@pytest.mark.parametrize(("into_a_file", "folded"), [(True, False), (False, True)])
def test_paths_are_folded_on_a_screen_alone(into_a_file: bool, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    path, output = "/photographs/" + 100 * "x" + "/broken.jpg", io.StringIO()
    table = Table("image", "why it was refused")
    table.add_row(path, "the file is empty")
    Terminal(file=output, force_terminal=not into_a_file, color_system=None).print(table)
    assert (path not in output.getvalue()) == folded
    assert max(map(len, output.getvalue().splitlines())) < 200
