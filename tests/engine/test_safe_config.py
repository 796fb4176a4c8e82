# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Configs run no code of their files, and are what Detectron2 reads."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import read_config

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path(model_zoo.__file__).with_name("configs")
CONFIGS = sorted(str(p) for folder in (ROOT / "configs", ZOO) for p in folder.rglob("*.yaml"))
TAGS = {
    "apply": "!!python/object/apply:os.mkdir [{marker!r}]",
    "apply with keywords": "!!python/object/apply:os.mkdir {{args: [{marker!r}]}}",
    "apply eval": "!!python/object/apply:eval [\"__import__('os').mkdir({marker!r})\"]",
    "new": "!!python/object/new:os.mkdir [{marker!r}]",
    "new with state": (
        "!!python/object/new:str {{args: [], state: !!python/object/apply:os.mkdir [{marker!r}]}}"
    ),
    "in a list": "[1, !!python/object/apply:os.mkdir [{marker!r}]]",
    "a key": "{{? !!python/object/apply:os.mkdir [{marker!r}] : 1}}",
    "full tag": "!<tag:yaml.org,2002:python/object/apply:os.mkdir> [{marker!r}]",
    "an anchor": "[&a !!python/object/apply:os.mkdir [{marker!r}], *a]",
    "module": "!!python/module:module_that_makes_a_file ''",
    "name": "!!python/name:module_that_makes_a_file.x ''",
}


def read(path: Path | str, *options: str) -> CfgNode:
    return read_config(Namespace(config_file=str(path), opts=list(options)))


def read_by_detectron2(path: Path | str) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(Path(path).parts[-2:]))
def test_configs_are_what_detectron2_reads(path: str) -> None:
    expected = read_by_detectron2(path)
    assert read(path, "MODEL.DEVICE", expected.MODEL.DEVICE).dump() == expected.dump()


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `TAGS` make; the module that two of them name makes it when it is imported."""
    path = tmp_path / "marker"
    (tmp_path / "module_that_makes_a_file.py").write_text(f"open({str(path)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "module_that_makes_a_file", raising=False)
    return path


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_tags_are_not_run(name: str, inherited: bool, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"VERSION: 2\nDATASETS:\n  TRAIN: {TAGS[name].format(marker=str(marker))}\n")
    config = path
    if inherited:
        config = tmp_path / "config.yaml"
        config.write_text("_BASE_: [evil.yaml]\nSEED: 1\n")
    message = r"evil\.yaml, line 3: !!python/\S+ is not loaded"
    with pytest.raises(ValueError, match=message) as error:
        read(config)
    assert "\n" not in str(error.value) and not marker.exists()
    with contextlib.suppress(Exception):  # of the value that the tag returns, after it has run
        read_by_detectron2(config)
    assert marker.exists()


def test_only_configs_where_detectron2_is_installed_may_have_tags(tmp_path, monkeypatch) -> None:
    installed = ZOO / "Base-RetinaNet.yaml"
    (tmp_path / "link.yaml").symlink_to(installed)
    (tmp_path / "copy.yaml").write_text(installed.read_text())
    for base, loads in (("link", True), (installed.with_suffix(""), True), ("copy", False)):
        (tmp_path / "config.yaml").write_text(f"_BASE_: {base}.yaml\n")
        if loads:
            sizes = read(tmp_path / "config.yaml").MODEL.ANCHOR_GENERATOR.SIZES
            assert len(sizes) == 5 and sizes[0][0] == 32
        else:
            with pytest.raises(ValueError, match=r"copy\.yaml, line 8: !!python/object/apply:eval"):
                read(tmp_path / "config.yaml")
    outside = tmp_path / "outside.yaml"
    outside.write_text(f"_BASE_: {ZOO}/../../../../../../../../../../..{tmp_path}/copy.yaml\n")
    with pytest.raises(ValueError, match="is not loaded"):
        read(outside)


@pytest.mark.parametrize("value", ["__import__('os').mkdir({!r})", "!!python/name:os.mkdir {!r}"])
def test_values_of_the_command_line_are_not_run(value: str, tmp_path: Path) -> None:
    path = ROOT / "configs/Shapes/rfcn_slim_plain.yaml"
    value = value.format(str(tmp_path / "marker"))
    assert value == read(path, "OUTPUT_DIR", value).OUTPUT_DIR
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR"):
        read(path, "SOLVER.BASE_LR", value)
    assert not (tmp_path / "marker").exists()


def test_repeated_keys_are_a_warning(tmp_path: Path, caplog) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "SOLVER: {MAX_ITER: 7}\nVERSION: 2\n"
        "MODEL: &model\n  MASK_ON: true\n  MASK_ON: false\n"
        "SOLVER:\n  BASE_LR: 0.5\n"
    )
    cfg = read(path)
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.SOLVER.MAX_ITER != 7 and not cfg.MODEL.MASK_ON
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: SOLVER in line 1 has no effect, since line 6 has it again",
        f"{path}: MASK_ON in line 4 has no effect, since line 5 has it again",
    ]
