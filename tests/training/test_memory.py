"""What a step will take of the memory is told before it is made, where a batch grows with the classes."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe
from fpcn_dist.tasks import Task, build_task
from fpcn_dist.training.memory import describe_memory, saved_bytes, step_bytes

GIB = 2**30


def _recipe(**data: object) -> Recipe:
    values = {"resize": 72, "crop": 64, "classes_per_batch": None, "images_per_class": 8} | data
    return Recipe(model=ModelConfig(backbone="test_resnet", pretrained=False, hidden=16), data=DataConfig(**values))


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    return build_task(_recipe(), 3, None, steps_per_epoch=1, class_counts=(9, 9, 9), images=27)


def test_what_is_kept_of_an_image_grows_with_its_area_and_not_with_what_is_frozen(task: Task) -> None:
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    small, large = saved_bytes(task, 64), saved_bytes(task, 128)
    assert large == pytest.approx(4 * small, rel=0.05)
    for parameter in task.model.backbone.parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(task, 64) == small
    assert not any(parameter.requires_grad for parameter in task.model.backbone.parameters())
    assert all(parameter.grad is None for parameter in task.parameters()) and task.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())


def test_it_counts_what_pytorch_keeps(task: Task) -> None:
    """What is still held when images have been encoded, by PyTorch's own account of each allocation."""
    held = []
    for images in (2, 6):
        zeros = torch.zeros(images, dtype=torch.int64)
        batch = Batch(torch.zeros(images, 3, 64, 64), zeros, zeros, zeros, zeros[:, None].double().expand(-1, 5))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            encoded = task.eval()(batch, 0, encode_only=True)
        events = profiler.profiler.kineto_results.events()
        held.append(sum(event.nbytes() for event in events if event.name() == "[memory]"))
        del encoded
    assert saved_bytes(task, 64) == pytest.approx((held[1] - held[0]) / 4, rel=0.05)


def test_a_batch_of_all_classes_is_told_about_where_it_needs_much(task: Task) -> None:
    recipe, each = _recipe(), step_bytes(task, _recipe(), 8) / GIB
    line = describe_memory(task, recipe, 1000, 1, 4 * GIB)
    assert line is not None and line.startswith("warning: a batch of all 1,000 classes holds 8,000 images")
    needed = step_bytes(task, recipe, 8000)
    assert f"about {needed / GIB:.1f} GiB on each rank, where 4.0 GiB are free" in line and needed > 500 * each
    fewer = int(line.partition("set data.classes_per_batch ")[2].partition(",")[0])
    assert step_bytes(task, recipe, 8 * fewer) <= 2 * GIB < step_bytes(task, recipe, 8 * (fewer + fewer // 4))
    capped = _recipe(classes_per_batch=fewer)
    assert describe_memory(task, capped, 1000, 1, 4 * GIB) is None, "it does not grow with the classes"
    assert (
        describe_memory(task, recipe, 1000, 1, 1000 * GIB) is None and describe_memory(task, recipe, 3, 1, GIB) is None
    )
    assert describe_memory(task, _recipe(classes_per_batch=2000), 1000, 1, 4 * GIB) == line
    assert describe_memory(task, _recipe(images_per_class=None), 1000, 1, 1) is None, "of features"
    in_parts = recipe.changed(**{"train.micro_batches": 100})
    assert step_bytes(task, in_parts, 8000) < needed and step_bytes(task, recipe, 4000) < needed
