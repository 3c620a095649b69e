"""A reader that leaves early, as ``| head -1`` does: no command shows a traceback, and no training dies of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT, command, environment, losses

STATUS = 141
"""What a shell gives for a process that SIGPIPE has ended."""
BUFFERED = environment() | {"PYTHONUNBUFFERED": ""}
"""Most of the output is then written when a command ends."""


def ended_by_reader(argv: list[str], folder, lines: int = 0, timeout: float = 120) -> tuple[int, str]:
    """Exit status and standard error of a command whose reader leaves after some lines of its output."""
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=BUFFERED
    ) as process:
        assert process.stdout and process.stderr
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        shown = process.stderr.read()
        return process.wait(timeout), shown


@pytest.mark.parametrize("script", ["train", "predict", "predict photo.onnx", "doctor"])
def test_help_is_quiet_when_its_reader_has_left(script, tmp_path):
    name, *words = script.split()
    argv = [sys.executable, str(ROOT / f"launch/{name}.py"), *words, "--help"]
    assert ended_by_reader(argv, tmp_path) == (STATUS, "")


@pytest.mark.parametrize("printing", ["print(line)", "console.print(line)"], ids=["print", "rich"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_command_is_quiet_however_much_it_prints(printing, lines, tmp_path):
    program = (
        "from rich.console import Console\nfrom fpcn_dist.recipe import command_line\nconsole = Console()\n"
        f"def main():\n    input()\n    for line in ['a line'] * {lines}:\n        {printing}\n"
        "command_line.run(main)\n"
    )
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, stderr=-1, text=True, cwd=ROOT, env=BUFFERED) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write("the reader has left\n")
        process.stdin.close()
        shown = process.stderr.read()
    assert (process.returncode, shown) == (STATUS, "")


def test_a_pipe_other_than_the_output_is_no_reason_to_be_quiet(tmp_path):
    program = (
        "import os\nfrom fpcn_dist.recipe import command_line\n"
        "def main():\n    reader, writer = os.pipe()\n    os.close(reader)\n    os.write(writer, b'x')\n"
        "command_line.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=BUFFERED)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_a_training_goes_on_without_its_reader(runs, tmp_path):
    output = tmp_path / "run"
    argv = [*command("python"), *runs.train_argv(output, "--train.epochs", "2")]
    status, shown = ended_by_reader(argv, runs.folder, lines=1, timeout=300)
    assert status == 0 and "Traceback" not in shown
    assert len(losses(output)) == 6 and (output / "report.html").is_file()
