# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Wrappers of models that take and return tensors, for `torch.onnx.export` and `torch.export`.

They share the parameters of the meta-architecture that they are made from. Their images are raw
pixels in the order of channels of INPUT.FORMAT, padded to one size with MODEL.PIXEL_MEAN, which is
zero after normalization as in Detectron2's padding. They use no `ImageList` or `Instances`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import batched_nms
from detectron2.modeling import SemanticSegmentor

from dcn_plugin.ops._common import emits_onnx_nodes

from .meta_arch import CategoryAwareRPN

"""
Shape shorthand in this module:

    N: images, C: classes without background, R: anchors per image
    K: boxes that go to the non-maximum suppression, D: detections per image
"""


class ExportableBackbone(nn.Module):
    """The backbone of a model, with the normalization of its images."""

    MODELS: tuple[type, ...] = (nn.Module,)

    def __init__(self, model: nn.Module) -> None:
        """Makes the module, which shares the model's parameters.

        Args:
            model: a meta-architecture in evaluation mode.

        Raises:
            ValueError: if the model is in training mode.
            TypeError: if it is of a class that the module is not for.
        """
        super().__init__()
        if not isinstance(model, self.MODELS):
            names = " or ".join(kind.__name__ for kind in self.MODELS)
            raise TypeError(f"{type(self).__name__} is for a {names}, got a {type(model).__name__}")
        if model.training:
            raise ValueError(
                f"{type(self).__name__}: the model must be in evaluation mode: model.eval()"
            )
        self.training = False
        self.backbone = model.backbone
        self.register_buffer("pixel_mean", model.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", model.pixel_std, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the feature maps.

        Args:
            images: Tensor[N, 3, H, W]. With an FPN, H and W are multiples of its size divisibility.

        Returns:
            the feature maps by name.
        """
        return self.backbone((images - self.pixel_mean) / self.pixel_std)


class ExportableSegmentor(ExportableBackbone):
    """`DeepLab`, or another `SemanticSegmentor`."""

    MODELS = (SemanticSegmentor,)

    def __init__(self, model: SemanticSegmentor) -> None:
        """Makes the module.

        Args:
            model: the meta-architecture, in evaluation mode.
        """
        super().__init__(model)
        self.sem_seg_head = model.sem_seg_head

    def forward(self, images: Tensor) -> Tensor:
        """Computes the scores of each pixel.

        Args:
            images: Tensor[N, 3, H, W].

        Returns:
            Tensor[N, classes, H, W], logits, or probabilities if the head returns them.
        """
        scores, _ = self.sem_seg_head(super().forward(images))
        # Not a slice, for which torch.export guards the sizes of the example.
        for axis in (2, 3):
            index = torch.arange(images.shape[axis], device=scores.device)
            scores = scores.index_select(axis, index)
        return scores


class ExportableCategoryAwareRPN(ExportableBackbone):
    """`CategoryAwareRPN`, with a fixed number of detections."""

    MODELS = (CategoryAwareRPN,)

    def __init__(self, model: CategoryAwareRPN, nms: bool = True) -> None:
        """Makes the module.

        Args:
            model: the meta-architecture, in evaluation mode.
            nms: whether to apply the non-maximum suppression. In ONNX it is NonMaxSuppression, and
                needs a PyTorch that has `torch.onnx.ops`; `torch.export` cannot trace it. Without
                it the module returns its inputs.
        """
        super().__init__(model)
        self.detector = model.proposal_generator
        self.nms = nms

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Computes the detections.

        Args:
            images: Tensor[N, 3, H, W].
            image_sizes: Tensor[N, 2], (height, width) without padding, to which boxes are clipped.
                By default (H, W).

        Returns:
            boxes Tensor[N, D, 4] (x1, y1, x2, y2), scores Tensor[N, D], classes Tensor[N, D] and
            the number of detections Tensor[N], in the order of their scores; the rows after them
            are zeros. Without non-maximum suppression: boxes Tensor[N, K, 4] and probabilities of
            the classes Tensor[N, K, C], sorted per level by the highest class probability.
        """
        boxes, scores = self.candidates(images, image_sizes)
        if not self.nms:
            return boxes, scores
        select = self._select_onnx if emits_onnx_nodes() else self._select
        scores = torch.where(select(boxes, scores), scores, 0).flatten(1)  # (N, K, C) -> (N, K*C)
        # Padded, so that there are always enough scores.
        scores = F.pad(scores, (0, self.detector.detections_per_image))
        scores, index = scores.topk(self.detector.detections_per_image)
        found = scores > 0
        classes = torch.where(found, index % self.detector.num_classes, 0)
        row = torch.where(found, index // self.detector.num_classes, 0)
        boxes = _gather_rows(boxes, row) * found[..., None]
        return boxes, scores, classes, found.sum(dim=1)

    def candidates(self, images: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the `pre_nms_topk` boxes of each level with the best class.

        Args:
            images: as in `forward`.
            image_sizes: as in `forward`.

        Returns:
            boxes Tensor[N, K, 4] and probabilities Tensor[N, K, C]; 0 for boxes that are empty or
            not finite, and where there are fewer boxes.
        """
        detector = self.detector
        maps = super().forward(images)
        features = [maps[name] for name in detector.in_features]
        logits, deltas = detector.rpn_head(features)
        box_dim = detector.anchor_generator.box_dim
        decoded = detector._decode_proposals(
            detector.anchor_generator(features), [_by_anchor(level, box_dim) for level in deltas]
        )
        levels = [
            self._top_boxes(
                _clip(boxes, images, image_sizes),
                _by_anchor(level, detector.num_classes + 1).float().softmax(dim=-1)[..., :-1],
            )
            for boxes, level in zip(decoded, logits, strict=True)
        ]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))

    def _top_boxes(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the boxes of a level for the non-maximum suppression, and their scores.

        Args:
            boxes: Tensor[N, R, 4].
            scores: Tensor[N, R, C].
        """
        size = boxes[..., 2:] - boxes[..., :2]
        valid = (size > self.detector.min_box_size).all(-1) & scores.isfinite().all(-1)
        valid = (valid & boxes.isfinite().all(-1))[..., None]
        # Padded, so that there are always enough rows.
        count = self.detector.pre_nms_topk[False]
        boxes = F.pad(torch.where(valid, boxes, 0), (0, 0, 0, count))
        scores = F.pad(torch.where(valid, scores, 0), (0, 0, 0, count))
        best = scores.amax(dim=-1).topk(count).indices
        return _gather_rows(boxes, best), _gather_rows(scores, best)

    def _select(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Returns which scores are above the threshold and not suppressed, Tensor[N, K, C]."""
        selected = torch.zeros_like(scores, dtype=torch.bool)
        for image, above in enumerate(scores > self.detector.score_thresh):
            row, category = above.nonzero(as_tuple=True)
            image_boxes, image_scores = boxes[image, row], scores[image, row, category]
            threshold = self.detector.detection_nms_thresh
            kept = batched_nms(image_boxes, image_scores, category, threshold)
            selected[image, row[kept], category[kept]] = True
        return selected

    def _select_onnx(self, boxes: Tensor, scores: Tensor) -> Tensor:
        """Returns the same by an ONNX NonMaxSuppression, at most D boxes per class."""
        detector = self.detector
        settings = (
            torch.tensor([detector.detections_per_image]),
            torch.tensor([detector.detection_nms_thresh]),
            torch.tensor([detector.score_thresh]),
        )
        # The number of selected boxes depends on the values, as that of nonzero does.
        above = scores > detector.score_thresh
        selected = torch.onnx.ops.symbolic(
            "NonMaxSuppression",
            (boxes, scores.transpose(1, 2), *settings),
            {"center_point_box": 0},
            dtype=torch.int64,
            shape=above.nonzero().shape,
            version=11,
        ).to(boxes.device)
        image, category, row = selected.unbind(1)
        true = torch.ones_like(image, dtype=torch.bool)
        return torch.zeros_like(above).index_put((image, row, category), true)


def _by_anchor(level: Tensor, values: int) -> Tensor:
    """Returns the predictions of each anchor, (N, A * values, Hi, Wi) -> (N, Hi*Wi*A, values)."""
    return level.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _clip(boxes: Tensor, images: Tensor, image_sizes: Tensor | None) -> Tensor:
    """Clips boxes Tensor[N, R, 4] to the images."""
    boxes = boxes.clamp(min=0)
    if image_sizes is not None:
        limits = image_sizes.flip(1).repeat(1, 2).to(boxes.dtype)  # width, height, width, height
        return torch.minimum(boxes, limits[:, None])
    height, width = images.shape[2:]
    x, y = boxes[..., 0::2].clamp(max=width), boxes[..., 1::2].clamp(max=height)
    return torch.stack([x, y], dim=-1).flatten(-2)  # (N, R, 2, 2) -> (N, R, 4)


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Returns rows by index, (N, R, values) at (N, K) -> (N, K, values)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))
