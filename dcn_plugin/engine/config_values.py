# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of the values of config keys before anything is built.

A key is checked only where a component of Detectron2 or of this package reads it: what custom
components do with their keys is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import reduce
from itertools import chain
from typing import Any

import torch

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, SemanticSegmentor, build_backbone
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.meta_arch.rcnn import ProposalNetwork
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator import RPN, RPN_HEAD_REGISTRY
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    CascadeROIHeads,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads
from detectron2.utils.registry import Registry

from dcn_plugin.messages import UserError, got, one_line
from dcn_plugin.modeling import DeformROIHeads, RFCNROIHeads
from dcn_plugin.modeling.backbone.reduced import REDUCED
from dcn_plugin.modeling.model_config_checks import check_features
from dcn_plugin.modeling.proposal_generator import CategoryDetector

from .config_rules import RULES, WARNINGS, Rule, RuleGroups

STOCK = ("detectron2.modeling.", "dcn_plugin.")  # modules whose components read known keys
# What reads IN_FEATURES of which section.
IN_FEATURES = {
    "rpn": "RPN",
    "roi heads": "ROI_HEADS",
    "retinanet": "RETINANET",
    "semantic segmentation": "SEM_SEG_HEAD",
}


def check_values(cfg: CfgNode, training: bool, *, stock_trainer: bool = False) -> None:
    """Checks the values of the keys that Detectron2 and this package read.

    Args:
        cfg: the config; `add_dcn_config` is not needed.
        training: whether the keys of training are read.
        stock_trainer: whether mappers, samplers, schedulers and clipping are built as by
            `DefaultTrainer`.

    Raises:
        UserError: if a value would crash, or the model could not be trained with it.
    """
    groups = list(active_groups(cfg, training, stock_trainer))
    for key, text, value in _violations(cfg, RULES, groups):
        raise UserError(f"{key} must be {text}, got {value!r}")
    for key, text, value in _violations(cfg, WARNINGS, groups):
        logging.getLogger(__name__).warning("%s should be %s, got %r", key, text, value)
    _check_in_features(cfg, groups)


def _violations(
    cfg: CfgNode, rules: RuleGroups, groups: list[str]
) -> Iterator[tuple[str, str, Any]]:
    """Yields key, text and value of each rule of the groups that is violated."""
    for keys, rule in chain.from_iterable(rules[name].items() for name in groups if name in rules):
        for key in keys.split():
            *sections, name = key.split(".")
            node = reduce(CfgNode.__getitem__, sections, cfg)
            if name in node and not _is_valid(rule, node[name], cfg):  # else of another version
                yield key, rule.text, node[name]


def _is_valid(rule: Rule, value: Any, cfg: CfgNode) -> bool:
    try:
        return rule.is_valid(value, cfg)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # another type
        return False


def active_groups(cfg: CfgNode, training: bool, stock_trainer: bool) -> Iterator[str]:
    """Yields the groups of rules for the keys that are read.

    Args:
        cfg: the config.
        training: as in `check_values`.
        stock_trainer: likewise.
    """
    yield "all"
    if training:
        solver = cfg.SOLVER
        yield "training"
        yield from {"WarmupMultiStepLR": ["steps"]}.get(solver.LR_SCHEDULER_NAME, [])
        if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            yield "repeat factors"
        if stock_trainer:
            yield "stock trainer"
        if solver.CLIP_GRADIENTS.ENABLED:
            yield "clipping"
            if stock_trainer:
                yield "stock clipping"
        if solver.AMP.ENABLED:
            yield "amp"
        if cfg.INPUT.CROP.ENABLED:
            yield "crop"
        if cfg.TEST.PRECISE_BN.ENABLED:
            yield "precise bn"
    if cfg.DATASETS.TEST or not training:
        yield "test"
        if cfg.TEST.AUG.ENABLED:
            yield "tta"
    yield from _backbone_groups(cfg)
    architecture = _stock(modeling.META_ARCH_REGISTRY, cfg, "META_ARCHITECTURE")
    if architecture is None:  # custom
        return
    yield "images"
    if stock_trainer:
        yield "stock mapper"
    if issubclass(architecture, (GeneralizedRCNN, RetinaNet)):
        yield "normalization"
    if issubclass(architecture, (GeneralizedRCNN, ProposalNetwork)):
        yield from _detector_groups(cfg, architecture)
    if issubclass(architecture, RetinaNet):
        yield "retinanet"
        if _stock(ANCHOR_GENERATOR_REGISTRY, cfg, "ANCHOR_GENERATOR.NAME"):
            yield "retinanet anchors"
    if issubclass(architecture, SemanticSegmentor):
        yield "broadcast normalization"
    if issubclass(architecture, (SemanticSegmentor, PanopticFPN)):
        head = _stock(modeling.SEM_SEG_HEADS_REGISTRY, cfg, "SEM_SEG_HEAD.NAME")
        if head is not None:
            yield "semantic segmentation"
        if head is SemSegFPNHead:
            yield "sem seg fpn"


def _backbone_groups(cfg: CfgNode) -> Iterator[str]:
    backbone = _stock(modeling.BACKBONE_REGISTRY, cfg, "BACKBONE.NAME")
    name = backbone.__name__ if backbone else ""
    if "resnet" in name:
        yield "backbone"
        yield "resnet"
        yield "deform resnet" if backbone.__module__.startswith("dcn_plugin") else "plain resnet"
        if REDUCED in (cfg.MODEL.RESNETS.OUT_FEATURES or ()):
            yield "reduced"
    if "fpn" in name:
        yield "fpn"


def _detector_groups(cfg: CfgNode, architecture: type) -> Iterator[str]:
    generator = getattr(architecture, "generator", None)  # of CategoryAwareRPN
    if generator is None and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals":
        yield "precomputed proposals"
    elif generator is None:
        generator = _stock(modeling.PROPOSAL_GENERATOR_REGISTRY, cfg, "PROPOSAL_GENERATOR.NAME")
    if generator is not None and issubclass(generator, RPN):
        yield "rpn"
        if generator is not CategoryDetector:
            yield "proposals"
        if _stock(RPN_HEAD_REGISTRY, cfg, "RPN.HEAD_NAME"):
            yield "rpn head"
        if _stock(ANCHOR_GENERATOR_REGISTRY, cfg, "ANCHOR_GENERATOR.NAME"):
            yield "rpn anchors"
            yield "rotated anchors" if issubclass(generator, RRPN) else "upright anchors"
    if generator is CategoryDetector:
        yield "classes"
        yield "detections"
    elif issubclass(architecture, GeneralizedRCNN):
        heads = _stock(modeling.ROI_HEADS_REGISTRY, cfg, "ROI_HEADS.NAME")
        if heads is not None:
            yield from _heads_groups(cfg, heads)


def _heads_groups(cfg: CfgNode, heads: type[ROIHeads]) -> Iterator[str]:
    model = cfg.MODEL
    yield "classes"
    yield "detections"
    yield "roi heads"
    yield "cascade" if issubclass(heads, CascadeROIHeads) else "one stage"
    if issubclass(heads, RFCNROIHeads):
        yield "ohem"
    if not (issubclass(heads, RFCNROIHeads) and model.ROI_HEADS.get("OHEM", 0)):
        yield "roi sampling"
    if issubclass(heads, RROIHeads):
        yield "rotated box pooler"
        yield "rotated proposals"
    elif issubclass(heads, (StandardROIHeads, Res5ROIHeads)):
        yield "box pooler"
        yield "upright proposals"
    if issubclass(heads, (DeformROIHeads, RFCNROIHeads)):
        yield "deform pooler"
    if issubclass(heads, StandardROIHeads) and _stock(
        ROI_BOX_HEAD_REGISTRY, cfg, "ROI_BOX_HEAD.NAME"
    ):
        yield "fc box head"
        if model.ROI_BOX_HEAD.NUM_FC:
            yield "box fcs"
        if model.ROI_BOX_HEAD.NUM_CONV:
            yield "box convs"
    if model.MASK_ON and _stock(modeling.ROI_MASK_HEAD_REGISTRY, cfg, "ROI_MASK_HEAD.NAME"):
        yield "masks"
        if model.ROI_MASK_HEAD.NUM_CONV:
            yield "mask convs"
    if model.KEYPOINT_ON and _stock(
        modeling.ROI_KEYPOINT_HEAD_REGISTRY, cfg, "ROI_KEYPOINT_HEAD.NAME"
    ):
        yield "keypoints"


def _stock(registry: Registry, cfg: CfgNode, key: str) -> Any:
    """Returns the component that a key of MODEL names; None if it is not Detectron2's or ours."""
    name = reduce(CfgNode.__getitem__, key.split("."), cfg.MODEL)
    if name not in registry:
        known = [name for name, _ in registry]
        raise UserError(f"MODEL.{key} must be registered, {got(name, known)}")
    component = registry.get(name)
    return component if component.__module__.startswith(STOCK) else None


def _check_in_features(cfg: CfgNode, groups: list[str]) -> None:
    sections = [IN_FEATURES[name] for name in groups if name in IN_FEATURES]
    if "backbone" not in groups or not sections:
        return
    try:
        with torch.device("meta"):  # computes and allocates nothing
            known = build_backbone(cfg).output_shape()
    except UserError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:  # of Detectron2 and PyTorch
        raise UserError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} cannot be built with these numbers of "
            f"channels and groups in MODEL.RESNETS: {one_line(repr(error))}"
        ) from error
    for section in sections:
        check_features(f"MODEL.{section}.IN_FEATURES", cfg.MODEL[section].IN_FEATURES, known, False)
    if "box pooler" in groups:
        strides = [known[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
        if strides[1:] != [2 * stride for stride in strides[:-1]]:
            raise UserError(
                "MODEL.ROI_HEADS.IN_FEATURES must be features each with twice the stride of the "
                f"one before, got {cfg.MODEL.ROI_HEADS.IN_FEATURES} with the strides {strides}"
            )
