# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A mapper whose errors name the file that caused them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from detectron2.data import DatasetMapper

from .faults import DataError
from .file_checks import image_fault, label_map_fault, labels_fault, seen_fault

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]


class CheckedMapper:
    """Calls a mapper; if it fails on an image or label map that is faulty, says which and why.

    Other errors pass as they are. It can be given to Detectron2's `build_detection_train_loader`
    and `build_detection_test_loader`.
    """

    def __init__(self, mapper: Mapper, num_labels: int | None = None, ignored: int = 255) -> None:
        """Stores a mapper.

        Args:
            mapper: such as Detectron2's `DatasetMapper`.
            num_labels: number of classes of `sem_seg`, for which labels outside them are an error;
                None: labels are not checked.
            ignored: label of pixels that do not count.
        """
        self.mapper, self.num_labels, self.ignored = mapper, num_labels, ignored

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Returns what the mapper returns.

        Args:
            dataset_dict: of one image, in Detectron2's format.

        Raises:
            DataError: if a file cannot be read, or does not fit the data set.
        """
        try:
            mapped = self.mapper(dataset_dict)
        except Exception as error:
            fault = self._find_fault(dataset_dict)
            if fault is None:
                raise
            raise DataError(fault) from error
        if mapped is not None and "sem_seg" in mapped:
            fault = self._label_fault(mapped, dataset_dict)
            if fault:
                raise DataError(fault)
        return mapped

    def _label_fault(self, mapped: dict[str, Any], record: dict[str, Any]) -> str | None:
        labels, image = np.asarray(mapped["sem_seg"]), mapped.get("image")
        path = record.get("sem_seg_file_name", "sem_seg")
        # Others may turn colours into labels, or return labels in a form of their own.
        is_stock = type(self.mapper).__call__ is DatasetMapper.__call__
        if image is None or labels.shape != image.shape[-2:]:
            if not is_stock:
                return None
            return self._find_fault(record) or f"{path} has another size than its image"
        if "sem_seg_file_name" in record:
            fault = seen_fault(path, labels, self.ignored, is_stock)
            if fault:
                return fault
        if self.num_labels is None:
            return None
        return labels_fault(labels, path, self.num_labels, self.ignored)

    def _find_fault(self, record: dict[str, Any]) -> str | None:
        """Reads the files again, and returns what is wrong with them."""
        fault = image_fault(record) if record.get("file_name") else None
        if fault is None and record.get("sem_seg_file_name"):
            fault, _ = label_map_fault(record, self.num_labels, self.ignored, splits=())
        return fault
