"""Sections ``optim``, ``train`` and ``engine`` of a recipe: how its losses are minimised."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fpcn_dist.recipe.section import Fraction, PositiveInt, Schema, truth

Depth = Literal["none", "stem", "backbone"]


class OptimConfig(Schema):
    """Optimizer and learning-rate schedule."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0.0)] = 0.01
    """Peak learning rate, for the global batch as given."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    """Weight decay; not applied to biases and normalisation layers by AdamW."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """Epochs of linear warm-up before the cosine."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of the cosine."""
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    """Largest global gradient norm; null clips nothing."""
    head_lr: Annotated[float, Field(gt=0.0)] = 1.0
    """Multiple of the learning rate for everything that is not the backbone."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Multiple of the learning rate from each layer group of the backbone to the one before it; null: one rate."""
    freeze: Depth = "none"
    """What of the network stays as it is: nothing, its first layers, or the whole backbone, so that only the head
    learns."""
    freeze_epochs: PositiveInt | None = None
    """Epochs at the start for which it does (the released code: the backbone for 8); null: for ever."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated."""

    @model_validator(mode="before")
    @classmethod
    def _older(cls, values: Any) -> Any:
        """Older recipes, and the checkpoints of their runs, have ``freeze_backbone_epochs`` for both fields."""
        if not isinstance(values, dict) or "freeze_backbone_epochs" not in values:
            return values
        epochs = values["freeze_backbone_epochs"]
        now = {"freeze": "none"} if epochs == 0 else {"freeze": "backbone", "freeze_epochs": epochs}
        return {name: value for name, value in values.items() if name != "freeze_backbone_epochs"} | now


class TrainConfig(Schema):
    """Length, precision and cadence of the run."""

    epochs: PositiveInt = 100
    """Epochs; one epoch is (training images) // (global batch size) steps, at least one."""
    micro_batches: PositiveInt = 1
    """Parts that a rank cuts its share of a batch into to save memory; the contrast still spans the whole batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network: float32, or bfloat16 autocast."""
    matmul: Literal["highest", "high"] | None = None
    """Products of float32 matrices: in float32 (highest), or in TF32 and, in the kernels of the contrast, in float16
    (high); null: high with bf16 on GPUs from Ampere on, else highest."""
    channels_last: bool = False
    """Keep images and weights in NHWC memory order (faster on GPUs with tensor cores)."""
    compile: bool = False
    """Compile the network with torch.compile."""
    eval_every: PositiveInt = 1
    """Epochs between evaluations on the validation images."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; null writes one after each epoch."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints kept beside the best one."""
    log_every: PositiveInt = 10
    """Steps between log points, the only places where the host waits for the GPU."""
    feature_bank: bool | str = True
    """true: the features of a frozen backbone are computed once, in the run folder, where that pays (docs/features.md);
    a path: the folder where runs share them; false: computed in every step."""

    @field_validator("feature_bank", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        return truth(value)


class EngineConfig(Schema):
    """Who moves gradients between ranks."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    """PyTorch's DistributedDataParallel, or DeepSpeed."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed's ZeRO stage: what is sharded over ranks (1 optimizer, 2 and gradients, 3 and weights)."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        if self.name == "ddp" and self.zero_stage:
            raise ValueError(f"zero_stage {self.zero_stage} needs name 'deepspeed'; set it or use zero_stage 0")
        return self
