"""The folders of this repository are the package: kernels/rms_norm.py is hotlap.kernels.rms_norm.

No folder has an __init__.py. A regular package named `kernels` at the top of sys.path would hide the Hugging
Face package of that name, and break `import transformers`; a plain folder does not.
"""

from setuptools import setup

FOLDERS = (
    "bench",
    "common",
    "kernels",
    "kernels.cpu",
    "model",
    "train",
    "train.data",
    "train.data.tasks",
    "train.distributed",
    "train.evaluation",
    "train.optim",
    "train.run",
    "train.speedruns",
    "train.studies",
)

setup(
    package_dir={"hotlap": "."},
    packages=["hotlap", *(f"hotlap.{folder}" for folder in FOLDERS)],
    package_data={"hotlap.kernels": ["tuned/*.json"], "hotlap.kernels.cpu": ["*.c", "*.h"]},
)
