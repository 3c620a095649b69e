"""DeepSpeed (ZeRO 0 to 3) behind the engine protocol.

DeepSpeed's own checkpoints load only at the same number of ranks and by unpickling; so whole tensors are gathered
through its ``safe_get_full_*`` functions and put back through ``safe_set_full_*``, in the format of every engine.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import torch
from torch import Tensor

from fpcn_dist.data.batch import Batch
from fpcn_dist.models import Classifier
from fpcn_dist.recipe.schema import Recipe
from fpcn_dist.recipe.training import Depth
from fpcn_dist.runs.checkpoint import TrainingState
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.ranks import Ranks
from fpcn_dist.tasks import Task, TaskOutput
from fpcn_dist.training.engine.base import (
    averaged_model,
    build_ema,
    ema_state,
    named_moments,
    prepare_task,
    restore_moments,
    sync_batch_statistics,
    to_cpu,
)
from fpcn_dist.training.engine.optim import build_optimizer, moment_names, set_rate


class DeepSpeedEngine:
    """See :class:`fpcn_dist.training.engine.base.Engine`.

    With ``train.channels_last`` the images are in that order but not the weights, which DeepSpeed could not broadcast.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, task: Task, recipe: Recipe, ranks: Ranks, *, freeze: Depth, state: TrainingState | None) -> None:
        self.deepspeed = _import_deepspeed()
        self.recipe, self.ranks, self.stage = recipe, ranks, recipe.engine.zero_stage
        self.task = prepare_task(task, recipe, ranks, freeze, state)
        self.ema = build_ema(recipe, self.task, state)
        # ZeRO 3 shards the parameters in place: keep an unsharded twin to evaluate with.
        self.whole_model = copy.deepcopy(self.task.model) if self.stage == 3 else None
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only its own throughput log reads it
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": recipe.optim.clip_norm or 0.0,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        self.optimizer: Any  # torch's at stage 0, DeepSpeed's wrapper with its own .optimizer above
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # it insists, also where no launcher started us
        self.engine, self.optimizer, _, _ = self.deepspeed.initialize(
            model=self.task,
            optimizer=build_optimizer(recipe.optim, self.task),
            config=config,
            dist_init_required=False,
        )
        if state is not None and state.optimizer:
            self._restore_moments(state)

    def forward(self, batch: Batch, step: int, *, pooled: Tensor | None = None) -> TaskOutput:
        return self.engine(batch, step, pooled=pooled)

    def encode(self, batch: Batch, step: int) -> Tensor:
        return self.engine(batch, step, encode_only=True)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def update(self, lr: float) -> Tensor | None:
        set_rate(self.optimizer, lr)
        self.engine.step()
        if self.ema is not None:
            self.ema.update_parameters(self.task.model)
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm, device=self.ranks.device)

    def evaluation_model(self) -> Classifier:
        sync_batch_statistics(self.task, self.ranks.group)
        if self.whole_model is None:
            return averaged_model(self.ema) or self.task.model
        weights = {k.removeprefix("model."): v for k, v in self._weights().items() if k.startswith("model.")}
        self.whole_model.load_state_dict(weights)
        return self.whole_model

    def state(self, step: int) -> TrainingState:
        sync_batch_statistics(self.task, self.ranks.group)
        return TrainingState(step, to_cpu(self._weights()), self._moments(), ema_state(self.ema))

    def close(self) -> None:
        self.engine.destroy()

    def _weights(self) -> dict[str, Tensor]:
        """The whole state dict; ZeRO 3 keeps parameters in shards, which are put together one by one."""
        weights = dict(self.task.state_dict())
        if self.stage == 3:
            for name, parameter in self.task.named_parameters():
                with self.deepspeed.zero.GatheredParameters([parameter]):
                    weights[name] = parameter.detach().clone()
        return weights

    def _shards(self) -> list[tuple[list[str], dict[str, Tensor]]]:
        """The optimizer's flat shards: names of the parameters in each, and its state on this rank."""
        names = {id(parameter): name for name, parameter in self.task.named_parameters()}
        zero = self.optimizer
        if self.stage == 3:
            groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
        else:
            groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
            # DeepSpeed links parameters to their moments while the first group steps, when the others have none yet.
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        states = [zero.optimizer.state[flat] for flat in flats]
        return [([names[id(p)] for p in group], state) for group, state in zip(groups, states, strict=True)]

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        if self.stage == 0:
            return named_moments(self.task, self.optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters, keys = dict(self.task.named_parameters()), moment_names(self.recipe.optim)
        moments: dict[str, dict[str, Tensor]] = {}
        for names, shard in self._shards():
            for name in names:
                moments[name] = to_cpu(
                    {key: _known(safe_get_full_optimizer_state(parameters[name], key)) for key in keys}
                )
                if "step" in shard:
                    moments[name]["step"] = shard["step"].detach().cpu().clone()
        return moments

    def _restore_moments(self, state: TrainingState) -> None:
        """Parameters that were not trained yet start from zero moments, as they would without shards."""
        if self.stage == 0:
            restore_moments(self.task, self.optimizer, state.optimizer)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._create_moments(state)
        parameters, keys = dict(self.task.named_parameters()), moment_names(self.recipe.optim)
        for names, shard in self._shards():
            for name in names:
                for key in keys:
                    zeros = torch.zeros_like(state.weights[name])
                    value = state.optimizer[name][key] if name in state.optimizer else zeros
                    safe_set_full_optimizer_state(parameters[name], value.to(self.ranks.device), key)
            if "step" in shard:
                known = state.optimizer.get(names[0], {})
                shard["step"].copy_(known.get("step", torch.zeros(())))

    def _create_moments(self, state: TrainingState) -> None:
        """ZeRO creates its optimizer shards in the first update: make one, at rate 0, and undo its trace in buffers."""
        data = self.recipe.data
        classes = self.task.model.classifier.out_features
        size = data.batch_size(classes) // self.ranks.world_size
        places = torch.zeros(size, dtype=torch.int64, device=self.ranks.device)
        images = torch.zeros(size, 3, data.crop, data.crop, device=self.ranks.device)
        labels = torch.arange(size, device=self.ranks.device) % classes
        crops, soft = places.double().unsqueeze(1).expand(size, 5), images.new_zeros(size, classes)
        batch = Batch(images, labels, places, places, crops, soft)
        self.backward(self.forward(batch, state.step).loss)
        ema, self.ema = self.ema, None
        self.update(lr=0.0)
        self.ema = ema
        for name, buffer in self.task.named_buffers():
            buffer.copy_(state.weights[name])


def _known(moment: Tensor | None) -> Tensor:
    if moment is None:
        raise RuntimeError("DeepSpeed holds no optimizer state for a trained parameter")
    return moment


def _import_deepspeed():
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "engine.name", "deepspeed", "the package deepspeed is not installed", "pip install 'fpcn-dist[deepspeed]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory op would be compiled at the first start on a CPU (a minute, and ninja); gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
