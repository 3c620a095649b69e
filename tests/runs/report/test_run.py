"""The report: complete, self-contained, harmless whatever the names, and good from half a run on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from fpcn_dist.data.index.build import build_manifest
from fpcn_dist.data.index.manifest import Manifest
from fpcn_dist.data.index.notices import Notice
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.models import build_model
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.runs.evaluation import AREAS, AreaScore, ClassScore, Evaluation, evaluate
from fpcn_dist.runs.metrics import MetricsLogger
from fpcn_dist.runs.report.run import build_report
from fpcn_dist.runs.report.samples import SampleCollector, read_samples
from fpcn_dist.runtime.errors import UserError
from tests.helpers import browser

needs_browser = pytest.mark.skipif(browser.BINARY is None, reason=browser.MISSING)

SCRIPT = "<script>alert('1')<!--"
BAD_FILE = "<img src=x onerror=alert(1)> & {{ 7 * 7 }}.jpg"


@pytest.fixture(scope="module")
def finished_run(rocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made of real parts, after training and evaluation; shared, so copy it before changing it."""
    data = tmp_path_factory.mktemp("hostile") / "data"
    for name, hostile in (("basalt", SCRIPT), ("dolomite", 'dolomite & "co"'), ("marble", "marble")):
        shutil.copytree(rocks / name, data / hostile)
    (data / SCRIPT / BAD_FILE).write_bytes(b"")
    recipe = Recipe(
        name="rocks",
        model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16),
        data=DataConfig(resize=104, crop=96, images_per_class=4, val_fraction=0.5, eval_batch_size=8),
    )
    run = tmp_path_factory.mktemp("runs") / "rocks <1>"
    run.mkdir()
    manifest = build_manifest(data, recipe.data, seed=0)
    manifest.save(run / "manifest.json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    environment = {"command": "train.py --data '<b>'", "python": "3.11", "packages": {"torch": "2.14"}, "cuda": None}
    (run / "environment.json").write_text(json.dumps(environment))

    logger = MetricsLogger(run, 0)
    for step in range(1, 41):
        parts = {"class_loss": 1 / step, "center_loss": 0.1}
        logger.log_step(step, step / 4, {"loss": 1 / step + 0.05, **parts, "lr": 0.01, "accuracy": 1 - 1 / (step + 1)})
        if step % 10 == 0:
            logger.log_eval(step, step / 4, "val", {"loss": 0.5, "accuracy": step / 80})
    logger.log_replaced(7, "marble/<u>.jpg", "the file is empty")
    logger.close()

    torch.manual_seed(0)
    samples = SampleCollector(recipe.data, per_kind=3)
    device = torch.device("cpu")
    loader = EvalLoader.from_manifest(manifest, "val", recipe.data, rank=0, world_size=1, device=device)
    evaluate(
        build_model(recipe.model, 3, task="contrast"),
        loader,
        manifest.classes,
        num_images=len(manifest.ids("val")),
        checkpoint="best.safetensors",
        step=40,
        samples=samples,
    ).save(run)
    samples.write(run, manifest.classes, [image.path for image in manifest.images])
    return run


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._style = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run folder to change."""
    return Path(shutil.copytree(finished_run, tmp_path / finished_run.name))


def _page(run: Path) -> Page:
    path = build_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_notices_about_the_data_are_told(run: Path) -> None:
    assert "About the data" not in _page(run).text
    manifest = Manifest.load(run / "manifest.json")
    dataclasses.replace(manifest, notices=(Notice("runs/", "left out: <b>outputs</b>"),)).save(run / "manifest.json")
    text = _page(run).text
    assert "About the data" in text and "left out: <b>outputs</b>" in text


def test_everything_is_told(run: Path) -> None:
    page = _page(run)
    evaluation = Evaluation.load(run)
    assert evaluation is not None
    for heading in (
        "Training",
        "Loss",
        "Accuracy",
        "Learning rate",
        "Confusion",
        "Size of the region",
        "Classes",
        "Where it looked",
        "Data",
        "Files refused before training",
        "Files replaced during training",
        "Recipe",
        "Environment",
        "Command",
    ):
        assert f">{heading}</h" in page.html, heading
    assert f"{100 * evaluation.balanced_accuracy:.1f} %" in page.text
    assert f"{100 * evaluation.accuracy:.1f} %" in page.text and "36 val images, step 40" in page.text
    assert "50.0 %" in page.text and "step 40, epoch 10" in page.text  # the best validation
    assert "Figure 4" in page.text and all(area in page.text for area in AREAS)
    assert (run / "recipe.yaml").read_text().strip() in page.text
    assert "train.py --data '<b>'" in page.text and "packages.torch" in page.text
    assert page.tags.count("svg") == 3
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == len(read_samples(run)) > 3
    assert (run / "report.html").stat().st_size < 600_000


def test_names_cannot_break_out(run: Path) -> None:
    """Class, file and folder names, and the command, are text and nothing else."""
    page = _page(run)
    assert SCRIPT in page.text and BAD_FILE in page.text and "marble/<u>.jpg" in page.text
    assert "rocks <1>" in page.text
    assert not {"script", "link", "iframe", "object", "embed", "u", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = _page(run)
    for _, name, value in page.attributes:
        if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
            assert value.startswith(("data:image/jpeg;base64,", "#")), value[:80]
    assert "@import" not in page.html and not re.search(r"url\((?!#)", page.html)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_ids_are_unique_and_references_resolve(run: Path) -> None:
    page = _page(run)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page.html)) <= set(ids)


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        ("evaluation.json", "Confusion"),
        ("samples", "Where it looked"),
        ("metrics.jsonl", "Learning rate"),
        ("manifest.json", "Files refused"),
        ("environment.json", "Environment"),
        ("recipe.yaml", "Recipe"),
    ],
)
def test_half_a_run_gives_half_a_report(run: Path, missing: str, absent: str) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = _page(run).text
    assert absent not in text and "rocks <1>" in text
    assert ("has not been evaluated yet" in text) == (missing == "evaluation.json")


def test_a_recipe_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert "has not been evaluated yet" in _page(tmp_path).text


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        build_report(tmp_path)


def test_many_classes_give_the_worst_confusions_instead_of_a_huge_table(run: Path) -> None:
    count = 60
    names = [f"species {index}" for index in range(count)]
    matrix = [[10 * (i == j) for j in range(count)] for i in range(count)]
    matrix[7][3] = 9
    matrix[8][4] = 2
    Evaluation(
        "val",
        "",
        1,
        611,
        0.1,
        600 / 611,
        tuple(ClassScore(name, 1.0, 1.0, 1.0, 10) for name in names),
        tuple(map(tuple, matrix)),
        tuple(AreaScore(area, 0, None) for area in AREAS),
    ).save(run)
    page = _page(run)
    assert "most frequent confusions among 60 classes" in page.text and 'class="confusion"' not in page.html
    assert page.text.index("47.4 %") < page.text.index("16.7 %")


def test_long_runs_draw_few_points(tmp_path: Path) -> None:
    lines = (
        json.dumps({"kind": "step", "step": step, "epoch": step / 9, "time": step, "loss": step % 7, "lr": 1})
        for step in range(1, 20001)
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = _page(tmp_path)
    assert len(page.html) < 100_000 and "5 h 33 min" in page.text


@needs_browser
def test_a_browser_shows_it_on_phone_and_desktop(run: Path, tmp_path: Path) -> None:
    shown = browser.render(build_report(run), tmp_path / "browser")
    assert shown.console == [] and shown.requests == []
    for frame in (shown.phone, shown.desktop):
        assert frame.scroll_width <= frame.client_width, "the page scrolls sideways"
        assert frame.charts == 3 and min(frame.text_heights) >= 9
        assert len(frame.images) > 3 and set(frame.images) == {256}
        assert SCRIPT in frame.text and BAD_FILE in frame.text


@needs_browser
def test_long_hashes_and_paths_stay_in_their_cards(run: Path, tmp_path: Path) -> None:
    path = "/scratch/" + "a_folder_without_any_place_to_break_the_line" * 4
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"command": f"train.py --data {path}", "commit": "0123456789abcdef" * 4 + "+", "platform": path}
    (run / "environment.json").write_text(json.dumps(environment))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["root"] = path
    (run / "manifest.json").write_text(json.dumps(manifest))
    with open(run / "metrics.jsonl", "a") as metrics:
        line = {"kind": "replaced", "step": 9, "path": f"{path}.jpg", "reason": "is empty", "time": 0}
        metrics.write(json.dumps(line) + "\n")
    for shown in browser.overflow(build_report(run), tmp_path / "browser", [360, 800, 1200]):
        assert shown.scroll_width <= shown.client_width, "the page scrolls sideways"
        assert shown.outside == []


@needs_browser
def test_dark_mode_is_dark(run: Path, tmp_path: Path) -> None:
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    page = build_report(run)
    light, dark = (browser.render(page, tmp_path / str(mode), dark=mode).desktop for mode in (False, True))
    assert brightness(light.background) > 230 and brightness(dark.background) < 40


@needs_browser
def test_the_browser_would_notice(tmp_path: Path) -> None:
    """Requests, script errors and refusals by the page's own policy do reach the checks above."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><img src='http://127.0.0.1:9/x.png'><svg></svg><div style='width:4000px'>wide</div>"
        "<script>console.error('broken')</script>"
    )
    shown = browser.render(page, tmp_path / "open")
    assert any("127.0.0.1:9" in url for url in shown.requests)
    assert any("broken" in line for line in shown.console)
    assert shown.desktop.scroll_width > shown.desktop.client_width
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    page.write_text(f"<!doctype html>{policy}<img src='http://127.0.0.1:9/x.png'>")
    shown = browser.render(page, tmp_path / "closed")
    assert shown.requests == [] and any("Content Security Policy" in line for line in shown.console)
