"""Section ``data`` of a recipe: the images, and what becomes of them before a network sees them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from fpcn_dist.recipe.augment import OF_BATCHES, AugmentConfig
from fpcn_dist.recipe.preprocessing import Interpolation, Mean, Preprocessing, Std
from fpcn_dist.recipe.section import Fraction, PositiveInt, Schema
from fpcn_dist.runtime.errors import UserError

DecodingBackend = Literal["auto", "dali", "torchvision"]
Fit = Literal["squeeze", "pad", "short_side"]

_NOT_PIXELS = {
    *("backend", "threads", "eval_batch_size", "classes_per_batch", "images_per_class", "class_weights"),
    *("val_fraction", "test_fraction", "split_seed", "columns", "on_bad_image", "on_duplicate"),
    *("max_pixels", "max_decoded_mib", "max_bad_images", "cache_gib"),
}
"""Fields that decide who decodes, or which images there are, and not what becomes of a view of an image."""


class ColumnsConfig(Schema):
    """Which columns of a table, of Parquet files or of the JSON files of tar shards say what (docs/data.md)."""

    image: str | None = None
    """Path of the image, or the image itself in Parquet files; null: path or file_name, in Parquet files the column of
    images."""
    label: str | None = None
    """Its class; null: label."""
    split: str | None = None
    """train, val or test; null: split, where there is such a column."""
    group: str | None = None
    """What it belongs to (a specimen, a visit): images of one group never lie on both sides of a split; null: group,
    where there is such a column."""


class DataConfig(Schema):
    """Who decodes images, where they are cut, how batches are composed, what happens to bad files."""

    backend: DecodingBackend = "auto"
    """What decodes images: NVIDIA DALI, torchvision (anywhere, on the CPU), or DALI where it is installed. Batches are
    the same (on a GPU within one grey level), so that a run may go on with the other one."""
    resize: PositiveInt = 512
    """Side in pixels that every image is resized to, in the way that fit says."""
    fit: Fit = "squeeze"
    """How an image becomes of that size: squeezed to a square (section 4.1), padded with black to a square that its
    long side fills, or so that its short side has that many pixels. The last two keep the aspect ratio."""
    crop: PositiveInt = 448
    """Side in pixels of the crop that the network sees: random in training, centred in evaluation."""
    mean: Mean | None = None
    """Of red, green and blue, for pixels in [0, 1]: a pixel becomes (pixel - mean) / std. Null, like the two fields
    below: as the network's weights were trained, ImageNet's from scratch, the teacher's in a distillation; a run
    settles it at its start."""
    std: Std | None = None
    """Of red, green and blue, for pixels in [0, 1]."""
    interpolation: Interpolation | None = None
    """Filter of the resizing."""
    flip: bool = True
    """Mirror half of the training views left to right."""
    views: Annotated[PositiveInt | None, tyro.conf.arg(aliases=("--views",))] = None
    """Different views of each training image, shown in turn; null draws a new one each time."""
    augment: AugmentConfig = AugmentConfig()
    classes_per_batch: PositiveInt | None = 3
    """Classes in a global batch; all classes of the data where these have fewer, or with null."""
    images_per_class: PositiveInt | None = 14
    """Images of each of these classes in a global batch; their product is the global batch size. null: every training
    image once in each batch, which features computed once make affordable (docs/features.md)."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """What a class weighs in the cross-entropy by its number of training images n, beside batches that show all classes
    alike: nothing, 1 / n, or one over the effective number of images (Cui et al. 2019, beta 0.999); 1 on average."""
    eval_batch_size: PositiveInt = 64
    """Images per rank and step in evaluation and prediction."""
    val_fraction: Fraction = 0.1
    """Share of each class that is split off for validation where the folder has no val/."""
    test_fraction: Fraction = 0.1
    """Share of each class that is split off for testing where the folder has no train/ at all."""
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Seed of the split; null: the recipe's. Set it to train with several seeds on the same images."""
    columns: ColumnsConfig = ColumnsConfig()
    on_bad_image: Annotated[Literal["skip", "fail", "salvage"], tyro.conf.arg(aliases=("--on-bad-image",))] = "skip"
    """Unreadable images are left out (and listed in the run folder), or stop the run; salvage shows those JPEGs that
    were cut short of which 95 % of the rows are there, fills them up with their mean colour, and lists them, too."""
    on_duplicate: Literal["warn", "drop", "fail"] = "warn"
    """What becomes of identical files: they are counted; or one of each stays, of the test images before those of the
    validation and of the training, and none where they are in two classes; or they stop the run."""
    max_pixels: PositiveInt = 100_000_000
    """Images with more pixels than this in their header are refused before anything is decoded."""
    max_decoded_mib: PositiveInt = 512
    """MiB of whole images that a rank holds at once, decoded to 3 bytes a pixel, before their views are cut: a larger
    batch is decoded in pieces, which changes no pixel. An image that is larger by itself is decoded alone."""
    max_bad_images: Annotated[int, Field(ge=0)] = 10
    """How many files may turn unreadable while the run is under way before it stops."""
    cache_gib: Annotated[float, Field(ge=0.0)] = 10.0
    """GiB of this machine's disk that copies of remote images may take, in the user's cache folder (XDG_CACHE_HOME); 0
    keeps none. All processes share it, and what was used last is kept (docs/data.md)."""
    threads: PositiveInt | None = None
    """CPU threads per rank of the data pipeline and, without a GPU, of the network; null shares the machine's cores
    between its ranks."""

    def classes_in_batch(self, num_classes: int) -> int:
        """Classes in a global batch of data with ``num_classes`` classes."""
        return min(self.classes_per_batch or num_classes, num_classes)

    def batch_size(self, num_classes: int, num_images: int | None = None) -> int:
        """Images of a global batch of data with ``num_classes`` classes and ``num_images`` training images.

        Raises:
            UserError: a batch holds all images, and whoever asks does not know how many these are.
        """
        if self.images_per_class is not None:
            return self.classes_in_batch(num_classes) * self.images_per_class
        if num_images is None:
            reason = "all training images in each batch are for training alone, whose batches need not compare"
            raise UserError("data.images_per_class", None, reason, "give a number")
        return num_images

    def pixels(self) -> dict[str, Any]:
        """The fields that decide the pixels of a view, by name: what is computed from views is stored under these."""
        values = self.settled(self.preprocessing).model_dump(mode="json", exclude=_NOT_PIXELS)
        augment = values.pop("augment")
        return values | {f"augment.{name}": augment[name] for name in augment if name not in OF_BATCHES}

    @property
    def distinct_views(self) -> int | None:
        """How many views of a training image there are; ``None`` where each one is new."""
        return self.views if self.views_are_drawn else 1

    @property
    def views_are_drawn(self) -> bool:
        """Whether the views of an image differ, as draws of the recipe's seed say; else all are the whole image."""
        cut = self.crop < self.resize or self.fit == "short_side"
        return self.flip or cut or self.augment.changes_views

    @property
    def preprocessing(self) -> Preprocessing:
        """Mean, standard deviation and interpolation; ImageNet's where they are not settled."""
        return Preprocessing.recorded({name: getattr(self, name) for name in Preprocessing.model_fields})

    def settled(self, own: Preprocessing) -> DataConfig:
        """The same with the values of ``own`` for what is left to the network."""
        left = {name: value for name, value in own if getattr(self, name) is None}
        return self.changed(**left) if left else self

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.crop > self.resize:
            raise ValueError(f"crop {self.crop} is larger than resize {self.resize}; lower crop or raise resize")
        if self.images_per_class is None and self.classes_per_batch is not None:
            raise ValueError(
                f"classes_per_batch {self.classes_per_batch} leaves out classes, and images_per_class null takes all "
                "images; set classes_per_batch to null, too"
            )
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError("val_fraction + test_fraction leave nothing to train on; lower one of them")
        return self
