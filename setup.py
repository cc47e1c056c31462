"""Packaging of llama_ds: what it needs to train, and what only some machines need."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).with_name("llama_ds") / "__init__.py"
BESIDE = {  # folders beside the package, and their files that are no modules
    "tools": [],
    "ds_configs": ["*"],
    "hostfiles": ["*"],
    "docs.calibration": ["published_runs.csv"],
}

setup(
    name="llama_ds",
    # Read, not imported: pip runs this file before any dependency is installed.
    version=re.search(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE).group(1),
    description="Pre-training of LLaMA models on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    # What a checkout has beside the package is inside of it in a wheel; llama_ds/shipped.py finds both.
    packages=[*find_packages(include=["llama_ds", "llama_ds.*"]), *(f"llama_ds.{name}" for name in BESIDE)],
    package_dir={f"llama_ds.{name}": name.replace(".", "/") for name in BESIDE},
    package_data={
        "llama_ds.evaluation": ["paper_results.json"],
        "llama_ds.experiments": ["*.css", "*.js"],
        "llama_ds.perf.plan": ["data/*.yaml"],
        **{f"llama_ds.{name}": BESIDE[name] for name in BESIDE},
    },
    entry_points={"console_scripts": ["llama-ds = llama_ds.__main__:main"]},
    install_requires=[
        "deepspeed>=0.19.4,<0.20",  # earlier releases scale pipeline gradients wrongly
        "fsspec>=2024.6",
        "numpy>=2.1",
        "orjson>=3.10",
        "protobuf>=5",  # sentencepiece describes its models with it
        "psutil>=5.9",
        "pyyaml>=6",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",  # gives ids as arrays
        "tiktoken>=0.12,<1",  # Llama 3's tokenizer.model
        "tokenizers>=0.22",
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5,<6",  # only tools/ import it: an export is checked by the library it is for
        "webdataset>=1.0",
        "xxhash>=3.5",
        "zstandard>=0.22",
    ],
    extras_require={
        "eval": ["lm-eval>=0.4.13", "pyarrow>=15"],  # evaluation/lm_eval_model.py; tools/evaluate.py fetch
        "gguf": ["gguf>=0.17"],  # tools/convert.py --to gguf, for llama.cpp
        "gs": ["gcsfs"],
        "ladder": ["matplotlib>=3.10", "scipy>=1.15"],  # tools/ladder.py: the fitted law and its figures
        "gpu": ["flash-attn>=2.8", "nvidia-ml-py"],  # flash-attn compiles for an hour: see CONTRIBUTING.md
        "mlflow": ["mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.13"],  # the latter two for sqlite:// and databases
        "mpi": ["mpi4py>=4"],  # wants an MPI library on the machine: the cluster's own
        "parquet": ["pyarrow>=15"],  # to build shards from parquet files
        "s3": ["s3fs"],
        "tensorboard": ["tensorboard>=2.20"],
        "wandb": ["wandb>=0.31"],  # of which a run can end although the server is gone
        "dev": [
            "gguf>=0.17",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "matplotlib>=3.10",
            "mpi4py>=4",
            "mypy>=2",
            "openmpi>=5; sys_platform == 'linux'",  # brings mpirun for its test, without root
            "pyarrow>=15",
            "pytest>=9",
            "ruff>=0.17",
            "scipy>=1.15",
            "tensorboard>=2.20",
            "types-PyYAML",
            "types-psutil",
        ],
    },
)
