# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The results in the paper's Tables 1, 3 and 5, and those of the authors' release, by config.

`VOC-Detection/rfcn_R_101_dconv3` is that file below configs/.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Names of metrics: task/metric.
DETECTION = ("bbox/AP50", "bbox/AP70")
SEGMENTATION = ("sem_seg/mIoU",)
COCO = ("bbox/AP", "bbox/AP50", "bbox/APs", "bbox/APm", "bbox/APl")
COCO_TTA = tuple(name.replace("bbox", "bbox_TTA") for name in COCO)

COLUMNS = (
    ("DeepLab, VOC", "VOC-Segmentation/deeplab_R_101", SEGMENTATION),
    ("DeepLab, Cityscapes", "Cityscapes-Segmentation/deeplab_R_101", SEGMENTATION),
    ("category-aware RPN", "VOC-Detection/ca_rpn_R_101", DETECTION),
    ("Faster R-CNN", "VOC-Detection/faster_rcnn_R_101", DETECTION),
    ("R-FCN", "VOC-Detection/rfcn_R_101", DETECTION),
)
ROWS = {
    "plain": "plain: atrous (2, 2, 2)",
    "dconv1": "1 deformable convolution",
    "dconv2": "2 deformable convolutions",
    "dconv3": "3 deformable convolutions",
    "dconv6": "6 deformable convolutions",
    "atrous4": "atrous (4, 4, 4)",
    "atrous6": "atrous (6, 6, 6)",
    "atrous8": "atrous (8, 8, 8)",
    "droi": "deformable RoI pooling",
    "dconv3_droi": "3 deformable convolutions and RoI pooling",
}
# In the order of COLUMNS; Table 3 has 75.3 for DeepLab on VOC with three layers, Table 1 75.2.
PAPER = {
    "plain": ((69.7,), (70.4,), (68.0, 44.9), (78.1, 62.1), (80.0, 61.8)),
    "dconv1": ((73.9,), (73.5,), (73.5, 54.4), (78.6, 63.8), (80.6, 63.0)),
    "dconv2": ((74.8,), (74.4,), (74.3, 56.3), (78.5, 63.3), (81.0, 63.8)),
    "dconv3": ((75.2,), (75.2,), (74.5, 57.2), (78.6, 63.3), (81.4, 64.7)),
    "dconv6": ((74.8,), (75.1,), (74.6, 57.7), (78.7, 64.0), (81.5, 65.4)),
    "atrous4": ((73.1,), (71.9,), (72.8, 53.1), (78.6, 63.1), (80.5, 63.0)),
    "atrous6": ((73.6,), (72.7,), (73.6, 55.2), (78.5, 62.3), (80.2, 63.5)),
    "atrous8": ((73.2,), (72.4,), (73.2, 55.1), (77.8, 61.8), (80.3, 63.2)),
    "droi": (None, None, None, (78.3, 66.6), (81.2, 65.0)),
    "dconv3_droi": (None, None, None, (79.3, 66.9), (82.6, 68.5)),
}
TABLES = {
    "1": ("plain", "dconv1", "dconv2", "dconv3", "dconv6"),
    "3": ("plain", "atrous4", "atrous6", "atrous8", "dconv3", "droi", "dconv3_droi"),
}
RELEASED = {
    "VOC-Segmentation/deeplab_R_101_plain": (70.7,),
    "VOC-Segmentation/deeplab_R_101_dconv3": (75.9,),
    "Cityscapes-Segmentation/deeplab_R_101_plain": (70.3,),
    "Cityscapes-Segmentation/deeplab_R_101_dconv3": (75.2,),
    # Trained jointly with the RPN; the paper uses fixed proposals.
    "VOC-Detection/rfcn_R_101_plain_joint": (79.6, 63.1),
    "VOC-Detection/rfcn_R_101_dconv3_droi_joint": (82.3, 67.8),
    "COCO-Detection/rfcn_R_101_plain": (32.1, 54.3, 12.8, 34.9, 46.1),
    "COCO-Detection/rfcn_R_101_dconv3_droi": (35.7, 56.8, 15.2, 38.8, 51.5),
    "COCO-Detection/faster_rcnn_R_101_plain": (30.3, 52.1, 9.9, 32.2, 47.4),
    "COCO-Detection/faster_rcnn_R_101_dconv3_droi": (35.0, 55.0, 14.3, 37.7, 52.0),
}
# Table 5, on COCO test-dev; the multi-scale rows are those of Aligned-Inception-ResNet.
TABLE_5 = {
    "ca_rpn_R_101_plain": ("category-aware RPN, ResNet-101", (23.2, 42.6, 6.9, 27.1, 35.1)),
    "ca_rpn_R_101_dconv3": ("… deformable", (25.8, 45.9, 7.2, 28.3, 40.7)),
    "faster_rcnn_R_101_plain": ("Faster R-CNN, ResNet-101", (29.4, 48.0, 9.0, 30.5, 47.1)),
    "faster_rcnn_R_101_dconv3_droi": ("… deformable", (33.1, 50.3, 11.6, 34.9, 51.2)),
    "rfcn_R_101_plain": ("R-FCN, ResNet-101", (30.8, 52.6, 11.8, 33.9, 44.8)),
    "rfcn_R_101_dconv3_droi": ("… deformable", (34.5, 55.0, 14.0, 37.7, 50.3)),
    "faster_rcnn_AIR_plain": (
        "Faster R-CNN, Aligned-Inception-ResNet",
        (30.8, 49.6, 9.6, 32.5, 49.0),
    ),
    "faster_rcnn_AIR_dconv3_droi": ("… deformable", (34.1, 51.1, 12.2, 36.5, 52.4)),
    "rfcn_AIR_plain": ("R-FCN, Aligned-Inception-ResNet", (32.9, 54.5, 12.5, 36.3, 48.3)),
    "rfcn_AIR_dconv3_droi": ("… deformable", (36.1, 56.7, 14.8, 39.8, 52.2)),
    "rfcn_AIR_plain_ms": ("… at several scales", (34.5, 55.0, 16.8, 37.3, 48.3)),
    "rfcn_AIR_dconv3_droi_ms": ("… deformable", (37.1, 57.3, 18.8, 39.7, 52.3)),
    "rfcn_AIR_plain_ms_avg": (
        "… at several scales, with averaged boxes",
        (35.5, 55.6, 17.8, 38.4, 49.3),
    ),
    "rfcn_AIR_dconv3_droi_ms_avg": ("… deformable", (37.5, 58.0, 19.4, 40.1, 52.5)),
}


@dataclass(frozen=True)
class Cell:
    """The results of one config in a table."""

    row: str
    column: str
    config: str
    metrics: tuple[str, ...]
    paper: tuple[float, ...] | None = None
    released: tuple[float, ...] | None = None
    # The config that trains the weights, if this one only evaluates them.
    trained_by: str = field(default="")


def cells_of(table: str) -> list[Cell]:
    """Returns the cells of one of the paper's tables, row by row.

    Args:
        table: "1", "3" or "5".
    """
    if table == "5":
        return [_coco_cell(name, *content) for name, content in TABLE_5.items()]
    cells = []
    for difference in TABLES[table]:
        for (column, stem, metrics), results in zip(COLUMNS, PAPER[difference], strict=True):
            if results is not None:
                name = f"{stem}_{difference}"
                row = ROWS[difference]
                cells.append(Cell(row, column, name, metrics, results, RELEASED.get(name)))
    return cells


def _coco_cell(name: str, row: str, results: tuple[float, ...]) -> Cell:
    trained_by, several_scales, _ = name.partition("_ms")
    config = f"COCO-Detection/{name}"
    return Cell(
        row,
        "COCO test-dev",
        config,
        COCO_TTA if several_scales else COCO,
        results,
        RELEASED.get(config),
        f"COCO-Detection/{trained_by}" if several_scales else "",
    )
