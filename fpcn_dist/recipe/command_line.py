"""Command lines of all entry scripts: recipes from YAML, overrides, and errors that a user can read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from fpcn_dist.recipe.reading import explain, load_recipe
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.runtime.address import Address, address
from fpcn_dist.runtime.collection import collect_seldom
from fpcn_dist.runtime.errors import Preempted, UserError
from fpcn_dist.runtime.launchers import told
from fpcn_dist.runtime.output import quiet_without_reader

Args = TypeVar("Args")
Overrides = Annotated[Recipe, tyro.conf.arg(name="")]
"""Type of a field of an argument dataclass that lets every recipe field be overridden by its dotted name."""
Data = Annotated[
    Address,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda words: address(words[0]),
        is_instance=lambda value: isinstance(value, Address),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""Type of ``--data``: a path, or the URL of a remote folder, whose slashes a path would fold."""

_LOST_RANK = re.compile(r"gloo|nccl|connection (was likely )?(closed|reset)|timed out|recvvalue|socket", re.IGNORECASE)

_AGAIN = "start the same command again: it resumes from the last checkpoint"


def _option(words: Sequence[str], name: str) -> str:
    """The value of one flag before all others can be parsed; empty where it is not given."""
    alone = dataclasses.make_dataclass("Option", [(name, str, "")])
    return getattr(tyro.cli(alone, args=words, return_unknown_args=True, add_help=False)[0], name)


def _switches_on(words: Sequence[str], switches: set[str]) -> list[str]:
    """Let a switch stand alone (``--profile``) as well as with its value (``--profile True``); tyro takes but one."""
    written = []
    for word, following in zip(words, [*words[1:], ""], strict=False):
        written.append(word)
        if word in switches and following not in ("True", "False"):
            written.append("True")
    return written


def parse(
    args_type: Callable[..., Args],
    argv: Sequence[str] | None = None,
    *,
    presets: tuple[str, str, Mapping[str, Path]] | None = None,
) -> Args:
    """Parse the command line into ``args_type``, a dataclass whose docstring describes the command.

    A field ``overrides: Overrides`` takes its defaults from the ``--recipe`` file, or that of the dataclass. The
    ``--local_rank`` that some launchers append is dropped: the environment says the same.

    Args:
        args_type: the dataclass.
        argv: the words; those of this process by default.
        presets: a flag, its default, and for each of its values the recipe file that it stands for, instead.

    Raises:
        UserError: the recipe file is missing or invalid, or a word makes it so.
        SystemExit: status 2, after a message that names the nearest flag, where the command line is wrong.
    """
    words = sys.argv[1:] if argv is None else argv
    words = [word for word in words if not re.match(r"--local[-_]rank=", word)]
    fields = dataclasses.fields(args_type)  # type: ignore[arg-type]
    words = _switches_on(words, {f"--{field.name.replace('_', '-')}" for field in fields if field.default is False})
    default: dict[str, Any] = {}
    if any(field.name == "overrides" for field in fields):
        if presets is None:
            own = next((f.default for f in fields if f.name == "recipe" and isinstance(f.default, Path)), None)
            path = Path(given) if (given := _option(words, "recipe")) else own
        else:
            flag, usual, recipes = presets
            path = recipes.get(_option(words, flag.removeprefix("--")) or usual)  # an unknown value is refused below
        required = {field.name: tyro.MISSING for field in fields if field.default is dataclasses.MISSING}
        recipe = load_recipe(path) if path else Recipe()
        default = {"default": args_type(**required | {"overrides": recipe})}
    try:
        return tyro.cli(args_type, args=words, config=(tyro.conf.FlagConversionOff,), **default)
    except ValidationError as error:  # of a section, tyro itself says so; not of the recipe as a whole
        raise explain(error, "command line") from None


def run(main: Callable[[], None]) -> None:
    """Call ``main`` as a command: a :class:`UserError` becomes one line on stderr and exit status 2, a lost rank 3.

    A rank that lost its peers leaves at once, without the clean shutdown that would wait for them. A command whose
    output nobody reads any more ends quietly.
    """
    collect_seldom()
    with quiet_without_reader(), _readable_exit():
        main()


@contextlib.contextmanager
def _readable_exit() -> Iterator[None]:
    rank = told("RANK", 0)
    prefix = f"rank {rank}: " if told("WORLD_SIZE", 1) > 1 else ""
    try:
        yield
    except UserError as error:
        _leave(f"{prefix}error: {error}", 2)
    except Preempted as reason:
        _leave(f"{reason}" if rank == 0 else "", reason.status)
    except KeyboardInterrupt:
        _leave(f"{prefix}interrupted", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        where = f" {error.filename}" if error.filename else ""
        _leave(
            f"{prefix}error: the disk{where} cannot be written to ({error.strerror}); free some space, then {_AGAIN}", 2
        )
    except RuntimeError as error:
        if not prefix or not _LOST_RANK.search(f"{type(error).__name__} {error}"):
            raise
        what = re.sub(r"\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]
        lost = f"lost contact with another rank, which has probably died ({what})"
        _leave(f"{prefix}error: {lost}; see that rank's own message, then {_AGAIN}", 3)


def _leave(message: str, status: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        if message:
            print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    _tell_torchrun(message)
    os._exit(status)


def _tell_torchrun(message: str) -> None:
    """Let torchrun end its own report with this message, where it would say that it knows of no cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and message:
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
