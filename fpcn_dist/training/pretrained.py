"""What the weights that a run starts from decide: how its network is shown images, and whose backbone it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fpcn_dist.models.packaged import PACKAGED
from fpcn_dist.models.published import find_network, published
from fpcn_dist.models.weights import MODEL_FILE
from fpcn_dist.recipe.preprocessing import IMAGENET, Preprocessing
from fpcn_dist.recipe.schema import ModelConfig, Recipe
from fpcn_dist.runs.checkpoint import is_checkpoint, read_info
from fpcn_dist.runs.model_folder import describes_model, load_info
from fpcn_dist.runtime.errors import UserError


class Origin(NamedTuple):
    """A model or checkpoint of this project, whose backbone another network starts from.

    Attributes:
        backbone: its name.
        classes: class names that it was trained for.
        preprocessing: how images were shown to it.
    """

    backbone: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def name_preprocessing(recipe: Recipe) -> Recipe:
    """``recipe`` with mean, standard deviation and interpolation, where it leaves them open.

    They are the teacher's in a distillation, as it looks at the same images; else what the network's weights were
    trained with. For the first rank, where a run begins: one that goes on has them from its checkpoint.

    Raises:
        UserError: there is no such network, no model in the folder of the teacher, or see :func:`read_origin`.
    """
    if recipe.task == "distill" and recipe.distill.teacher is not None:
        own = load_info(Path(recipe.distill.teacher)).preprocessing.preprocessing
    else:
        own = preprocessing_of_weights(recipe.model)
    return recipe.with_preprocessing(own)


def preprocessing_of_weights(model: ModelConfig) -> Preprocessing:
    """How images were shown to the weights that a network starts from; ImageNet's where it starts from scratch.

    Raises:
        UserError: there is no such network, or see :func:`read_origin`.
    """
    if not model.pretrained:
        return IMAGENET
    origin = read_origin(model)
    return origin.preprocessing if origin else published(model.backbone).preprocessing


def read_origin(model: ModelConfig) -> Origin | None:
    """What ``model.pretrained`` is, where it is a run, a model or a checkpoint of this project.

    Raises:
        UserError: a folder without a model of this project, or one with another backbone.
    """
    if isinstance(model.pretrained, bool) or model.pretrained == PACKAGED:
        return None
    path = Path(model.pretrained).expanduser()
    origin = None
    if path.is_dir() or (path.name == MODEL_FILE and describes_model(path.parent)):
        try:
            info = load_info(path if path.is_dir() else path.parent)
        except UserError as error:
            hint = f"{error.hint}; of a run that has not ended, give RUN/checkpoints/best.safetensors"
            raise UserError("model.pretrained", error.value, error.reason, hint) from None
        origin = Origin(info.model.backbone, info.classes, info.preprocessing.preprocessing)
    elif is_checkpoint(path):
        saved = read_info(path)
        origin = Origin(saved.recipe["model"]["backbone"], saved.classes, saved.preprocessing)
    if origin and find_network(origin.backbone).architecture != find_network(model.backbone).architecture:
        reason = f"its backbone is {origin.backbone}, not {model.backbone}"
        hint = f"set model.backbone to {origin.backbone}, or give a run with {model.backbone}"
        raise UserError("model.pretrained", model.pretrained, reason, hint)
    return origin


def describe_weights(recipe: Recipe, classes: Sequence[str]) -> Iterator[str]:
    """Lines for the user about a run that begins with pretrained weights: what else than usual comes of them.

    Raises:
        UserError: see :func:`preprocessing_of_weights`.
    """
    model, shown = recipe.model, recipe.data.preprocessing
    if not model.pretrained:
        return
    if origin := read_origin(model):
        new = f"what follows it is new, for {len(classes)} classes"
        yield f"backbone {origin.backbone} from {model.pretrained}, trained for {len(origin.classes)} classes; {new}"
    own, usual = preprocessing_of_weights(model), published(model.backbone).input_size
    size = f", at {recipe.data.crop} px" + (f" (usual: {usual} px)" if usual else "")
    if shown != own:
        yield f"{model.backbone} is shown images otherwise than its weights were trained: {shown}, not {own}{size}"
    elif shown != IMAGENET:
        yield f"{model.backbone} is shown images as its weights were trained: {shown}{size}"
