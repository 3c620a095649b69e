"""Every recipe field, its meaning, unit and bounds. Imports no torch, so that ``--help`` answers at once.

A recipe is a YAML file under :class:`Recipe`. Each field can be overridden on the command line by its dotted name
(``--optim.lr 0.02``). Fields whose meaning comes from the paper name its section or equation; ``docs/paper.md`` tells
why each default was chosen where the paper is silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")  # its errors are shown to users, who need no link

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


S = TypeVar("S", bound="Schema")


class Schema(BaseModel):
    """Base of all sections: immutable, and a field that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    def changed(self: S, **values: Any) -> S:
        """The same with other values, which are validated as if they had been written in a recipe.

        Args:
            **values: by the name of a field, dotted where it lies in a section (``**{"optim.lr": 0.02}``).

        Raises:
            pydantic.ValidationError: there is no such field, or what comes out is not valid.
        """
        content = self.model_dump()
        for name, value in values.items():
            *sections, field = name.split(".")
            inner = content
            for section in sections:
                inner = inner[section]
            inner[field] = value
        return type(self).model_validate(content)


DecodingBackend = Literal["auto", "dali", "torchvision"]


class DataConfig(Schema):
    """Who decodes images, where they are cut, how batches are composed, what happens to bad files."""

    backend: DecodingBackend = "auto"
    """What decodes images: NVIDIA DALI, torchvision (anywhere, on the CPU), or DALI where it is installed. Batches are
    the same within one grey level, so that a run may go on with the other one."""
    resize: PositiveInt = 512
    """Side in pixels that every image is resized to; the aspect ratio is not kept (section 4.1)."""
    crop: PositiveInt = 448
    """Side in pixels of the crop that the network sees: random in training, centred in evaluation."""
    flip: bool = True
    """Mirror half of the training views left to right."""
    views: Annotated[PositiveInt | None, tyro.conf.arg(aliases=("--views",))] = None
    """Different views of each training image, shown in turn; null draws a new one each time."""
    classes_per_batch: PositiveInt | None = 3
    """Classes in a global batch; null takes all classes of the data."""
    images_per_class: PositiveInt = 14
    """Images of each of these classes in a global batch; their product is the global batch size."""
    eval_batch_size: PositiveInt = 64
    """Images per rank and step in evaluation and prediction."""
    val_fraction: Fraction = 0.1
    """Share of each class that is split off for validation where the folder has no val/."""
    test_fraction: Fraction = 0.1
    """Share of each class that is split off for testing where the folder has no train/ at all."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of the split; null: the recipe's. Set it to train with several seeds on the same images."""
    on_bad_image: Annotated[Literal["skip", "fail"], tyro.conf.arg(aliases=("--on-bad-image",))] = "skip"
    """Whether unreadable images are left out (and listed in the run folder) or stop the run."""
    max_pixels: PositiveInt = 100_000_000
    """Images with more pixels than this in their header are refused before anything is decoded."""
    max_bad_images: Annotated[int, Field(ge=0)] = 10
    """How many files may turn unreadable while the run is under way before it stops."""
    threads: PositiveInt | None = None
    """CPU threads per rank of the data pipeline and, without a GPU, of the network; null shares the machine's cores
    between its ranks."""

    def batch_size(self, num_classes: int) -> int:
        """Images of a global batch of data with ``num_classes`` classes."""
        return (self.classes_per_batch or num_classes) * self.images_per_class

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError("val_fraction + test_fraction leave nothing to train on; lower one of them")
        return self


class ModelConfig(Schema):
    """The network: backbone, region, head."""

    backbone: str = "resnet101"
    """resnet18, 34, 50 or 101 (torchvision), mobilenet_v1, lenet, or any classifier of timm or torchvision by name
    (torchvision/NAME where timm has one of the same name, too)."""
    pretrained: bool | str = True
    """true: ImageNet weights from the hub or its cache; a path: a weights file; false: from scratch."""
    norm: Literal["batch", "sync_batch", "frozen_batch", "group"] = "batch"
    """Normalisation layers: as published, synchronised across GPUs, frozen statistics, or GroupNorm."""
    region: Literal["threshold", "largest", "none"] = "threshold"
    """Eq. 3's region: all cells above the mean, the largest connected part of them, or no mask at all."""
    companion: bool = False
    """Intersect the largest region with the mask of the previous block (the released code)."""
    theta: Fraction = 0.0
    """Eq. 3: what is kept of the features outside the region."""
    area_scale: bool = True
    """Eq. 5: multiply the masked features by alpha."""
    head: Literal["product", "gated"] = "product"
    """Eq. 8 and 9, or the released code's residual sigmoid gates with four logits per pair."""
    hidden: PositiveInt = 512
    """Width of the hidden layer of eq. 6."""
    activation: Literal["relu", "identity"] = "relu"
    """Activation of the hidden layer of eq. 6."""
    dropout: Fraction = 0.0
    """Dropout on the hidden layer (and, in the gated head and MMAL-Net, before the classifier)."""
    fuse_init: Literal["ones", "default"] = "ones"
    """Start of fuse_out: weights near 0 and bias 1, so that training starts as a plain classifier; or torch's."""
    inference: Literal["self_pair", "plain"] = "self_pair"
    """Logits of a single image: of its pair with itself, or of the plain pooled vector."""

    @field_validator("pretrained", mode="before")
    @classmethod
    def _truth(cls, value: Any) -> Any:
        """On a command line every word is a string, and "false" hardly a file's name."""
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.companion and self.region != "largest":
            raise ValueError(f"companion needs region 'largest', not {self.region!r}; set region or drop companion")
        return self


class ContrastConfig(Schema):
    """Which pairs are contrasted, and the centre loss."""

    pairs: Literal["all", "random", "shifts", "hardest"] = "all"
    """Ordered pairs of the global batch: all N^2, a random choice, those of random shifts (every image with the one s
    places after it, for each shift s), or the nearest same- and other-class images."""
    num_pairs: PositiveInt | None = None
    """Pairs per global batch for random and shifts (required; of shifts a multiple of N) and hardest (null: 2 N); of
    PCA-Net, a multiple of N (null: N)."""
    center_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Lambda of eq. 12."""
    center_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the way that a class centre moves to the batch's class mean (eq. 10: 1)."""
    center_reduction: Literal["mean", "sum"] = "mean"
    """Eq. 11 averaged over images and channels, or its literal sum."""
    margin: Annotated[float, Field(ge=0.0)] = 0.05
    """Margin of the ranking loss of the gated head."""

    @model_validator(mode="after")
    def _check(self) -> ContrastConfig:
        if self.pairs == "all" and self.num_pairs is not None:
            raise ValueError(f"num_pairs {self.num_pairs} has no meaning with pairs 'all'; use 'random' or drop it")
        return self


class DistillConfig(Schema):
    """The teacher of a student, and how much the student heeds it (eq. 13 and 14)."""

    teacher: str | None = None
    """Run folder of the teacher, or any folder with its model.safetensors and config.json."""
    teacher_sha256: str | None = None
    """Hash of the teacher's weights; found out at the start, and kept so that no other teacher takes over later."""
    teacher_mode: Annotated[Literal["bank", "online"], tyro.conf.arg(aliases=("--teacher-mode",))] = "bank"
    """bank: the teacher's logits of data.views views of each image, computed once; online: computed in each step."""
    bank: str | None = None
    """Folder of the bank; null: bank/ in the run folder. Students that share a teacher can share it."""
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    """T of eq. 13."""
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of the teacher in the loss: (1 - alpha) cross-entropy + alpha T^2 KL divergence."""


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
    freeze_backbone_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the start in which only the head learns (the released code: 8)."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated."""


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


class Dimension(Schema):
    """What a recipe field may be in a search: one of some choices, or a number of a range."""

    choices: list[Any] | None = None
    """Values to choose from."""
    low: float | None = None
    """Least value of a range."""
    high: float | None = None
    """Largest value of a range."""
    log: bool = False
    """Whether a range is searched by orders of magnitude."""
    also: list[float] = []
    """Values tried beside a range, such as an exact 0 beside a logarithmic one."""

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.also:
                raise ValueError("choices and a range exclude each other; give choices alone, or low and high")
            if len(self.choices) < 2:
                raise ValueError(f"choices {self.choices} leave nothing to search; give two or more")
        elif self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise ValueError(f"low {self.low} is not below high {self.high}; exchange them")
            if self.log and self.low <= 0:
                raise ValueError(f"low {self.low} has no logarithm; raise it, and list 0 under also")
        return self


class SearchConfig(Schema):
    """What tune/search.py varies. Training itself does not look at it."""

    space: dict[str, Dimension | None] = {}
    """Fields to search by their dotted names, beside those of the stage; null takes a field of the stage out."""
    trials_per_teacher: PositiveInt = 4
    """Stage joint: trials with other temperatures and alphas that each trained teacher is used for."""


Task = Literal["contrast", "classify", "distill", "bilinear_cnn", "pca_net", "mmal_net"]


class Recipe(Schema):
    """Everything that decides what a run computes."""

    name: str = "fpcn"
    """Name of the recipe; names the default run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: split, batches, views, initial weights, dropout, random pairs."""
    task: Task = "contrast"
    """contrast: FPCN; classify: the plain classifier with the same backbone, its baseline; distill: that classifier as
    the student of a teacher; bilinear_cnn, pca_net, mmal_net: compared networks (docs/compared.md)."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    contrast: ContrastConfig = ContrastConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    search: Annotated[SearchConfig, tyro.conf.Suppress, tyro.conf.Fixed] = SearchConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.model.head == "gated" and self.contrast.pairs != "hardest":
            raise ValueError(
                f"model.head 'gated' is defined on the hardest pairs only, not {self.contrast.pairs!r}; "
                "set contrast.pairs to 'hardest'"
            )
        for rule in _TASK_RULES[self.task]:
            rule(self)
        if self.optim.ema_decay is not None and self.engine.zero_stage == 3:
            raise ValueError(
                f"optim.ema_decay {self.optim.ema_decay} needs whole weights on each rank, which engine.zero_stage 3 "
                "shards; use zero_stage 2 or drop ema_decay"
            )
        return self


def _check_pairs_are_counted(recipe: Recipe) -> None:
    if recipe.contrast.pairs in ("random", "shifts") and recipe.contrast.num_pairs is None:
        raise ValueError(
            f"contrast.pairs {recipe.contrast.pairs!r} needs contrast.num_pairs; set it to the number of pairs per "
            "global batch"
        )


def _check_pairs_are_random(recipe: Recipe) -> None:
    if recipe.contrast.pairs != "random":
        raise ValueError(
            f"task {recipe.task!r} draws its pairs at random, but contrast.pairs is {recipe.contrast.pairs!r}; "
            "set it to 'random'"
        )


def _check_views_of_the_bank(recipe: Recipe) -> None:
    if recipe.distill.teacher_mode == "bank" and recipe.data.views is None:
        raise ValueError(
            "distill.teacher_mode 'bank' needs data.views, the number of views of each image that it holds; set it "
            "(16, say), or use 'online'"
        )


# What each task asks of a recipe. Its network stands in fpcn_dist.models.NETWORKS, its losses in fpcn_dist.tasks.TASKS.
_TASK_RULES: dict[Task, tuple[Callable[[Recipe], None], ...]] = {
    "contrast": (_check_pairs_are_counted,),
    "classify": (_check_pairs_are_counted,),
    "distill": (_check_pairs_are_counted, _check_views_of_the_bank),
    "bilinear_cnn": (_check_pairs_are_counted,),
    "pca_net": (_check_pairs_are_random,),
    "mmal_net": (_check_pairs_are_counted,),
}
