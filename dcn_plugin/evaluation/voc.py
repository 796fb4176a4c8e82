# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""PASCAL VOC's average precision at IoU 0.5 and 0.7, by both of VOC's rules."""

from __future__ import annotations

import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from .non_finite import DropNonFinite

IOU_THRESHOLDS = tuple(range(50, 100, 5))  # percent
USE_07_METRIC = {"11point": True, "area": False}  # VOC's rules of 2007, and of the years after


class VOCEvaluator(DropNonFinite, PascalVOCDetectionEvaluator):
    """Detectron2's evaluator, with AP at IoU 0.7 and by both rules.

    AP50, AP70, AP75 and AP (the mean over IoU 0.5 to 0.95) follow the rule of the data set's year;
    AP50-11point, AP50-area, AP70-11point and AP70-area follow the rule that they name. Classes
    without ground truth are ignored. Objects without `difficult` are not difficult; fractional
    coordinates are rounded.
    """

    def __init__(self, dataset_name: str, output_folder: str) -> None:
        """Loads the metadata.

        Args:
            dataset_name: a registered data set in VOC's format.
            output_folder: for the detections, a file for each class in the format of VOC's server.
        """
        super().__init__(dataset_name)
        self.output_folder = output_folder

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes the metrics, in the main process."""
        self.log_dropped()
        gathered = comm.gather(dict(self._predictions), dst=0)
        if not comm.is_main_process():
            return None
        lines: dict[int, list[str]] = defaultdict(list)
        for predictions in gathered:
            for class_id, detections in predictions.items():
                lines[class_id].extend(detections)
        self._write(lines, self.output_folder)
        with PathManager.open(self._image_set_path) as file:
            images = [line.partition("#")[0].strip() for line in file]
            images = [name for name in images if name]  # as Detectron2 loads them
        with tempfile.TemporaryDirectory() as folder:  # voc_eval reads local files only
            image_set = os.path.join(folder, "images.txt")
            with open(image_set, "w") as file:
                file.write("\n".join(images))
            annotations = self._readable_annotations(images, folder)
            objects = Counter(
                item["name"]
                for image in images
                for item in parse_rec(annotations.format(image))
                if not item["difficult"]
            )
            files = self._write(lines, folder)
            aps = {
                name: {
                    iou: compute_ap(files, annotations, image_set, name, iou)
                    for iou in IOU_THRESHOLDS
                }
                for name in self._class_names
                if objects[name] > 0
            }
        if annotations != self._anno_file_template:
            parse_rec.cache_clear()  # of files that no longer exist
        return {"bbox": self._summarize(aps)}

    def _readable_annotations(self, images: list[str], folder: str) -> str:
        """Returns a pattern of XML files that Detectron2 can evaluate, in a folder if need be."""
        try:
            for image in images:
                parse_rec(self._anno_file_template.format(image))
        except (AttributeError, ValueError):  # of a missing element, and of a fractional number
            pattern = os.path.join(folder, "{}.xml")
            for image in images:
                write_complete(self._anno_file_template.format(image), pattern.format(image))
            return pattern
        return self._anno_file_template

    def _write(self, lines: dict[int, list[str]], folder: str) -> str:
        """Writes the detections; returns a pattern of the file names."""
        PathManager.mkdirs(folder)
        pattern = os.path.join(folder, f"comp4_det_{self._dataset_name}_{{}}.txt")
        for class_id, name in enumerate(self._class_names):
            with PathManager.open(pattern.format(name), "w") as file:
                file.write("\n".join(lines[class_id]))
        return pattern

    def _summarize(self, aps: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
        """Averages the APs of {class: {IoU: {rule: AP}}} over classes."""

        def mean(ious: tuple[int, ...], rule: str) -> float:
            values = [of_class[iou][rule] for of_class in aps.values() for iou in ious]
            return float(np.mean(values)) if values else float("nan")

        rule_of_year = "11point" if self._is_2007 else "area"
        metrics = {"AP": mean(IOU_THRESHOLDS, rule_of_year)}
        metrics |= {f"AP{iou}": mean((iou,), rule_of_year) for iou in (50, 70, 75)}
        for rule in USE_07_METRIC:
            metrics |= {f"AP{iou}-{rule}": mean((iou,), rule) for iou in (50, 70)}
        metrics |= {f"AP50-{name}": of_class[50][rule_of_year] for name, of_class in aps.items()}
        return metrics


def compute_ap(
    files: str, annotations: str, image_set: str, name: str, iou: int
) -> dict[str, float]:
    """Returns the AP of a class in percent by each rule.

    Args:
        files: pattern of files of detections, by class.
        annotations: pattern of XML files, by image.
        image_set: file with the names of the images.
        name: class.
        iou: threshold in percent.
    """
    recall, precision, _ = voc_eval(files, annotations, image_set, name, ovthresh=iou / 100)
    return {
        rule: 100 * float(voc_ap(recall, precision, use_07_metric))
        for rule, use_07_metric in USE_07_METRIC.items()
    }


def write_complete(source: str, path: str) -> None:
    """Copies an annotation; adds what Detectron2's `parse_rec` needs, and rounds the boxes.

    Args:
        source: in VOC's format; objects may lack pose, truncated and difficult.
        path: local path of the copy.
    """
    with PathManager.open(source) as file:
        tree = ElementTree.parse(file)
    for item in tree.findall("object"):
        for name, default in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
            if not (item.findtext(name) or "").strip():
                for empty in item.findall(name):
                    item.remove(empty)
                ElementTree.SubElement(item, name).text = default
        for side in item.find("bndbox") or ():
            side.text = str(round(float(side.text)))
    tree.write(path)
