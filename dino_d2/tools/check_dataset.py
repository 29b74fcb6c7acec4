"""Check a COCO-format data set before anything is trained on it.

    python -m dino_d2.tools.check_dataset my_data --page report.html
    python -m dino_d2.tools.check_dataset train.json:images --write clean.json

Says what is refused, dropped, converted or remarkable, with image ids, annotation ids and fields.
Exits with 1 if the data cannot be used. --write keeps what is usable, so that it can.
"""

import argparse
import sys

from ..data.check import Checked, check_data_set, check_splits_apart
from ..data.findings import DataError
from ..data.layouts import find_sources
from ..data.writing import write_annotations
from ..diagnostics.data_page import write_page
from ..files import WritingError


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.check_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="a folder, a json, or json:image_folder")
    parser.add_argument("--quick", action="store_true", help="read the images' heads only")
    parser.add_argument("--page", help="html file to write: counts, sizes, samples")
    parser.add_argument("--write", help="json to write: what is usable of the training split")
    args = parser.parse_args(argv)
    try:
        splits = check_sources(args.data, "heads" if args.quick else "decode")
        print_findings(splits)
        if args.page:
            write_page(splits, args.page)
            print(f"page: {args.page}")
        if args.write:
            write_annotations(splits["train"].content, args.write)
            print(f"usable part of {splits['train'].annotations}: {args.write}")
    except (DataError, WritingError) as error:
        sys.exit(str(error))
    if any(checked.findings.count("error") for checked in splits.values()):
        sys.exit(1)


def check_sources(data: str, files: str) -> dict[str, Checked]:
    """Check all splits of a data set, and that they have no image in common.

    Raises:
        DataError: there is no data set, or a json cannot be read.
    """
    sources = find_sources(data)
    splits = {name: check_data_set(*source, files=files) for name, source in sources.items()}
    for name in splits.keys() - {"train"}:
        check_splits_apart(splits["train"], splits[name])
    return splits


def print_findings(splits: dict[str, Checked]) -> None:
    """Everything that was found, by split."""
    for name, checked in splits.items():
        content = checked.content
        print(f"{name}: {checked.annotations}, images in {checked.images}")
        print(f"  {len(content['images'])} images, {len(content['annotations'])} annotations, "
              f"{len(checked.classes)} classes: usable")  # fmt: skip
        for finding in checked.findings.all():
            print(f"  {finding}")


if __name__ == "__main__":
    main()
