# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of registered data sets, before anything is trained or evaluated on them.

`find_faults` reads annotations, looks for files, and reads a sample of the label maps and their
images, which takes seconds; `read_all_files` reads every image and label map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from . import voc
from .coco_checks import are_finite, check_annotations, class_names, collection_paused, read_coco
from .faults import DataError, Faults, short
from .file_checks import (
    FILES,
    check_files,
    clipped_fault,
    image_fault,
    is_missing,
    label_map_fault,
)
from .voc_checks import check_voc

COCO_FORMAT = ("coco", "coco_panoptic_seg", None)  # values of evaluator_type
IGNORED_ONLY = "data sets have label maps of ignored pixels only"
SAMPLE = 16  # images
Records = list[dict[str, Any]]


def find_faults(
    name: str,
    split: str,
    *,
    required: Sequence[str] = ("bbox",),
    read: Container[str] = ("segmentation", "keypoints"),
    filter_empty: bool = True,
    min_keypoints: int = 0,
    mask_format: str | None = None,
    outside: bool = False,
    labels: tuple[int | None, int] | None = None,
) -> Faults:
    """Checks annotations, that files exist, and a sample of the label maps, in seconds.

    Files in the formats of COCO and VOC are checked as they are, other data sets as the records
    that their loader returns. Annotations at an address, of LVIS, of Shapes that are not yet drawn,
    and data sets that are not lists are not checked.

    Args:
        name: of a registered data set.
        split: how it is used, train or test.
        required: keys that annotations in COCO's format must have.
        read: those of segmentation and keypoints whose values are used: wrong ones of the others
            are warnings.
        filter_empty: whether training leaves out images without annotations.
        min_keypoints: number of visible keypoints, below which training leaves out an image.
        mask_format: INPUT.MASK_FORMAT, None if it is not known.
        outside: whether files may be outside the folders of the data set.
        labels: number of classes, or None if it is not known, and the ignored label, with which a
            sample of the label maps and their images is read; None: they are not read.
    """
    faults, metadata = Faults(), MetadataCatalog.get(name)
    kind, json_file = metadata.get("evaluator_type"), os.fspath(metadata.get("json_file") or "")
    if metadata.get("generated_in") and is_missing(json_file):
        return faults
    if is_voc(name):
        folder = os.fspath(metadata.dirname)
        check_voc(folder, metadata.split, metadata.thing_classes, faults, outside, split == "test")
    elif kind == "lvis" or "://" in json_file:
        pass
    elif (
        kind in COCO_FORMAT
        and json_file
        and (is_loaded_from_json(name) or (kind and split == "test"))
    ):
        with collection_paused():
            content, faults.path = read_coco(json_file), json_file
            images = check_annotations(
                content,
                faults,
                split,
                required=required,
                read=read,
                filter_empty=filter_empty,
                loaded=is_loaded_from_json(name),
                unique_ids="minival" not in json_file,  # as Detectron2
                min_keypoints=min_keypoints,
                mask_format=mask_format,
            )
        _check_images(name, images, faults, outside)
        if (
            not faults.errors
            and is_loaded_from_json(name)
            and "thing_classes" not in metadata.as_dict()
        ):
            # As Detectron2 does when it loads them.
            metadata.thing_classes = class_names(content, json_file)
    else:
        records = load_records(name)
        check_records(records, faults, metadata.as_dict(), outside)
        if labels and isinstance(records, list) and not faults.errors:
            _read_sample(records, faults, *labels, split)
    return faults


def _check_images(name: str, images: Records, faults: Faults, outside: bool) -> None:
    root = MetadataCatalog.get(name).get("image_root")
    if root is not None and is_loaded_from_json(name):
        names = [item.get("file_name") for item in images]
        files = [os.path.join(root, name) for name in names if isinstance(name, str)]
        check_files(files, faults, root, outside)


def is_voc(name: str) -> bool:
    """Returns whether a data set is loaded by Detectron2's or our loader of VOC's format."""
    kind = MetadataCatalog.get(name).get("evaluator_type")
    loaders = "detectron2.data.datasets.pascal_voc", voc.__name__
    return kind == "pascal_voc" and _has_loader_of(name, *loaders)


def is_loaded_from_json(name: str) -> bool:
    """Returns whether a data set is loaded by Detectron2's or our loader of COCO's format."""
    generated = bool(MetadataCatalog.get(name).get("generated_in"))
    return generated or _has_loader_of(name, "detectron2.data.datasets.")


def _has_loader_of(name: str, *modules: str) -> bool:
    return getattr(DatasetCatalog[name], "__module__", "").startswith(modules)


def load_records(name: str) -> Records:
    """Loads a data set.

    Args:
        name: of a registered data set.

    Raises:
        DataError: if a file does not exist or cannot be read.
    """
    try:
        return DatasetCatalog.get(name)
    except OSError as error:
        if error.filename is None:
            raise
        cause = f"{error.filename}: {error.strerror}"
        raise DataError(f"{name} cannot be loaded: {cause}") from error


def check_records(
    records: Records, faults: Faults, metadata: Mapping[str, Any], outside: bool = False
) -> None:
    """Checks the records of a data set in Detectron2's format.

    Args:
        records: what the loader of a data set returned.
        faults: where to add faults.
        metadata: of the data set.
        outside: whether files may be outside the folders in the metadata.
    """
    if not isinstance(records, list):  # a torch Dataset, which may read files or have no end
        faults.warning(
            "data sets that are not a list of records are not checked", type(records).__name__
        )
        return
    if not records:
        faults.error("data sets are empty, there must be at least one image", "the records")
    for key, attributes in FILES.items():
        paths = [os.fspath(record[key]) for record in records if record.get(key)]
        roots = [metadata[attribute] for attribute in attributes if metadata.get(attribute)]
        root = os.fspath(roots[0]) if roots else ""
        # Loaders may return local copies of what is at an address.
        check_files(paths, faults, root, outside or "://" in root)
    for record in records:
        for item in record.get("annotations", ()):
            if "bbox" in item and not are_finite(item["bbox"]):
                place = f"image {short(record.get('image_id', record.get('file_name')))}"
                faults.error(
                    "annotations have a bbox that is not finite numbers",
                    f"{place}: {short(item['bbox'])}",
                )


def read_all_files(
    records: Records,
    faults: Faults,
    metadata: Mapping[str, Any],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    splits: Container[str] = ("train", "test"),
) -> None:
    """Reads every image and label map, in threads.

    Args:
        records: what the loader of a data set returned.
        faults: where to add faults.
        metadata: of the data set.
        progress: wraps an iterable of the same length as the records.
        splits: how the data set is used, as for `label_map_fault`.
    """
    classes = metadata.get("stuff_classes")
    count = None if classes is None else len(classes)
    ignored = metadata.get("ignore_label", 255)
    for path in _read_files(records, faults, count, ignored, splits, progress):
        faults.warning("label maps have ignored pixels only", path)


def _read_sample(
    records: Records, faults: Faults, classes: int | None, ignored: int, split: str
) -> None:
    """Reads at most 16 label maps, spread over the data set, and their images."""
    local = [
        record
        for record in records
        if record.get("sem_seg_file_name")
        and not any("://" in str(record.get(key)) for key in FILES)
    ]
    sample = local[:: -(-len(local) // SAMPLE) or 1]
    _read_files(sample, faults, classes, ignored, (split,), of=f", of {len(sample)} that were read")
    if len(sample) < len(local):  # the others may have labels
        faults.make_warning(IGNORED_ONLY)


def _read_files(
    records: Records,
    faults: Faults,
    classes: int | None,
    ignored: int,
    splits: Container[str],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    of: str = "",
) -> list[str]:
    """Reads images and label maps in threads; returns the label maps of ignored pixels only."""

    def read(record: dict[str, Any]) -> tuple[str | None, str | None, bool]:
        path, fault, is_ignored = record.get("file_name"), None, False
        image = (image_fault(record) or clipped_fault(path)) if path else None
        if record.get("sem_seg_file_name"):
            fault, is_ignored = label_map_fault(record, classes, ignored, splits)
        return image, fault, is_ignored

    empty = []
    with ThreadPool() as pool:
        found = progress(pool.imap(read, records))
        for record, (image, labels, is_ignored) in zip(records, found, strict=True):
            if image:
                faults.error(f"images cannot be used{of}", image)
            if labels:
                faults.error(f"label maps cannot be used{of}", labels)
            if is_ignored:
                empty.append(record["sem_seg_file_name"])
    if empty and len(empty) == sum(bool(r.get("sem_seg_file_name")) for r in records):
        report = faults.error if "train" in splits else faults.warning
        report(IGNORED_ONLY, f"all {len(empty)} that were read")
    return empty
