"""The student of a teacher: cross-entropy and the divergence from the teacher's soft labels (eq. 13 and 14)."""

from __future__ import annotations

from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.tasks.base import Task, TaskOutput
from fpcn_dist.tasks.losses import decoupled_divergence, distillation_loss


class Distill(Task):
    """The plain classifier, taught by ``batch.teacher_logits``, wherever these come from."""

    def encode(self, batch: Batch, step: int) -> Tensor:
        return self.model.pool(batch.images).pooled

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        assert batch.teacher_logits is not None, "the training loop attaches them"
        logits = self.model.logits(pooled)
        config = self.recipe.distill
        class_loss = self.class_loss(logits, batch.labels, batch.targets)
        if config.beta is None:
            loss = distillation_loss(logits, batch.teacher_logits, class_loss, config.temperature, config.alpha)
        else:
            teacher, scale = batch.teacher_logits, config.alpha * config.temperature**2
            divergence = decoupled_divergence(logits, teacher, batch.labels, config.temperature, config.beta)
            loss = (1 - config.alpha) * class_loss + scale * divergence
        return TaskOutput(loss, logits.detach(), {"class_loss": class_loss.detach()})
