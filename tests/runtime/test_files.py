"""Files appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import replacing, write_tensors, write_text

FULL_DISK = Path("/dev/full")  # every write to it fails like one to a full disk


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_file_is_there_until_the_block_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    message = r"a\.txt: could not be written \(No space left on device\); free some space"
    with pytest.raises(UserError, match=message), replacing(tmp_path / "a.txt") as temporary:
        temporary.symlink_to(FULL_DISK)
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    for write in (lambda path: write_text(path, "x"), lambda path: write_tensors(path, {"x": torch.zeros(1)}, {})):
        with pytest.raises(UserError, match="could not be written"):
            write(tmp_path / "missing" / "file")


def test_tensors_come_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"x": torch.arange(5)}, {"format": "pt"})
    assert load_file(tmp_path / "t.safetensors")["x"].tolist() == [0, 1, 2, 3, 4]


def test_a_killed_writer_leaves_the_file_whole(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys; from pathlib import Path; from fpcn_dist.runtime.files import write_text",
            "for number in range(10**9): write_text(Path(sys.argv[1]), str(number % 10) * 200_000)",
        ]
    )
    path = tmp_path / "a.txt"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    finally:
        writer.kill()
        writer.wait()
    text = path.read_text()
    assert len(text) == 200_000 and len(set(text)) == 1
