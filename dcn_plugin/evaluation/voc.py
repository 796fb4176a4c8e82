# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Average precision of PASCAL VOC at IoU 0.5 and 0.7, by both of VOC's rules."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

OVERLAPS = tuple(range(50, 100, 5))  # percent
PAPERS = (50, 70)
RULES = {"11point": True, "area": False}  # of 2007, and of the years after


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's evaluator, with AP at 0.7 and both rules.

    AP50, AP70, AP75 and AP (the mean from 0.5 to 0.95) follow the rule of the data set's year. The
    same with -11point or -area at the end follow that rule. Classes without objects do not count.
    """

    def __init__(self, dataset_name: str, output_folder: str) -> None:
        """Finds the annotations.

        Args:
            dataset_name: of a data set in VOC's format.
            output_folder: for the detections, one file for each class, in the form of VOC's server.
        """
        super().__init__(dataset_name)
        self.output_folder = output_folder

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes the figures, in the main process."""
        gathered = comm.gather(dict(self._predictions), dst=0)
        if not comm.is_main_process():
            return None
        lines: dict[int, list[str]] = defaultdict(list)
        for of_process in gathered:
            for kind, found in of_process.items():
                lines[kind].extend(found)
        objects = self._count_objects()
        files = self._write(lines)
        precision = {
            name: {overlap: self._precision(files, name, overlap) for overlap in OVERLAPS}
            for name in self._class_names
            if objects[name] > 0
        }
        return {"bbox": self._summarise(precision)}

    def _count_objects(self) -> Counter[str]:
        with PathManager.open(self._image_set_path) as file:
            images = file.read().split()
        return Counter(
            item["name"]
            for image in images
            for item in parse_rec(self._anno_file_template.format(image))
            if not item["difficult"]
        )

    def _write(self, lines: dict[int, list[str]]) -> str:
        """Writes the detections, and returns a pattern of the files' names."""
        PathManager.mkdirs(self.output_folder)
        pattern = os.path.join(self.output_folder, f"comp4_det_{self._dataset_name}_{{}}.txt")
        for number, name in enumerate(self._class_names):
            with PathManager.open(pattern.format(name), "w") as file:
                file.write("\n".join(lines[number]))
        return pattern

    def _precision(self, files: str, name: str, overlap: int) -> dict[str, float]:
        """Returns AP in percent by each rule."""
        recall, precision, _ = voc_eval(
            files, self._anno_file_template, self._image_set_path, name, ovthresh=overlap / 100
        )
        return {
            rule: 100 * float(voc_ap(recall, precision, by_points))
            for rule, by_points in RULES.items()
        }

    def _summarise(self, precision: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
        def mean(overlaps: tuple[int, ...], rule: str) -> float:
            values = [of[overlap][rule] for of in precision.values() for overlap in overlaps]
            return float(np.mean(values)) if values else float("nan")

        of_year = "11point" if self._is_2007 else "area"
        figures = {"AP": mean(OVERLAPS, of_year)}
        figures |= {f"AP{overlap}": mean((overlap,), of_year) for overlap in (50, 70, 75)}
        for rule in RULES:
            figures |= {f"AP{overlap}-{rule}": mean((overlap,), rule) for overlap in PAPERS}
        figures |= {f"AP50-{name}": of[50][of_year] for name, of in precision.items()}
        return figures
