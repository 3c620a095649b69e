"""The kernels on the CPU, under Triton's interpreter, for tests and rehearsals."""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def interpret() -> None:
    """Have the kernels that are imported from now on run under Triton's interpreter, in child processes too."""
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        _read_scalars_as_numpy_has_them()


def _read_scalars_as_numpy_has_them() -> None:
    """Triton 3.6 takes int() of an array of one element, the bound of a loop, which NumPy refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend
