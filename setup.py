"""Installs two packages: `zeroi2v` (the library) and `zeroi2v_kernels` (its GPU ops)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="zeroi2v",
    version="0.1.0",
    description="Adapt a frozen image transformer to video at zero inference cost",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["zeroi2v*"]) + find_packages("kernels"),
    package_dir={"zeroi2v_kernels": "kernels/zeroi2v_kernels"},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "einops>=0.8",
        "safetensors>=0.5",
        "huggingface_hub>=0.30",
        "pyyaml>=6",
        "tqdm>=4.66",
        "av>=15",
        "matplotlib>=3.8",
        "pillow",
    ],
    extras_require={
        "train": [
            "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
            "deepspeed>=0.19",
            "tensorboard>=2.16",
            "jinja2>=3",
            "psutil",
        ],
        "export": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        "gpu": [
            "nvidia-dali-cuda130>=2.4; platform_system == 'Linux'",
            "triton>=3.6",
            "flash-attn>=2.7",
        ],
        "dev": [
            "triton>=3.6",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "opencv-python-headless>=4.10",
            "ruff>=0.9",
            "transformers>=4.50",
            "regex",
            "ftfy",
        ],
    },
    entry_points={"console_scripts": ["zeroi2v=zeroi2v.cli:main"]},
)
