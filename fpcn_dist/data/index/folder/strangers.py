"""Folders inside the data that are no part of it: thumbnails of file managers, and what this project's commands wrote.

Who works inside the data folder has ``runs/`` and ``predictions/`` beside the class folders. They are told by the files
that they hold, so that a class may have any name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

_LITTER = {
    "@eadir": "thumbnails of a file server",
    "__macosx": "what macOS adds to archives",
    "thumbs": "thumbnails",
    "thumbnails": "thumbnails",
    "__pycache__": "compiled Python",
    "#recycle": "deleted files",
    "$recycle.bin": "deleted files",
    "#snapshot": "snapshots of a file server",
    "system volume information": "the file system's own",
    "lost+found": "the file system's own",
}
"""Folders that other programs make, by their names in lower case. Those that start with a dot are left out, too."""
OUTPUTS: dict[str, frozenset[str]] = {
    "a run": frozenset({"recipe.yaml", "manifest.json"}),
    "a model": frozenset({"config.json", "model.safetensors"}),
    "an exported model": frozenset({"model.onnx"}),
    "predictions": frozenset({"predictions.json", "predictions.csv"}),
    "a bank": frozenset({"bank.json", "written"}),
    "a search": frozenset({"search.json", "manifest.json"}),
    "a distillation": frozenset({"distillation.json", "manifest.json"}),
    "a reproduction": frozenset({"reproduction.json"}),
    "a study": frozenset({"study.json"}),
    "a probe": frozenset({"probe.json"}),
    "an output that is being written": frozenset({".lock"}),
}
"""What the outputs of commands are called, and the files that tell each of them."""
_TOLD_BY_FILES = {**OUTPUTS, "a Python environment": frozenset({"pyvenv.cfg"})}
_DEFAULTS = ("runs", "predictions")
"""Folders that commands write to where no --output is given."""


def find_strangers(folders: Mapping[str, Collection[str]], is_image: Callable[[str], bool]) -> dict[str, str]:
    """Folders that are no part of the data, with what they are; not those inside another such folder.

    Args:
        folders: the names of the files of each folder, by its path relative to the data folder, which itself is "".
        is_image: whether a file is an image, by its name.
    """
    own, images = _find_outputs(folders, is_image), dict.fromkeys(folders, 0)
    for folder, names in folders.items():
        count = 0 if is_inside(folder, own) else sum(map(is_image, names))
        for above in ancestors(folder) if count else ():
            images[above] = images.get(above, 0) + count
    # A folder that holds outputs, and no images but theirs, is one for outputs.
    for folder in list(own):
        for above in ancestors(folder)[1:]:
            named = _name(above) in _DEFAULTS and not any(map(is_image, folders[above]))
            if named or not images[above]:
                own[above] = "outputs of this project's commands"
    for folder in folders:
        if _name(folder) in _DEFAULTS and not images[folder]:
            own.setdefault(folder, "outputs of this project's commands")
        if folder and (what := _LITTER.get(_name(folder).lower())):
            own[folder] = what
    return {folder: what for folder, what in own.items() if not is_inside(folder.rpartition("/")[0], own)}


def is_inside(path: str, folders: Collection[str]) -> bool:
    """Whether a path is one of ``folders`` or lies below one of them."""
    return any(above in folders for above in ancestors(path))


def _find_outputs(folders: Mapping[str, Collection[str]], is_image: Callable[[str], bool]) -> dict[str, str]:
    """Folders that one command wrote, with what they are. Commands write images into folders of their own only."""
    own = {}
    for folder, names in folders.items():
        held = frozenset(names)
        what = next((what for what, files in _TOLD_BY_FILES.items() if files <= held), None)
        if what and folder and not any(map(is_image, held)):
            own[folder] = what
        elif what == "predictions":  # written to the data folder itself, or among the images of a class
            own[f"{folder}/overlays" if folder else "overlays"] = what
    return {folder: what for folder, what in own.items() if folder in folders}


def ancestors(path: str) -> list[str]:
    """The path itself, and all above it but the data folder."""
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _name(path: str) -> str:
    return path.rpartition("/")[2]
