#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Finds faults of data sets: in their annotations, and in every image and label map.

    python tools/check_dataset.py voc_2007_trainval coco_2017_val
    python tools/check_dataset.py --train-data train.json images/ --test-data val.json images/
    python tools/check_dataset.py --annotations-only coco_2017_train

Prints a line for each kind of fault, with its count and the first places. The exit code is 1 if
there are errors, which training or evaluation would fail on or be wrong with; warnings are about
what Detectron2 ignores. train_net.py does what --annotations-only does, at each start, and reads a
sample of the label maps of semantic segmentation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from functools import partial

from tqdm import tqdm

from detectron2.data import DatasetCatalog, MetadataCatalog

from dcn_plugin.data import add_custom_data_option
from dcn_plugin.data.custom_coco import register_custom_data
from dcn_plugin.data.dataset_checks import (
    check_records,
    find_faults,
    load_records,
    read_all_files,
)
from dcn_plugin.data.faults import HINT, DataError, Faults
from dcn_plugin.data.file_checks import describe_missing
from dcn_plugin.messages import UserError, exit_on_error, got

SPLITS = ("train", "test")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", help="registered data sets")
    add("--split", choices=SPLITS, help="what the names are used for; default: both")
    for split in SPLITS:
        add_custom_data_option(parser, split)
    add("--annotations-only", action="store_true", help="do not open images and label maps")
    add("--masks", action="store_true", help="annotations must have a segmentation")
    add("--allow-files-outside", action="store_true", help="files may be outside the folders")
    args = parser.parse_args(words)
    if not (args.names or args.train_data or args.test_data):
        parser.error("name a data set, or use --train-data or --test-data")
    return args


def check(name: str, splits: Collection[str], args: argparse.Namespace) -> list[Faults]:
    """Checks a data set for its uses: its annotations, and then its files if these are right."""
    if name not in DatasetCatalog.list():
        raise UserError(
            f"data sets must be registered, {got(name, DatasetCatalog.list())}; "
            "DatasetCatalog.list() has all"
        )
    required = ("bbox", "segmentation") if args.masks else ("bbox",)
    outside = args.allow_files_outside
    found = [find_faults(name, split, required=required, outside=outside) for split in splits]
    if not args.annotations_only and not any(faults.errors for faults in found):
        records, metadata, contents = load_records(name), MetadataCatalog.get(name), Faults()
        if not isinstance(records, list):  # `find_faults` has said that it is not checked
            return found
        check_records(records, contents, metadata.as_dict(), outside)
        progress = partial(tqdm, desc=name, total=len(records), unit="image", disable=None)
        read_all_files(records, contents, metadata.as_dict(), progress, splits)
        found.append(contents)
    return found


@exit_on_error("check_dataset")
def main(words: list[str] | None = None) -> None:
    """Prints the faults."""
    args = parse_arguments(words)
    failed = False
    uses = dict.fromkeys(args.names, (args.split,) if args.split else SPLITS)
    for split in SPLITS:
        paths = getattr(args, f"{split}_data")
        if paths:
            try:
                register_custom_data(split, *paths)
            except DataError as error:
                raise DataError(str(error).removesuffix(HINT)) from error
            uses[f"custom_{split}"] = (split,)
    for name, splits in uses.items():
        try:
            lines = [line for faults in check(name, splits, args) for line in faults.lines()]
        except FileNotFoundError as error:  # nothing else of it can be read
            lines = [f"error: {describe_missing([error.filename or str(error)])}"]
        except (OSError, DataError) as error:
            lines = [f"error: {error}"]
        errors = [line for line in lines if line.startswith("error: ")]
        failed = failed or bool(errors)
        # Both uses may have found it, one as a warning.
        weaker = {line.replace("error: ", "warning: ", 1) for line in errors}
        for line in dict.fromkeys(lines or ["no faults"]):
            if line not in weaker:
                print(f"{name}: {line}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
