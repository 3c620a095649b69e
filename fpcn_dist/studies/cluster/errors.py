"""What an error says, in the one line that a table or a list of runs has room for."""

from __future__ import annotations


def last_line(error: BaseException | str) -> str:
    """The last line of an error's message, or the name of its type where the message is empty.

    The message of a traceback that Ray hands over ends with the error itself. A ``MemoryError`` or a failed ``assert``
    often has no message at all.

    Args:
        error: an exception, or the text of one.
    """
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
