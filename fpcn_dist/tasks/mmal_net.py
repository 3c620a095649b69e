"""MMAL-Net's training: cross-entropy of the image, of its object, and of the object's parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.models.compared.mmal_net import MMALNet
from fpcn_dist.tasks.base import Task, TaskOutput


class MMALNetTask(Task):
    """The loss is CE(image) + CE(object) + mean CE(parts); at first, while regions mean nothing, CE(image) alone.

    Args:
        model: the network.
        recipe: see :class:`Task`.
        setting: an epoch at the start learns from whole images alone, as published.
    """

    encodes_views = False
    model: MMALNet

    def encode(self, batch: Batch, step: int) -> Tensor:
        """The features [B, (1 + 1 + N) C] of image, object and N parts; those of the image [B, C] at the start."""
        if step < self.setting.steps_per_epoch:
            return self.model.raw(batch.images)[0]
        found = self.model.branches(batch.images, parts=True)
        assert found.parts is not None
        return torch.cat([found.raw, found.object, found.parts.flatten(1)], dim=1)

    def criterion(self, pooled: Tensor, batch: Batch, step: int) -> TaskOutput:
        branches_BRC = pooled.unflatten(1, (-1, self.model.backbone.channels))
        branches_BRC = F.dropout(branches_BRC, self.model.dropout, self.training)
        loss = self._class_loss(branches_BRC[:, :1], batch.labels)
        parts = {"image_loss": loss.detach()}
        if branches_BRC.shape[1] > 1:
            for name, branch in (("object", branches_BRC[:, 1:2]), ("part", branches_BRC[:, 2:])):
                more = self._class_loss(branch, batch.labels)
                parts[f"{name}_loss"] = more.detach()
                loss = loss + more
        with torch.no_grad():
            predicting = pooled.unflatten(1, (-1, self.model.backbone.channels))
            logits = self.model.logits(predicting[:, min(1, predicting.shape[1] - 1)])
        return TaskOutput(loss, logits, parts)

    def _class_loss(self, branches_BRC: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy over images and branches."""
        logits = self.model.logits(branches_BRC.flatten(0, 1))
        return self.class_loss(logits, labels.repeat_interleave(branches_BRC.shape[1]))
