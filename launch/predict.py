"""Classify photographs with the model of a finished run, and show where it looked; without torch if it is ONNX."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

_VALUED = ("--output", "--max-decoded-mib")
_words = [word for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False) if before not in _VALUED]
_model = next((word for word in _words if not word.startswith("-")), "")

if _model.lower().endswith(".onnx"):
    # A field laptop has neither torch nor what the other commands import.
    def main() -> None:
        try:
            from fpcn_dist.deploy import onnx_predict
            from fpcn_dist.runtime.output import quiet_without_reader
        except ModuleNotFoundError as error:
            hint = "pip install onnxruntime numpy pillow, and in the checkout pip install --no-deps ."
            print(f"error: package {error.name}: is not installed; {hint}", file=sys.stderr)
            sys.exit(2)
        with quiet_without_reader():
            sys.exit(onnx_predict.main(sys.argv[1:]))

else:
    import tyro

    from fpcn_dist.recipe import command_line

    @dataclass(frozen=True)
    class Args:
        """Classify images: prints a table, writes predictions.json, predictions.csv and overlays/*.png."""

        model: tyro.conf.Positional[Path]
        """Run folder of train.py, any folder with its model.safetensors and config.json, or export.py's MODEL.onnx."""
        images: tyro.conf.Positional[tuple[Path, ...]]
        """Image files, and folders to search for them."""
        output: Path = Path("predictions")
        """Folder to write."""
        max_decoded_mib: int = 512
        """MiB of decoded images to hold at once, unless one is larger by itself."""

    def predict_with_torch() -> None:
        args = command_line.parse(Args)
        import torch

        from fpcn_dist.deploy.predict import predict

        device = "cuda" if torch.cuda.is_available() else "cpu"
        predict(args.model, args.images, args.output, device=device, max_decoded_mib=args.max_decoded_mib)

    def main() -> None:
        command_line.run(predict_with_torch)


if __name__ == "__main__":
    main()
