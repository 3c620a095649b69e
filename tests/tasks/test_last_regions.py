"""Views by the region of the last visit: boxes against brute force, and a training that goes on exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from fpcn_dist.data.augmentation import view_pixels
from fpcn_dist.data.batch import Batch
from fpcn_dist.data.views import crops, views
from fpcn_dist.recipe.schema import DataConfig
from fpcn_dist.runtime.errors import Preempted
from fpcn_dist.tasks import build_task
from fpcn_dist.tasks.last_regions import LastRegions
from fpcn_dist.training.loop import train
from fpcn_dist.training.meter import forward_flops
from tests.helpers.distilling import ALONE, recipe
from tests.helpers.forked import start_ranks
from tests.helpers.launching import losses
from tests.helpers.preempting import StopAfter


def _config(region: str = "crop", **augment) -> DataConfig:
    return DataConfig.model_validate({"resize": 80, "crop": 64, "augment": {"region": region, **augment}})


def _batch(images: Tensor, ids: list[int], view_ids: list[int], config: DataConfig) -> Batch:
    index, numbers = np.array(ids), np.array(view_ids)
    drawn = views(0, index, numbers, config)
    index, numbers = torch.from_numpy(index), torch.from_numpy(numbers)
    return Batch(images, index * 0, index, numbers, torch.from_numpy(crops(drawn)))


@pytest.mark.parametrize("augment", [{}, {"random_resized_crop": (0.6, 1.0)}], ids=["crop", "resized crop"])
def test_a_box_is_where_the_region_lies_in_the_image(augment: dict) -> None:
    """A white rectangle on black, seen through other views of an image whose frame it is: boxes agree with it."""
    config = _config(**augment)
    image = torch.zeros(80, 80, 3, dtype=torch.uint8)
    image[24:48, 20:52] = 255
    ids = list(range(8))
    shown = views(0, np.arange(8), np.zeros(8, dtype=np.int64), config)
    assert set(shown["flip"].tolist()) == {0, 1}
    masks = torch.stack([view_pixels(image, view, config)[..., 0] > 127 for view in shown]).float()
    regions = LastRegions(10, config, None)
    regions.note(_batch(torch.zeros(8, 3, 64, 64), ids, [0] * 8, config), masks)
    expected = torch.tensor([24, 20, 48, 52]) / 80
    assert (regions.boxes[:8] - expected).abs().max() < 1.5 / 64
    assert regions.boxes[8:].isnan().all()


def test_odd_views_are_not_noted_and_even_ones_stay_as_they_are() -> None:
    config, images = _config(), torch.randn(2, 3, 64, 64)
    regions, mask = LastRegions(2, config, None), torch.zeros(2, 4, 4)
    mask[:, 1:3, 1:3] = 1
    assert torch.equal(regions.shown(_batch(images, [0, 1], [1, 1], config)), images)  # nothing is known yet
    regions.note(_batch(images, [0, 1], [0, 1], config), mask)
    assert regions.boxes[0].isfinite().all() and regions.boxes[1].isnan().all()
    before = regions.boxes.clone()
    regions.note(_batch(images, [0, 1], [1, 3], config), mask * 0)
    assert torch.equal(regions.boxes.nan_to_num(-1), before.nan_to_num(-1))
    changed = regions.shown(_batch(images, [0, 1], [2, 1], config))
    assert torch.equal(changed, images)
    assert not torch.equal(regions.shown(_batch(images, [0, 1], [1, 1], config))[0], images[0])


def test_a_cropped_view_is_the_box_magnified() -> None:
    config = _config().changed(resize=64, flip=False)
    regions, images = LastRegions(1, config, None), torch.randn(1, 3, 64, 64)
    regions.boxes[0] = torch.tensor([16, 8, 48, 40]) / 64
    (found,) = regions.shown(_batch(images, [0], [1], config))
    expected = F.interpolate(images[:, :, 16:48, 8:40], size=(64, 64), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=1e-4, atol=1e-4)
    regions.boxes[0] = torch.tensor([0, 0, 2, 2]) / 64  # a speck is shown with its surroundings
    (found,) = regions.shown(_batch(images, [0], [1], config))
    expected = F.interpolate(images[:, :, :16, :16], size=(64, 64), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found[:, 2:-4, 2:-4], expected[:, 2:-4, 2:-4], rtol=1e-4, atol=1e-4)


def test_a_dropped_box_is_the_mean_colour_and_the_rest_stays() -> None:
    config = _config("drop").changed(resize=64)
    ids = [0, 1, 2, 3]
    images = torch.randn(4, 3, 64, 64)
    regions, batch = LastRegions(4, config, None), _batch(images, ids, [1] * 4, config)
    regions.boxes[:3] = torch.tensor([16, 8, 48, 40]) / 64
    regions.boxes[3] = torch.tensor([0, 0, 60, 60]) / 64  # nearly all: nothing would be left
    flipped = [0, 1, 0, 0]
    batch.crops[:, 2] = torch.tensor(flipped)
    found = regions.shown(batch)
    for image, before, flip in zip(found[:3], images, flipped, strict=False):
        left, right = (24, 56) if flip else (8, 40)
        expected = before.clone()
        expected[:, 16:48, left:right] = 0
        assert torch.equal(image, expected)
    assert torch.equal(found[3], images[3])


def test_the_flops_of_a_step_are_counted_without_a_trace() -> None:
    task = build_task(recipe("contrast", data={"augment": {"region": "crop"}}), 3, images=5)
    assert forward_flops(task, 32, step=0) > 0
    assert task.regions is not None and task.regions.boxes.isnan().all()  # pyright: ignore[reportAttributeAccessIssue]


def _noted(rows: slice, group: dist.ProcessGroup | None) -> Tensor:
    config, mask = _config(), torch.zeros(4, 8, 8)
    for row in range(4):
        mask[row, row : row + 3, 2 : 4 + row] = 1
    regions, batch = (
        LastRegions(6, config, group),
        _batch(torch.zeros(4, 3, 64, 64), [5, 0, 3, 2], [0, 0, 2, 1], config),
    )
    regions.note(batch.split(4 // (rows.stop - rows.start))[rows.start // (rows.stop - rows.start)], mask[rows])
    return regions.boxes


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(_noted(slice(2 * rank, 2 * rank + 2), dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_know_the_boxes_of_the_global_batch(tmp_path: Path) -> None:
    start_ranks(_rank_main, str(tmp_path), ranks=2)
    alone = _noted(slice(0, 4), None)
    assert alone[[0, 3, 5]].isfinite().all() and alone[[1, 2, 4]].isnan().all()
    for rank in range(2):
        boxes = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(boxes.nan_to_num(-1), alone.nan_to_num(-1))


@pytest.mark.slow
def test_a_training_goes_on_with_the_regions_that_it_knew(tmp_path: Path, rocks: Path) -> None:
    chosen = recipe("contrast", data={"augment": {"region": "crop"}}, train={"epochs": 3})
    train(chosen, rocks, tmp_path / "whole", ALONE)
    with pytest.raises(Preempted):
        train(chosen, rocks, tmp_path / "parts", ALONE, preemption=StopAfter(5))  # pyright: ignore[reportArgumentType]
    train(chosen, rocks, tmp_path / "parts", ALONE)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    saved = load_file(max((tmp_path / "whole/checkpoints").glob("step-*.safetensors")))
    boxes = saved["weights/regions.boxes"]
    assert boxes.shape[1] == 4 and 0 < boxes.isfinite().all(dim=1).sum() <= 42
    plain = chosen.changed(**{"data.augment.region": "none"})
    train(plain, rocks, tmp_path / "plain", ALONE)
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")
