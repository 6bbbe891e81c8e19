"""The folders of this repository are the package: kernels/rms_norm.py is hotlap.kernels.rms_norm.

No folder has an __init__.py. A regular package named `kernels` at the top of sys.path would hide the Hugging
Face package of that name, and break `import transformers`; a plain folder does not.
"""

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = (
    "bench",
    "common",
    "kernels",
    "kernels.cpu",
    "model",
    "serve",
    "serve.terminal",
    "train",
    "train.data",
    "train.data.tasks",
    "train.distributed",
    "train.evaluation",
    "train.optim",
    "train.rewards",
    "train.run",
    "train.speedruns",
    "train.studies",
)


class BuildWithoutTests(build_py):
    """Leaves out this file and tests, which are beside the modules of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [row for row in found if row[1] != "setup" and not row[1].startswith("test_")]


setup(
    cmdclass={"build_py": BuildWithoutTests},
    package_dir={"hotlap": "."},
    packages=["hotlap", *(f"hotlap.{folder}" for folder in FOLDERS)],
    package_data={
        "hotlap": ["py.typed"],
        "hotlap.kernels": ["tuned/*.json"],
        "hotlap.kernels.cpu": ["*.c", "*.h"],
        "hotlap.serve": ["blocklist-example.txt"],
        "hotlap.train.speedruns": ["shapes.json"],
    },
)
