# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of registered data sets, before anything is trained or evaluated on them.

`find_faults` reads annotations, looks for files, and reads a sample of the label maps and their
images, which takes seconds; `read_all_files` reads every image and label map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from multiprocessing.pool import ThreadPool
from numbers import Integral
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from dcn_plugin.messages import one_line

from . import voc
from .coco_checks import (
    READ,
    AnnotationUse,
    are_finite,
    check_annotations,
    class_names,
    collection_paused,
    read_coco,
)
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

# Values of evaluator_type whose evaluation reads `json_file`.
JSON_EVALUATORS = ("coco", "coco_panoptic_seg", "lvis")
IGNORED_ONLY = "data sets have label maps of ignored pixels only"
SAMPLE = 16  # images
ANNOTATION = ("category_id", "bbox")  # what messages have of an annotation
PATH = (str, os.PathLike)
Records = list[dict[str, Any]]


def find_faults(
    name: str,
    split: str,
    *,
    outside: bool = False,
    stock_mapper: bool = True,
    labels: tuple[int | None, int] | None = None,
    **options: Any,
) -> Faults:
    """Checks annotations, that files exist, and a sample of the label maps, in seconds.

    Files in the formats of COCO, LVIS and VOC are checked as they are, other data sets as the
    records that their loader returns. Annotations at an address, of Shapes that are not yet drawn,
    and data sets that are not lists are not checked.

    Args:
        name: of a registered data set.
        split: how it is used, train or test.
        outside: whether files may be outside the folders of the data set.
        stock_mapper: whether images and categories are read as by Detectron2's `DatasetMapper`, and
            so can be checked.
        labels: number of classes, or None if it is not known, and the ignored label, with which a
            sample of the label maps and their images is read; None: they are not read.
        **options: required, read, filter_empty, min_keypoints and mask_format, as of
            `AnnotationUse`.
    """
    faults, metadata = Faults(), MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    json_file = os.fspath(json_file) if isinstance(json_file, PATH) else ""
    if "://" in json_file or (metadata.get("generated_in") and is_missing(json_file)):
        return faults
    if is_voc(name):
        folder = os.fspath(metadata.dirname)
        check_voc(folder, metadata.split, metadata.thing_classes, faults, outside, split == "test")
        return faults
    loaded = is_loaded_from_json(name)
    evaluated = split == "test" and metadata.get("evaluator_type") in JSON_EVALUATORS
    if loaded or (json_file and evaluated):
        use = AnnotationUse(
            split,
            loaded=loaded,
            lvis=is_lvis(name),
            unique_ids="minival" not in json_file,  # as Detectron2
            **options,
        )
        with collection_paused():
            content, faults.path = read_coco(json_file), json_file
            used = check_annotations(content, faults, use)
    if loaded:
        if stock_mapper:
            _check_images(name, used, faults, outside)
        records = _label_maps(name, content.get("images", []), faults, outside)
        if not faults.errors and not is_lvis(name) and "thing_classes" not in metadata.as_dict():
            # As Detectron2 does when it loads them; classes of LVIS are its own.
            metadata.thing_classes = class_names(content, json_file)
    else:
        records = load_records(name)
        check_records(
            records, faults, metadata.as_dict(), outside, stock_mapper, options.get("read", READ)
        )
    if labels and isinstance(records, list) and not faults.errors:
        _read_sample(records, faults, *labels, split)
    return faults


def _check_images(name: str, images: Records, faults: Faults, outside: bool) -> None:
    metadata = MetadataCatalog.get(name)
    root = metadata.get("image_root")
    if root is None:
        return
    if is_lvis(name):  # as Detectron2 does
        parts = [str(item.get("coco_url")).split("/")[-2:] for item in images]
        files = [root + "/".join(names) for names in parts if len(names) == 2]
    else:
        names = [item.get("file_name") for item in images]
        files = [os.path.join(root, name) for name in names if isinstance(name, str)]
    check_files(files, faults, root, outside)


def _label_maps(name: str, images: Records, faults: Faults, outside: bool) -> Records:
    """Checks the label maps of a panoptic set, one for each image; returns what they are of."""
    metadata = MetadataCatalog.get(name)
    root = metadata.get("sem_seg_root")
    if root is None or metadata.get("evaluator_type") != "coco_panoptic_seg" or faults.errors:
        return []
    records = []
    for item in images:
        stem, suffix = os.path.splitext(item["file_name"])
        if suffix != ".jpg":  # Detectron2 looks for no others
            faults.error("images of a panoptic data set are not .jpg files", item["file_name"])
        files = {
            "file_name": os.path.join(metadata.image_root, item["file_name"]),
            "sem_seg_file_name": os.path.join(root, f"{stem}.png"),
        }
        records.append({**files, "height": item["height"], "width": item["width"]})
    check_files([record["sem_seg_file_name"] for record in records], faults, root, outside)
    return records


def is_voc(name: str) -> bool:
    """Returns whether a data set is loaded by Detectron2's or our loader of VOC's format."""
    kind = MetadataCatalog.get(name).get("evaluator_type")
    loaders = "detectron2.data.datasets.pascal_voc", voc.__name__
    return kind == "pascal_voc" and _has_loader_of(name, *loaders)


def is_lvis(name: str) -> bool:
    """Returns whether a data set is loaded by Detectron2's loader of LVIS's format."""
    return _has_loader_of(name, "detectron2.data.datasets.lvis")


def is_builtin(name: str) -> bool:
    """Returns whether a data set is loaded by a loader of Detectron2 or of this package."""
    return _has_loader_of(name, "detectron2.data.datasets.", "dcn_plugin.data.")


def is_loaded_from_json(name: str) -> bool:
    """Returns whether Detectron2's or our loader reads `json_file`, in COCO's or LVIS's format."""
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file") or not is_builtin(name):
        return False
    if metadata.get("panoptic_json") and not metadata.get("sem_seg_root"):
        return False  # by `register_coco_panoptic`, whose list of images is another file
    return metadata.get("evaluator_type") in (*JSON_EVALUATORS, None)


def _has_loader_of(name: str, *modules: str) -> bool:
    return getattr(DatasetCatalog[name], "__module__", "").startswith(modules)


def load_records(name: str) -> Records:
    """Loads a data set.

    Args:
        name: of a registered data set.

    Raises:
        DataError: if a file does not exist or cannot be read, or an assertion of Detectron2's
            loaders about files fails.
    """
    try:
        return DatasetCatalog.get(name)
    except OSError as error:
        if error.filename is None:
            raise
        cause = f"{error.filename}: {error.strerror}"
        raise DataError(f"{name} cannot be loaded: {cause}") from error
    except AssertionError as error:
        if not (is_builtin(name) and str(error)):
            raise
        raise DataError(
            f"{name} cannot be loaded, its files are not as Detectron2 needs them: "
            f"{one_line(error)}"
        ) from error


def check_records(
    records: Records,
    faults: Faults,
    metadata: Mapping[str, Any],
    outside: bool = False,
    stock_mapper: bool = True,
    read: Container[str] = READ,
) -> None:
    """Checks the records of a data set in Detectron2's format.

    Args:
        records: what the loader of a data set returned.
        faults: where to add faults.
        metadata: of the data set.
        outside: whether files may be outside the folders in the metadata.
        stock_mapper: as for `find_faults`.
        read: those of segmentation and keypoints whose values are used.
    """
    if not isinstance(records, list):  # a torch Dataset, which may read files or have no end
        faults.warning(
            "data sets that are not a list of records are not checked", type(records).__name__
        )
        return
    if not records:
        faults.error("data sets are empty, there must be at least one image", "the records")
    for key, attributes in FILES.items() if stock_mapper else ():
        paths = [os.fspath(r[key]) for r in records if isinstance(r.get(key), PATH) and r[key]]
        roots = [metadata[name] for name in attributes if isinstance(metadata.get(name), PATH)]
        # Loaders may return local copies of what is at an address, or use other folders.
        root = next((os.fspath(root) for root in roots if os.path.isdir(root)), "")
        check_files(paths, faults, root, outside)
    classes = len(metadata.get("thing_classes", ())) if stock_mapper else 0
    for record in records:
        for item in record.get("annotations", ()):
            for kind in _annotation_faults(item, classes, read):
                place = f"image {short(record.get('image_id', record.get('file_name')))}"
                values = ", ".join(f"{k} {short(item[k])}" for k in ANNOTATION if k in item)
                faults.error(f"annotations have {kind}", f"{place}: {values}")


def _annotation_faults(
    item: Mapping[str, Any], classes: int, read: Container[str]
) -> Iterator[str]:
    """Yields what is wrong with an annotation of a record, if there are `classes`, or 0."""
    if "bbox" in item and not are_finite(item["bbox"]):
        yield "a bbox that is not finite numbers"
    category = item.get("category_id", 0)
    counted = classes and not item.get("iscrowd")  # in the table of instances that is logged
    if counted and not (isinstance(category, Integral) and 0 <= category < classes):
        yield f"a category_id that is not an integer from 0 to {classes - 1}"
    polygons = item.get("segmentation")
    if "segmentation" in read and isinstance(polygons, list) and not all(map(are_finite, polygons)):
        yield "a polygon that is not finite numbers"
    points = item.get("keypoints")
    if "keypoints" in read and points is not None and not are_finite(points):
        yield "keypoints that are not finite numbers"


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
