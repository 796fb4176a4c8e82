# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Install Detectron2 0.6 into the environment of the Python that runs this.

    python tools/get_detectron2.py [--force]

Detectron2 is not on PyPI under its own name; its release 0.6 is, as the source distribution
`pb1-detectron2`. This script downloads it by hash, edits it to run with current NumPy, Pillow and
setuptools, and installs it without its dependencies, under its own name. If a Detectron2 can be
imported already, it does nothing. The environment needs PyTorch, setuptools and wheel.

The distribution contains no C++ sources, so there is no `detectron2._C`: rotated boxes and
Detectron2's own deformable convolution on CUDA do not work. dcn_plugin uses neither.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NAME = "pb1-detectron2"
VERSION = "0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# pip 26.3 rejects the metadata of the distribution (an extra with a URL), so this one downloads it.
PIP = "pip==25.3"
PIP_SHA256 = "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd"


class Edit(NamedTuple):
    """A replacement in a file, and how often the old text must occur there."""

    file: str
    old: str
    new: str
    count: int = 1


IMPORT_C = "from detectron2 import _C\n"
TRY_IMPORT_C = """try:
    from detectron2 import _C
except ImportError:  # this build has no compiled ops
    _C = None
"""

EDITS = (
    Edit("setup.py", f'name="{NAME}"', 'name="detectron2"'),
    Edit("setup.py", "ext_modules=get_extensions(),", ""),  # layers/csrc is missing
    Edit("setup.py", "get_model_zoo_configs()}", '["configs/**/*.yaml", "configs/**/*.py"]}'),
    Edit("setup.py", '"black==21.4b2",', ""),  # only LazyConfig.to_py uses it
    Edit("setup.py", '"future",  # used by caffe2', ""),
    Edit("setup.py", '"pydot",  # used to save caffe2 SVGs', ""),
    # NumPy 1.24 and Pillow 10 removed these names.
    Edit("detectron2/data/build.py", "np.int)", "int)"),
    Edit("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n"),
    Edit("detectron2/data/datasets/pascal_voc.py", "np.str)", "str)"),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Edit("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # The fast evaluation is compiled; that of pycocotools computes the same.
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        "COCOeval_opt = COCOeval",
    ),
    Edit("detectron2/layers/deform_conv.py", IMPORT_C, TRY_IMPORT_C),
    Edit("detectron2/layers/roi_align_rotated.py", IMPORT_C, TRY_IMPORT_C),
    Edit("detectron2/layers/rotated_boxes.py", IMPORT_C, TRY_IMPORT_C),
    Edit("detectron2/export/__init__.py", "from .api import *\n", ""),  # needs caffe2
    # setuptools 82 removed pkg_resources.
    Edit("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        "pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )",
        'os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
)


class InstallError(Exception):
    """Detectron2 cannot be installed."""


def installed_version() -> str | None:
    """Returns the version of the Detectron2 that can be imported, or None."""
    probe = [sys.executable, "-c", "import detectron2; print(detectron2.__version__)"]
    # In another process, so that a failed import leaves nothing behind.
    done = subprocess.run(probe, capture_output=True, text=True, cwd=tempfile.gettempdir())
    return done.stdout.strip() if done.returncode == 0 else None


def apply_edits(root: Path, edits: tuple[Edit, ...] = EDITS) -> None:
    """Applies the edits to the unpacked distribution.

    Args:
        root: The folder of its setup.py.
        edits: The replacements; each must find its text exactly `count` times.
    """
    for edit in edits:
        path = root / edit.file
        if not path.is_file():
            raise InstallError(f"{edit.file} is not in the distribution: is it {NAME} {VERSION}?")
        text = path.read_text(encoding="utf-8")
        count = text.count(edit.old)
        if count != edit.count:
            raise InstallError(
                f"{edit.file}: expected {edit.count} times, found {count} times, the text "
                f"{edit.old!r}: is it {NAME} {VERSION}, unedited?"
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def run_pip(task: str, *arguments: str, pip: Path | None = None) -> None:
    """Runs pip; raises InstallError with its output if it fails.

    Args:
        task: What pip does, for the error message.
        arguments: The arguments of pip.
        pip: A folder with another pip than this environment's.
    """
    environment = dict(os.environ)
    if pip is not None:
        environment["PYTHONPATH"] = str(pip)
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise InstallError(f"{task} failed:\n{done.stdout.strip()}")


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the distribution; returns the folder of its setup.py."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PIP} --hash=sha256:{PIP_SHA256}\n")
    old_pip = folder / "pip"
    arguments = ["--quiet", "--no-deps", "--require-hashes", "-r", str(wanted)]
    run_pip(f"Downloading {PIP}", "install", "--target", str(old_pip), *arguments)
    wanted.write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n")
    arguments += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    run_pip(f"Downloading {NAME} {VERSION}", "download", *arguments, pip=old_pip)
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise InstallError(f"Downloading {NAME} {VERSION} left {len(archives)} archives, not one")
    shutil.unpack_archive(archives[0], folder / "sources")
    return next((folder / "sources").iterdir())


def install() -> None:
    """Downloads, edits and installs Detectron2."""
    for package in ("torch", "setuptools", "wheel"):
        if importlib.util.find_spec(package) is None:
            raise InstallError(f"{package} is missing in {sys.prefix}: install it first")
    with tempfile.TemporaryDirectory() as temporary:
        sources = fetch(Path(temporary))
        apply_edits(sources)
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
        run_pip("Installing Detectron2", "install", *options, str(sources))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="reinstall even if it is installed")
    options = parser.parse_args(arguments)
    present = None if options.force else installed_version()
    if present is not None:
        print(f"Detectron2 {present} is already installed")
        return 0
    try:
        install()
    except InstallError as error:
        print(f"get_detectron2.py: {error}", file=sys.stderr)
        return 1
    print(f"Detectron2 {VERSION} is installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
