"""Export the model of a finished run for use elsewhere: ONNX, optionally in 8-bit integers, or safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fpcn_dist.recipe import command_line
from fpcn_dist.runtime.errors import UserError
from fpcn_dist.runtime.names import printable


@dataclass(frozen=True)
class Args:
    """Export the model in RUN; what onnxruntime computes is compared with PyTorch before anything is written."""

    run: tyro.conf.Positional[Path]
    """Run folder of train.py, or any folder with its model.safetensors and config.json."""
    format: Literal["onnx", "safetensors"] = "onnx"
    """model.onnx for predict.py on machines without PyTorch, or the Hugging Face layout."""
    int8: bool = False
    """With onnx: also model-int8.onnx, about a quarter of the size, calibrated on training images."""
    output: Path | None = None
    """Folder to write; default: RUN."""
    data: command_line.Data | None = None
    """The image folder, if it has moved since the training."""


def main() -> None:
    args = command_line.parse(Args)
    if args.format == "onnx":
        try:
            from fpcn_dist.deploy.onnx_export import export_onnx
        except ModuleNotFoundError as error:
            reason, hint = f"package {error.name} is not installed", "pip install -e '.[export]'"
            raise UserError("--format", "onnx", reason, hint) from None
        export_onnx(args.run, int8=args.int8, output=args.output, data=args.data)
        return
    if args.int8:
        raise UserError("--int8", None, "only ONNX models are quantised", "leave it out, or use --format onnx")
    from fpcn_dist.runs.model_folder import export_safetensors

    print("\n".join(map(printable, export_safetensors(args.run, args.output))))


if __name__ == "__main__":
    command_line.run(main)
