"""Evaluation: against torchmetrics, on real ranks, and every image exactly once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fpcn_kernels import MaskedPool
from torch import Tensor, nn
from torchmetrics.functional import classification as oracle

from fpcn_dist.data.batch import Batch
from fpcn_dist.data.blob import Blob
from fpcn_dist.data.loader import EvalLoader
from fpcn_dist.models import build_model
from fpcn_dist.models.modes import evaluating
from fpcn_dist.recipe.schema import DataConfig, ModelConfig
from fpcn_dist.runs.evaluation import AREAS, Evaluation, evaluate
from fpcn_dist.runs.report.samples import SampleCollector, read_samples
from fpcn_dist.runtime.errors import UserError
from tests.helpers.forked import start_ranks

CLASSES = ("basalt", "dolomite", "marble")
DATA = DataConfig(resize=72, crop=64, eval_batch_size=4)


class Written(nn.Module):
    """Says what is written in the pixels: channel 0 holds the logits, channel 1 the mask (1 inside, 0.5 outside)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def pool(self, images_BCHW: Tensor) -> MaskedPool:
        mask_BHW = images_BCHW[:, 1].where(images_BCHW[:, 1] == 1, 0.5)
        return MaskedPool(images_BCHW[:, 0, 0] * self.scale, mask_BHW, mask_BHW.mean((1, 2)))

    def logits(self, pooled_BC: Tensor) -> Tensor:
        return pooled_BC


def _written_batches(logits_NK: Tensor, labels: Tensor, shares: Tensor, size: int) -> Iterator[Batch]:
    """Batches for :class:`Written`, whose maps have K x K cells; ``shares`` of these are inside the region."""
    count, width = logits_NK.shape
    images = torch.zeros(count, 3, width, width)
    images[:, 0, 0] = logits_NK
    cells = torch.arange(width * width).expand(count, -1)
    images[:, 1] = (cells < (shares * width * width).round().unsqueeze(1)).float().view(count, width, width)
    ids = torch.arange(count)
    for rows in ids.split(size):
        yield Batch(images[rows], labels[rows], rows, torch.zeros_like(rows), torch.zeros(len(rows), 3).long())


def _random_case(classes: int, count: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return logits, labels, torch.randint(0, classes * classes + 1, (count,), generator=generator) / classes**2


@pytest.mark.parametrize("classes", [2, 4, 12])
def test_numbers_agree_with_torchmetrics(classes: int) -> None:
    logits, labels, shares = _random_case(classes)
    names = [f"class {index}" for index in range(classes)]
    result = evaluate(Written(), _written_batches(logits, labels, shares, 7), names, num_images=101, step=3)

    options = {"task": "multiclass", "num_classes": classes}
    assert torch.equal(torch.tensor(result.confusion), oracle.confusion_matrix(logits, labels, **options))
    assert result.accuracy == pytest.approx(oracle.accuracy(logits, labels, average="micro", **options).item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    for field, metric in (("precision", oracle.precision), ("recall", oracle.recall), ("f1", oracle.f1_score)):
        expected = metric(logits, labels, average="none", **options).tolist()
        assert [getattr(score, field) or 0.0 for score in result.per_class] == pytest.approx(expected)
    assert [score.images for score in result.per_class] == labels.bincount(minlength=classes).tolist()
    assert (result.split, result.step, result.images, result.classes) == ("val", 3, 101, tuple(names))

    correct = logits.argmax(1) == labels
    for number, score in enumerate(result.area_quartiles):
        low, high = number / 4, (number + 1) / 4
        inside = (shares >= low) & ((shares < high) | (high == 1))
        assert score.area == AREAS[number] and score.images == inside.sum()
        assert score.accuracy == (pytest.approx(correct[inside].float().mean().item()) if inside.any() else None)


def test_what_is_undefined_is_none() -> None:
    logits = torch.tensor([[2.0, 0, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0]])
    labels = torch.tensor([0, 2, 0])
    result = evaluate(Written(), _written_batches(logits, labels, torch.ones(3), 2), "abcd", num_images=3)
    assert [score.precision for score in result.per_class] == [0.5, 0.0, None, None]
    assert [score.recall for score in result.per_class] == [0.5, None, 0.0, None]
    assert [score.f1 for score in result.per_class] == [0.5, 0.0, 0.0, None]
    assert [score.accuracy for score in result.area_quartiles] == [None, None, None, pytest.approx(1 / 3)]


@pytest.mark.parametrize("seen", [100, 102])
def test_a_wrong_number_of_images_is_an_error(seen: int) -> None:
    logits, labels, shares = _random_case(3, seen)
    with pytest.raises(RuntimeError, match=rf"'test' saw {seen} of 101 images \(rank 0: {seen}\)"):
        evaluate(Written(), _written_batches(logits, labels, shares, 9), "abc", num_images=101, split="test")


def test_no_images_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match="split test: has no images"):
        evaluate(Written(), [], "abc", num_images=0, split="test")


def test_modes_come_back_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_json_comes_back_equal(tmp_path: Path) -> None:
    logits, labels, shares = _random_case(4)
    result = evaluate(
        Written(), _written_batches(logits, labels, shares, 50), "abcd", num_images=101, checkpoint="best"
    )
    result.save(tmp_path)
    assert Evaluation.load(tmp_path) == result
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(values) == [
        "split",
        "checkpoint",
        "step",
        "images",
        "loss",
        "accuracy",
        "per_class",
        "confusion",
        "area_quartiles",
        "balanced_accuracy",
    ]
    assert list(values["per_class"][0]) == ["class", "precision", "recall", "f1", "images"]
    assert list(values["area_quartiles"][0]) == ["area", "images", "accuracy"]


def test_a_missing_evaluation_is_none_and_a_damaged_one_an_error(tmp_path: Path) -> None:
    assert Evaluation.load(tmp_path) is None
    for text in ("{", "[]", '{"split": "val"}', '{"per_class": [1]}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(UserError, match=r"evaluation\.json: .*; evaluate the run again"):
            Evaluation.load(tmp_path)


def _network(task: str = "contrast") -> nn.Module:
    torch.manual_seed(3)
    return build_model(ModelConfig(backbone="test_resnet", pretrained=False, hidden=16), 3, task=task)


def _photographs(root: Path, count: int) -> tuple[list[Blob], np.ndarray]:
    """``count`` of the rocks, class after class in turn, and their labels."""
    labels = np.arange(count) % 3
    paths = [root / CLASSES[label] / f"{number // 3:04d}.jpg" for number, label in enumerate(labels)]
    return Blob.of_files(paths), labels


def _evaluate_photographs(
    root: Path, count: int, *, group: dist.ProcessGroup | None = None, samples: SampleCollector | None = None
) -> Evaluation:
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    blobs, labels = _photographs(root, count)
    loader = EvalLoader(
        blobs, labels, np.arange(count), DATA, rank=rank, world_size=world_size, device=torch.device("cpu")
    )
    return evaluate(_network(), loader, CLASSES, num_images=count, group=group, samples=samples)


@pytest.mark.parametrize("task", ["contrast", "classify"])
def test_networks_image_by_image(rocks: Path, task: str) -> None:
    """Batches of the evaluation give what each image gives alone; a model in training is left as it was."""
    blobs, labels = _photographs(rocks, 10)
    loader = EvalLoader(blobs, labels, np.arange(10), DATA, rank=0, world_size=1, device=torch.device("cpu"))
    batches = list(loader)
    model = _network(task).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = evaluate(model, batches, CLASSES, num_images=10)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    confusion = np.zeros((3, 3), dtype=int)
    with torch.inference_mode():
        for batch in batches:
            for image, label in zip(batch.images, batch.labels, strict=True):
                confusion[label, model.eval()(image[None]).argmax()] += 1
    assert result.confusion == tuple(map(tuple, confusion.tolist()))
    if task == "classify":  # it has no region: everything counts as inside
        assert [score.images for score in result.area_quartiles] == [0, 0, 0, 10]


def _rank(rank: int, world_size: int, root: Path, count: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{output}/rendezvous", rank=rank, world_size=world_size)
    samples = SampleCollector(DATA, per_kind=2)
    result = _evaluate_photographs(root, count, group=dist.group.WORLD, samples=samples)
    samples.write(output, CLASSES, [str(number) for number in range(count)], group=dist.group.WORLD)
    (output / f"{rank}.json").write_text(result.to_json())
    if rank == 0:
        logits, labels, shares = _random_case(3, 5)
        batches = list(_written_batches(logits, labels, shares, 5))
    else:
        batches = []
    try:
        evaluate(Written(), batches, CLASSES, num_images=6, group=dist.group.WORLD)
    except RuntimeError as error:
        (output / f"{rank}.error").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "count"), [(2, 23), (3, 2)])
def test_ranks_agree_with_one_process(rocks: Path, tmp_path: Path, world_size: int, count: int) -> None:
    """Uneven shares, even none at all on a rank; the same result everywhere, the same samples, and an honest count."""
    alone = SampleCollector(DATA, per_kind=2)
    expected = _evaluate_photographs(rocks, count, samples=alone)
    (tmp_path / "alone").mkdir()
    alone.write(tmp_path / "alone", CLASSES, [str(number) for number in range(count)])

    start_ranks(_rank, world_size, rocks, count, tmp_path, ranks=world_size)
    results = [Evaluation.from_json((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(result == results[0] for result in results)
    assert results[0].confusion == expected.confusion and results[0].area_quartiles == expected.area_quartiles
    assert results[0].loss == pytest.approx(expected.loss, rel=1e-5)
    assert [sample.image for sample in read_samples(tmp_path)] == [
        sample.image for sample in read_samples(tmp_path / "alone")
    ]
    shares = ", ".join(f"rank {rank}: {5 if rank == 0 else 0}" for rank in range(world_size))
    for rank in range(world_size):
        assert (tmp_path / f"{rank}.error").read_text() == f"evaluation on 'val' saw 5 of 6 images ({shares})"
