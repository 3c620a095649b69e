"""A trained model as a folder that others can load: model.safetensors, config.json and a model card.

The layout is that of Hugging Face, so the folder can be uploaded as it is. Nothing in it is executable: weights are
read with safetensors alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from fpcn_dist import __version__
from fpcn_dist.models import CLASS_TOKEN, Classifier, build_model, knows_token_maps
from fpcn_dist.models.weights import MODEL_FILE
from fpcn_dist.recipe.preprocessing import Preprocessing
from fpcn_dist.recipe.schema import DataConfig, ModelConfig, Recipe, Task
from fpcn_dist.runs.evaluation import Evaluation
from fpcn_dist.runs.folder import RunFolder
from fpcn_dist.runs.probe import Probe
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import replacing, write_tensors, write_text
from fpcn_dist.runtime.names import markdown, printable

WEIGHTS, CONFIG, CARD = MODEL_FILE, "config.json", "README.md"
_FORMAT = 2
_READABLE = (1, _FORMAT)
"""Format 1 knew no interpolation but the bilinear one."""


@dataclass(frozen=True)
class ModelInfo:
    """What config.json says about a model beside its weights.

    Attributes:
        classes: class names in label order.
        preprocessing: how images are cut and normalised; its ``resize``, ``crop``, ``fit``, ``mean``, ``std`` and
            ``interpolation`` are those of the training, and so is ``max_pixels``.
        model: the network.
        task: the task that the model was trained for; it decides what kind of network the model is.
        knows_token_maps: whether it was written since the tokens of a transformer are a map; see
            :func:`fpcn_dist.models.knows_token_maps`.
    """

    classes: tuple[str, ...]
    preprocessing: DataConfig
    model: ModelConfig
    task: str
    knows_token_maps: bool = True


def save_model(
    run_dir: Path,
    model: Classifier,
    recipe: Recipe,
    classes: Sequence[str],
    *,
    evaluation: Evaluation | None = None,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write model.safetensors, config.json and the model card to ``run_dir``; each appears whole or not at all.

    Args:
        run_dir: the run folder; must exist.
        model: the bare network with the weights to save, on any device and in any memory format.
        recipe: the recipe that it was trained with.
        classes: class names in label order.
        evaluation: results for the model card, where there are any yet.
        origin: the run that it comes from (:meth:`fpcn_dist.runs.folder.RunFolder.origin`), where it is one's.

    Raises:
        UserError: the folder cannot be written to.
    """
    run_dir = Path(run_dir)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(run_dir / WEIGHTS, state, {"format": "pt"})
    config = {
        "format": _FORMAT,
        "fpcn_dist_version": __version__,
        "architectures": [type(model).__name__],
        "task": recipe.task,
        "model": recipe.model.model_dump(),
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
        "preprocessing": recipe.data.model_dump(include={"resize", "crop", "fit", "max_pixels", "on_bad_image"})
        | recipe.data.preprocessing.model_dump(),
    }
    if origin is not None:
        config["origin"] = dict(origin)
    write_text(run_dir / CONFIG, json.dumps(config, indent=2) + "\n")
    write_card(run_dir, recipe, classes, evaluation)


def write_card(
    run_dir: Path, recipe: Recipe, classes: Sequence[str], evaluation: Evaluation | None, probe: Probe | None = None
) -> None:
    """Write README.md, the model card; call it again once there is an evaluation."""
    templates = Environment(
        loader=PackageLoader("fpcn_dist.runs.report", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A JSON string is a YAML string, unless it has pairs of surrogates for characters beyond U+FFFF.
    templates.filters["yaml"] = lambda name: json.dumps(printable(name), ensure_ascii=False)
    templates.filters["cell"] = markdown
    text = templates.get_template("card.md.j2").render(
        recipe=recipe, classes=list(classes), evaluation=evaluation, probe=probe, version=__version__
    )
    write_text(Path(run_dir) / CARD, text)


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Classifier, ModelInfo]:
    """Rebuild the model that :func:`save_model` wrote, in evaluation mode; touches no network.

    Raises:
        UserError: no such folder, no model in it, a config.json of something else, or weights that do not fit it.
    """
    folder = Path(folder)
    info = load_info(folder)
    # The weights file replaces pretrained ones, which may not even be reachable here.
    offline = info.model.changed(pretrained=False)
    model = build_model(offline, len(info.classes), task=info.task)
    if model.backbone.ends_in_tokens and not info.knows_token_maps:
        raise UserError("model", folder / CONFIG, CLASS_TOKEN, "train it again, or use the version that wrote it")
    _load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), info


def describes_model(folder: Path) -> bool:
    """Whether there is a config.json in ``folder`` that this project wrote."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "fpcn_dist_version" in config


def load_info(folder: Path) -> ModelInfo:
    """What config.json says of the model in ``folder``, whose weights are not read.

    Raises:
        UserError: no such folder, no model in it, a config.json of something else, or a model of another run than the
            one that recipe.yaml and manifest.json beside it describe.
    """
    if not folder.is_dir():
        raise UserError("model", folder, "there is no such folder", "give the run folder of a finished training")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                "model", folder, f"holds no {name}", "give a run folder whose training ended, or export a checkpoint"
            )
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("model", path, f"is not JSON ({error})", "export the model again") from None
    if not isinstance(config, dict) or "fpcn_dist_version" not in config:
        raise UserError("model", path, "was not written by fpcn_dist", "give a folder that fpcn_dist has exported")
    if config.get("format") not in _READABLE:
        version = config["fpcn_dist_version"]
        reason = f"has format {config.get('format')} (fpcn_dist {version}), not {_FORMAT} (fpcn_dist {__version__})"
        raise UserError("model", path, reason, f"install fpcn_dist {version}, or export the model again")
    _require_same_origin(folder, config.get("origin"))
    try:
        return _parse_info(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__} {error}"
        raise UserError("model", path, f"is damaged ({detail})", "export the model again") from error


def _require_same_origin(folder: Path, origin: Any) -> None:
    """Refuse a model beside the recipe or the images of another run, whose sizes and split are not its own."""
    found = RunFolder(folder).origin()
    if not isinstance(origin, dict) or found is None or found == origin:
        return
    other = " and ".join(name for name in found if found[name] != origin.get(name))
    reason = f"is of another run than the {other} beside it"
    raise UserError(
        "model", folder, reason, "put the files of one run together (what was there before is in previous/)"
    )


def _parse_info(config: dict[str, Any]) -> ModelInfo:
    labels = config["id2label"]
    preprocessing = config["preprocessing"]
    if config["task"] not in get_args(Task):
        raise ValueError(f"unknown task {config['task']!r}")
    return ModelInfo(
        classes=tuple(labels[str(index)] for index in range(len(labels))),
        preprocessing=DataConfig(
            resize=preprocessing["resize"],
            crop=preprocessing["crop"],
            fit=preprocessing.get("fit", "squeeze"),  # as before there was a choice
            max_pixels=preprocessing.get("max_pixels", DataConfig().max_pixels),  # which was not written either
            on_bad_image=preprocessing.get("on_bad_image", "skip"),
        ).settled(Preprocessing.recorded(preprocessing)),
        model=ModelConfig.model_validate(config["model"]),
        task=config["task"],
        knows_token_maps=knows_token_maps(config["model"]),
    )


def _load_weights(model: Classifier, path: Path) -> None:
    """Copy the tensors of ``path`` into ``model`` after checking every name and shape."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError("model", path, f"is not a safetensors file ({error})", "export the model again") from None
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected.keys() - state.keys()]
    faults += [f"{name} is unknown" for name in state.keys() - expected.keys()]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        reason = f"does not fit the network that {CONFIG} describes: {shown}"
        raise UserError("model", path, reason, "put both files of one export together")
    model.load_state_dict(state)


def export_safetensors(run_dir: Path, output: Path | None = None) -> list[Path]:
    """Copy model.safetensors, config.json and the model card (the Hugging Face layout) to ``output``.

    Args:
        run_dir: a run folder, or any folder of :func:`fpcn_dist.runs.model_folder.save_model`.
        output: folder to write, made if missing; by default the run folder, which has that layout already.

    Returns:
        The files in ``output``.

    Raises:
        UserError: no model in the folder, or nothing can be written to ``output``.
    """
    run_dir, output = Path(run_dir), Path(output or run_dir)
    load_model(run_dir)
    names = [name for name in (WEIGHTS, CONFIG, CARD) if (run_dir / name).is_file()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--output", output, str(error.strerror).lower(), "choose another folder") from None
    if output.resolve() != run_dir.resolve():
        for name in names:
            with replacing(output / name) as temporary:
                shutil.copyfile(run_dir / name, temporary)
    return [output / name for name in names]
