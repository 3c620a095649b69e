"""Cross-entropy on the pooled vector: the plain classifier, and Bilinear CNN."""

from __future__ import annotations

from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.tasks.base import Task, TaskOutput


class Classify(Task):
    """The plain cross-entropy trains the baseline of the paper's Figure 5 and Table 4, which is FPCN's backbone without
    region and pairs, and the basic networks and Bilinear CNN of its Table 2."""

    def encode(self, batch: Batch, step: int) -> Tensor:
        return self.model.pool(batch.images).pooled

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        logits = self.model.logits(pooled)
        loss = self.class_loss(logits, batch.labels, batch.targets)
        return TaskOutput(loss, logits.detach(), {"class_loss": loss.detach()})
