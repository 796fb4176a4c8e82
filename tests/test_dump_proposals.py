# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""dump_proposals.py, and training with the proposals that it writes."""

from __future__ import annotations

import pickle
from pathlib import Path

import dump_proposals
import numpy as np
import pytest
import torch

from detectron2.modeling import build_model

from tests.modeling.networks import network_config
from tests.test_train_net import detections, run


def saved_network(network: str, folder: Path) -> tuple[str, str]:
    """Writes the config and random weights of a model; returns both paths."""
    cfg = network_config(network, deformable=True, classes=2)
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.DATALOADER.NUM_WORKERS = 0
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save(build_model(cfg).state_dict(), folder / "model.pth")
    return str(folder / "config.yaml"), str(folder / "model.pth")


def test_precomputed_proposals_train_a_detector(tiny_coco, tmp_path, capsys) -> None:
    config, weights = saved_network("rfcn", tmp_path)
    file = tmp_path / "new" / f"{tiny_coco}.pkl"
    words = ["--config-file", config, "--dataset", tiny_coco, "--output", str(tmp_path / "new")]
    dump_proposals.main([*words, "MODEL.WEIGHTS", weights])
    found = pickle.loads(file.read_bytes())
    assert len(found["ids"]) == 4 and f"{file}: " in capsys.readouterr().out
    for boxes, scores in zip(found["boxes"], found["objectness_logits"], strict=True):
        assert 0 < len(boxes) == len(scores) <= 40
        assert (np.diff(scores) <= 0).all() and boxes.min() >= 0 and boxes.max() <= 96

    fixed = {
        "MODEL.LOAD_PROPOSALS": True,
        "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
        "DATASETS.PROPOSAL_FILES_TRAIN": f"('{file}',)",
        "DATASETS.PROPOSAL_FILES_TEST": f"('{file}',)",
    }
    run(tiny_coco, tmp_path / "output", **fixed)
    assert detections(tmp_path / "output")


@pytest.mark.parametrize(
    ("network", "more", "message"),
    [
        ("deeplab", [], "an RPN or a two-stage model, got a DeepLab"),
        ("ca_rpn", [], "an RPN or a two-stage model, got a CategoryAwareRPN"),
        ("rfcn", ["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS must name the weights"),
        ("rfcn", ["MODEL.WEIGHTS", "nowhere.pth"], "got 'nowhere.pth'"),
        ("rfcn", ["MODEL.LOAD_PROPOSALS", "True"], "LOAD_PROPOSALS must be False"),
    ],
)
def test_wrong_arguments_are_one_line_errors(tiny_coco, tmp_path, network, more, message) -> None:
    config, weights = saved_network(network, tmp_path)
    words = ["--config-file", config, "--dataset", tiny_coco, "--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match=f"dump_proposals: .*{message}"):
        dump_proposals.main([*words, "MODEL.WEIGHTS", weights, *more])
    assert not (tmp_path / "new").exists()


def test_an_unknown_data_set_is_an_error(tmp_path) -> None:
    config, weights = saved_network("rfcn", tmp_path)
    words = ["--config-file", config, "--dataset", "nothing", "--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match=r"DATASETS\.TEST must be registered, got 'nothing'"):
        dump_proposals.main([*words, "MODEL.WEIGHTS", weights])
