"""The exported model of a run in a folder of its own, without the rest of the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from fpcn_dist.export import CARD, CONFIG, WEIGHTS, load_model
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.files import replacing


def export_safetensors(run_dir: Path, output: Path | None = None) -> list[Path]:
    """Copy model.safetensors, config.json and the model card (the Hugging Face layout) to ``output``.

    Args:
        run_dir: a run folder, or any folder that :func:`fpcn_dist.export.save_model` wrote.
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
