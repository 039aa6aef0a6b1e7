"""Installation of the `dinov2` package: `pip install -e .[dev]`; `conda.yaml` pins the same versions."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIREMENTS = [
    "torch>=2.10",
    "torchvision>=0.25",
    "omegaconf>=2.3,<2.5",
    "fvcore>=0.1.5.post20221221",  # part of DINOv2's environment; its FLOP counter serves users' scripts
    "submitit>=1.5",
    "numpy>=1.26",
    "pillow>=10.3",
    "pyyaml>=6.0",
    "safetensors>=0.5",
]

EXTRAS = {
    "cuda": ["xformers>=0.0.35"],
    "eval": ["scikit-learn>=1.5"],
    "slides": ["openslide-python>=1.4", "openslide-bin>=4.0", "scipy>=1.13", "h5py>=3.10"],
    "shards": ["pyarrow>=16"],
    "onnx": ["onnx>=1.17", "onnxscript>=0.7"],
    "hub": ["huggingface_hub>=0.34"],
    "tracking": ["tensorboard>=2.16", "wandb>=0.18"],
    "lora": ["peft>=0.18"],  # 0.17 cannot be imported beside transformers 5
}
EXTRAS["dev"] = [
    *EXTRAS["eval"],
    *EXTRAS["slides"],
    *EXTRAS["shards"],
    *EXTRAS["onnx"],
    *EXTRAS["hub"],
    *EXTRAS["lora"],
    *EXTRAS["tracking"],
    "onnxruntime>=1.20",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "tiffslide>=2.4",
    "tifffile>=2024.1",
    "imagecodecs>=2024.1",
    "scikit-image>=0.24",
    "webdataset>=0.2.100",
    "timm>=1.0.20",
    "transformers>=4.56",
    "ruff>=0.8",
]

setup(
    name="dinov2",
    version="0.0.1",
    description="DINOv2 self-supervised training, adapted to histopathology slides",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dinov2", "dinov2.*"]),
    package_data={"dinov2": ["configs/**/*.yaml", "configs/*.yaml"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
