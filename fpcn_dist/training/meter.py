"""Numbers of many steps, kept on the device and fetched together, so that the host waits only at log points."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.models.cost import count_flops
from fpcn_dist.models.modes import evaluating
from fpcn_dist.runtime.errors import NotFinite
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task, TaskOutput


def forward_flops(task: Task, image_size: int, step: int) -> int:
    """FLOPs of all that training step ``step`` computes forward for one [3, ``image_size``, ``image_size``] image.

    A task may show its network more than the image, such as parts of it. What the losses add is left out: it is next to
    nothing, and depends on the batch.
    """
    parameter = next(task.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    zero = torch.zeros(1, dtype=torch.int64, device=parameter.device)
    batch = Batch(image, zero, zero, zero, zero.double().expand(1, 5))
    # Not inference_mode, whose tensors no later step could use where a task keeps them.
    with evaluating(task), torch.no_grad():
        return count_flops(lambda: task.encode(batch, step))


class StepMeter:
    """Collects losses, accuracy, gradient norms and times of the steps since the last log point."""

    def __init__(self, ranks: Ranks, batch_size: int, flops_share: float | None) -> None:
        """``flops_share``: share of the ranks' peak that one image per second would use, where the peak is known."""
        self.ranks, self.batch_size, self.flops_share = ranks, batch_size, flops_share
        self._restart()

    def _restart(self) -> None:
        self._first = 0
        self._values: list[dict[str, Tensor]] = []
        self._rates: list[float] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what happened since the last log point (an evaluation, a checkpoint)."""
        self._waited, self._since = 0.0, time.perf_counter()

    def add(self, step: int, batch: Batch, output: TaskOutput, norm: Tensor | None, lr: float, waited: float) -> None:
        """Note one step (its number from 1 on); waits for nothing."""
        accuracy = (output.logits.argmax(dim=1) == batch.labels).float().mean()
        values = {"loss": output.loss.detach(), **output.parts, "accuracy": accuracy}
        if norm is not None:
            values["grad_norm"] = norm
        self._first = self._first or step
        self._values.append({name: value.detach().double() for name, value in values.items()})
        self._rates.append(lr)
        self._waited += waited

    def fetch(self) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Fetch the means over ranks of every step since the last call, and the speed over these steps. Collective.

        Returns:
            A row for each step, with the parts of the loss that this step had; and the speed.

        Raises:
            NotFinite: a loss or a gradient norm was not finite; names the step and all parts.
        """
        # One after the other, because a task may have other parts from some step on.
        everything = torch.stack([value for values in self._values for value in values.values()])
        if self.ranks.group is not None:
            torch.distributed.all_reduce(everything, group=self.ranks.group)
            everything /= self.ranks.world_size
        numbers = iter(everything.tolist())
        rows = [{name: next(numbers) for name in values} for values in self._values]
        elapsed = time.perf_counter() - self._since
        speed = {
            "images_per_second": len(rows) * self.batch_size / elapsed,
            "data_wait": self._waited / elapsed,
        }
        if self.ranks.device.type == "cuda":
            speed["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.flops_share is not None:
            speed["mfu"] = speed["images_per_second"] * self.flops_share
        first, rates = self._first, self._rates
        self._restart()
        for step, row in enumerate(rows, start=first):
            if not all(map(math.isfinite, row.values())):
                shown = ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "accuracy")
                raise NotFinite("loss", f"at step {step}", f"is not finite ({shown})", "lower optim.lr")
        return [{**row, "lr": lr} for row, lr in zip(rows, rates, strict=True)], speed
