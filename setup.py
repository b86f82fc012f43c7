"""What is installed, and from which versions on? The tested versions are in constraints.txt."""

from setuptools import find_namespace_packages, setup

TRITON_PLATFORMS = (
    "sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
)

setup(
    name="sparse-moe-lm",
    # Below 0.18 always: `transformers` takes an installed module `kernels` for the Hugging Face
    # package of that name, and uses it from that version on.
    version="0.1.0",
    description="Sparse Mixture-of-Experts language models: Triton kernels, training, experiments",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=["kernels", "kernels.*", "moe", "moe.*", "train", "train.*"]
    ),
    package_data={
        "kernels": ["tiles.json", "results/*.json"],
        "train": ["report_template.html", "report_*.js"],
    },
    install_requires=[
        "torch>=2.11",
        f"triton>=3.6; {TRITON_PLATFORMS}",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=4",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "pyarrow>=17",
        "pydantic>=2.10",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "hypothesis>=6.100",
            "mypy>=1.15",
            "packaging>=24",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "transformers>=5",
            "types-PyYAML",
        ],
        "evaluation": ["lm-eval>=0.4.9", "transformers>=5"],
    },
)
