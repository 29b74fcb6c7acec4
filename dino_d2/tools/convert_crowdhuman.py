"""Turn CrowdHuman's .odgt into a COCO-format json, for the names crowdhuman_train and _val.

python -m dino_d2.tools.convert_crowdhuman annotation_train.odgt Images annotation_train.json
"""

import argparse
import sys

from ..data.crowdhuman import BOXES, convert_crowdhuman
from ..data.findings import DataError


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.convert_crowdhuman",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("odgt", help="annotation_train.odgt or annotation_val.odgt")
    parser.add_argument("images", help="folder with all images")
    parser.add_argument("output", help="json to write")
    parser.add_argument("--boxes", choices=[*BOXES], default="full")
    args = parser.parse_args(argv)
    try:
        content = convert_crowdhuman(args.odgt, args.images, args.output, args.boxes)
    except (DataError, OSError) as error:
        sys.exit(f"not converted: {error}")
    print(
        f"{args.output}: {len(content['images'])} images, {len(content['annotations'])} annotations"
    )


if __name__ == "__main__":
    main()
