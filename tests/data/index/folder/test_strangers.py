"""What the project's own commands and other programs leave inside a data folder is told from classes."""

from __future__ import annotations

import pytest

from fpcn_dist.data.index.folder.folders import is_image
from fpcn_dist.data.index.folder.strangers import OUTPUTS, find_strangers, is_inside
from tests.helpers.listings import listing

OWN = "outputs of this project's commands"
RUN = ["recipe.yaml", "manifest.json"]
PREDICTIONS = ["predictions.json", "predictions.csv"]


def strangers(folders: dict) -> dict[str, str]:
    return find_strangers(listing({"marble": 3, **folders}).folders, is_image)


def test_the_files_that_tell_outputs_are_those_that_commands_write(tmp_path) -> None:
    # Imported here, because other tests of this file need none of them.
    from fpcn_dist.runs.folder import RunFolder
    from fpcn_dist.runs.model_folder import CONFIG, WEIGHTS
    from fpcn_dist.runs.probe import PROBE_FILE
    from fpcn_dist.runtime.lock import LOCK_FILE
    from fpcn_dist.studies.crossval.study import STUDY_FILE
    from fpcn_dist.studies.distill.results import DISTILLATION_FILE
    from fpcn_dist.studies.reproduce.reproduction import REPRODUCTION_FILE
    from fpcn_dist.training.view_bank import META, WRITTEN

    run = RunFolder(tmp_path)
    known = set(OUTPUTS.values())
    for names in (
        {run.recipe.name, run.manifest.name},
        {CONFIG, WEIGHTS},
        {PROBE_FILE},
        {LOCK_FILE},
        {META, WRITTEN},
        {DISTILLATION_FILE, "manifest.json"},
        {REPRODUCTION_FILE},
        {STUDY_FILE},
    ):
        assert names in known


@pytest.mark.parametrize("what", OUTPUTS)
def test_outputs_are_told_by_their_files(what: str) -> None:
    assert strangers({"mine": [*OUTPUTS[what], "other.txt"], "mine/deep/er": 4}) == {"mine": what}
    assert strangers({"marble/mine": [*OUTPUTS[what]], "marble/mine/samples": 4}) == {"marble/mine": what}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"runs/x": RUN, "runs/x/samples": 4, "runs/y": []}, {"runs": OWN}),
        ({"all/group/x": RUN, "all/group/x/samples": 4, "all/notes": ["a.txt"]}, {"all": OWN}),
        ({"runs/x": RUN, "runs/figures": 2}, {"runs": OWN}),
        ({"runs/x": []}, {"runs": OWN}),
        ({"predictions": [], "predictions/overlays": []}, {"predictions": OWN}),
        ({"predictions": PREDICTIONS, "predictions/overlays": 9}, {"predictions": "predictions"}),
        ({"": PREDICTIONS, "overlays": 9}, {"overlays": "predictions"}),
        ({"marble": ["1.jpg", *PREDICTIONS], "marble/overlays": 9}, {"marble/overlays": "predictions"}),
        ({"marble/runs/x": RUN, "marble/runs/x/samples": 2}, {"marble/runs": OWN}),
        ({"venv": ["pyvenv.cfg"], "venv/lib/icons": 5}, {"venv": "a Python environment"}),
    ],
)
def test_folders_for_outputs(folders: dict, expected: dict[str, str]) -> None:
    assert strangers(folders) == expected


@pytest.mark.parametrize(
    "folders",
    [
        {"runs": 4},
        {"predictions": 4},
        {"runs/day": 4},
        {"x": ["1.jpg", *RUN]},
        {"x": ["manifest.json"], "x/day": 4},
        {"overlays": 4},
        {"mixed/day": 4},
    ],
)
def test_classes_that_look_like_outputs(folders: dict) -> None:
    assert strangers(folders) == {}


def test_a_class_with_an_output_in_it_stays_one() -> None:
    assert strangers({"x/day": 4, "x/first": RUN, "x/first/samples": 2}) == {"x/first": "a run"}


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "Thumbs", "thumbnails", "__pycache__", "lost+found"])
def test_folders_of_other_programs(name: str) -> None:
    assert set(strangers({name: 3, f"{name}/inner": 2, f"marble/{name}": 1})) == {name, f"marble/{name}"}


def test_inside() -> None:
    assert is_inside("a/b/c", {"a/b"}) and is_inside("a/b", {"a/b"})
    assert not is_inside("a/bc", {"a/b"}) and not is_inside("a", {"a/b"}) and not is_inside("", {"a"})
