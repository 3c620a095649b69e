"""The student's task takes the teacher's term that its recipe names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.tasks import build_task
from fpcn_dist.tasks.losses import classification_loss, decoupled_divergence, distillation_loss


@pytest.mark.parametrize("beta", [None, 2.0])
def test_the_recipe_names_the_teachers_term(beta):
    distill = {"teacher_mode": "online", "temperature": 3.0, "alpha": 0.25, "beta": beta}
    model = {"backbone": "lenet", "pretrained": False}
    recipe = Recipe.model_validate({"task": "distill", "model": model, "distill": distill})
    task = build_task(recipe, 4).eval()
    labels, teacher = torch.tensor([0, 3, 1]), torch.randn(3, 4)
    pooled = task.model.pool(torch.randn(3, 3, 32, 32)).pooled.detach()
    logits = task.model.logits(pooled)
    class_loss = classification_loss(logits, labels)
    expected = distillation_loss(logits, teacher, class_loss, 3.0, 0.25)
    if beta is not None:
        expected = 0.75 * class_loss + 0.25 * 9 * decoupled_divergence(logits, teacher, labels, 3.0, beta)
    batch = SimpleNamespace(labels=labels, targets=None, teacher_logits=teacher)
    torch.testing.assert_close(task.criterion(pooled, batch, 0).loss, expected)
