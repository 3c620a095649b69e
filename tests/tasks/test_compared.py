"""The compared systems in training: every parameter learns, parts and ranks of a batch change nothing."""

from __future__ import annotations

import pytest
import torch

from fpcn_dist.data.batch import Batch
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.tasks import MMALNetTask, build_task
from fpcn_dist.training.engine import build_engine, forward_backward
from fpcn_dist.training.engine.optim import build_optimizer
from tests.helpers.compared import CLASSES, SYSTEMS, batch, recipe
from tests.helpers.distilling import ALONE

# Learning rate and steps in which each learns twelve photographs by heart, or nearly.
LEARNING = {
    "alexnet": (1e-4, 18),
    "api_net": (1e-3, 6),
    "bilinear_cnn": (1e-3, 6),
    "googlenet": (1e-3, 12),
    "lenet": (3e-3, 40),
    "mmal_net": (1e-3, 7),
    "pca_net": (1e-4, 9),
    "resnet50": (1e-3, 7),
    "vgg16": (1e-4, 10),
}


@pytest.fixture(params=SYSTEMS)
def system(request) -> str:
    return request.param


def test_every_row_of_the_papers_table_2_is_there():
    assert set(SYSTEMS) == set(LEARNING)


@pytest.mark.slow
def test_it_learns_and_every_parameter_gets_a_gradient(system, rocks):
    lr, steps = LEARNING[system]
    chosen = recipe(system, optim={"name": "adamw", "lr": lr, "weight_decay": 0.0})
    shown, task = batch(rocks, chosen), build_task(chosen, CLASSES).train()
    optimizer, losses, accuracies = build_optimizer(chosen.optim, task), [], []
    for step in range(steps):
        output = task(shown, step)
        output.loss.backward()
        if step == 0:
            untouched = [n for n, p in task.named_parameters() if p.grad is None or not p.grad.any()]
            assert not untouched
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
        accuracies.append(float((output.logits.argmax(1) == shown.labels).float().mean()))
    assert min(losses[-2:]) < 0.9 * losses[0], losses
    assert max(accuracies[-3:]) >= 0.65 and accuracies[-1] > accuracies[0] - 0.1, accuracies


@pytest.mark.parametrize("system", ["pca_net", "mmal_net", "bilinear_cnn"])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(system, rocks):
    gradients, losses = [], []
    for parts in (1, 3):
        # Normalisation by image, or each part would have statistics of its own; no dropout, whose draws follow on one
        # another.
        model = {"norm": "group"} if system != "bilinear_cnn" else {"norm": "frozen_batch"}
        chosen = recipe(system, model=model | {"dropout": 0.0}, train={"micro_batches": parts})
        engine = build_engine(chosen, build_task(chosen, CLASSES), ALONE)
        losses.append(float(forward_backward(engine, batch(rocks, chosen), 3, parts).loss.detach()))
        gradients.append([p.grad for p in engine.task.parameters() if p.requires_grad])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for whole, summed in zip(*gradients, strict=True):
        scale = float(whole.abs().max())
        torch.testing.assert_close(summed, whole, atol=2e-3 * scale + 1e-6, rtol=0)


def test_mmal_net_begins_with_whole_images(rocks):
    chosen = recipe("mmal_net")
    task = build_task(chosen, CLASSES, steps_per_epoch=2)
    shown = batch(rocks, chosen)
    assert isinstance(task, MMALNetTask)
    assert set(task(shown, 1).parts) == {"image_loss"}
    output = task(shown, 2)
    assert set(output.parts) == {"image_loss", "object_loss", "part_loss"}
    assert float(output.loss.detach()) == pytest.approx(sum(map(float, output.parts.values())), rel=1e-5)


def test_pca_net_erases_alike_whenever_it_is_asked(rocks):
    chosen = recipe("pca_net")
    task, shown = build_task(chosen, CLASSES).eval(), batch(rocks, chosen)
    with torch.no_grad():
        first, again, later = task.encode(shown, 5), task.encode(shown, 5), task.encode(shown, 6)
        reversed_ = task.encode(Batch(*(getattr(shown, n).flip(0) for n in list(shown.__dataclass_fields__)[:5])), 5)
    assert torch.equal(first, again) and not torch.equal(first, later)
    torch.testing.assert_close(reversed_.flip(0), first, atol=1e-3, rtol=1e-3)


def test_pca_nets_losses_are_written_out(rocks):
    """Against the description: mean of three cross-entropies, and the distance from the unit centre of the class."""
    chosen = recipe("pca_net")
    task, shown = build_task(chosen, CLASSES).eval(), batch(rocks, chosen)
    with torch.no_grad():
        pooled = task.encode(shown, 0)
        output = task.criterion(pooled, shown, 0)
        features, attention = task.model.maps(shown.images)
        raw = task.model.pool(shown.images).pooled
        centers = torch.stack([raw[shown.labels == k].mean(0) / 100 for k in range(CLASSES)])
        centers = centers / centers.norm(dim=1, keepdim=True)
        distance = sum(float((raw[i] / 100 - centers[shown.labels[i]]).square().sum()) for i in range(len(shown)))
    torch.testing.assert_close(output.logits, task.model.classifier(raw))
    assert float(output.parts["center_loss"]) == pytest.approx(distance / len(shown), rel=1e-4)
    assert float(output.loss) == pytest.approx(sum(map(float, output.parts.values())), rel=1e-5)
    assert features.shape[1] == 512 and attention.shape[1] == 32


@pytest.mark.parametrize(("pairs", "hint"), [(13, "multiple of 12, such as 12"), (144, "such as 132")])
def test_pairs_that_cannot_be_shared_out(rocks, pairs, hint):
    chosen = recipe("pca_net")
    chosen = chosen.changed(**{"contrast.num_pairs": pairs})
    task, shown = build_task(chosen, CLASSES), batch(rocks, chosen)
    with pytest.raises(UserError, match=f"contrast.num_pairs {pairs}.*{hint}"):
        task(shown, 0)
