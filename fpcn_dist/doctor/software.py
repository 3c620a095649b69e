"""These checks compare Python and the installed packages with what setup.py asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fpcn_dist.doctor.findings import Finding, ok, problem, warning

_PROJECT = "fpcn-dist"
_SHOWN = ("torch", "torchvision", "triton")
_EXTRAS = {
    "deepspeed": (["deepspeed", "ninja"], "engine.name 'deepspeed'"),
    "ray": (["ray"], "distilling and searching on several GPUs"),
    "export": (["onnx", "onnxruntime", "onnxscript"], "export.py"),
    "reproduce": (["grad-cam"], "the heat maps of reproduce.py"),
}
"""The packages that each extra of setup.py brings, and who needs them."""


def versions() -> dict[str, str]:
    """Return the versions in which all ranks of a run must agree."""
    return {"Python": platform.python_version()} | {name: found for name in _SHOWN if (found := _version(name))}


def python() -> Iterator[Finding]:
    """Tell whether the project supports this interpreter."""
    found, allowed = platform.python_version(), metadata.metadata(_PROJECT)["Requires-Python"]
    if SpecifierSet(allowed).contains(found, prereleases=True):
        yield ok(found)
    else:
        yield problem(f"{found} is not {allowed}", "make a virtual environment with a Python in that range")


def packages() -> Iterator[Finding]:
    """Tell whether what every command needs is there, in the versions that setup.py names."""
    requirements = [Requirement(text) for text in metadata.requires(_PROJECT) or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    if faults := [fault for requirement in needed if (fault := _fault(requirement))]:
        yield problem(", ".join(faults), f"pip install {_PROJECT}, with the constraints.txt of the checkout")
    else:
        shown = ", ".join(f"{name} {_version(name)}" for name in _SHOWN if _version(name))
        yield ok(f"all {len(needed)} that are required, with {shown}")

    yield _dali()
    known = {r.name: r for r in requirements if r.marker and not r.marker.evaluate({"extra": ""})}
    for extra, (names, user) in _EXTRAS.items():
        faults = [fault for name in names if (fault := _fault(known.get(name) or Requirement(name)))]
        if faults:
            yield warning(f"{', '.join(faults)}: needed for {user} only", f"pip install '{_PROJECT}[{extra}]'")
        else:
            yield ok(", ".join(f"{name} {_version(name)}" for name in names))


def _dali() -> Finding:
    """Look for the wheel of DALI, whose name carries the CUDA version: it should be that of PyTorch."""
    import torch

    cuda = (torch.version.cuda or "13").split(".")[0]
    installed = {name: found for name in ("12", "13") if (found := _version(f"nvidia-dali-cuda{name}0"))}
    hint = f"pip install '{_PROJECT}[cuda{cuda}]'"
    if not installed:
        found = f"DALI is not installed, so that torchvision {_version('torchvision')} decodes all images, on the CPU"
        return warning(found, hint) if platform.system() == "Linux" else ok(found)
    if cuda not in installed:
        return warning(f"DALI is for CUDA {', '.join(installed)}, and PyTorch for CUDA {cuda}", hint)
    return ok(f"DALI {installed[cuda]} for CUDA {cuda}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fault(requirement: Requirement) -> str | None:
    """Say what is wrong with an installed package; return ``None`` if all is well."""
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} is not installed"
    fits = requirement.specifier.contains(found, prereleases=True)
    return None if fits else f"{requirement.name} {found} is not {requirement.specifier}"
