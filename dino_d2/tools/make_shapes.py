"""Generate the shapes data set: OUT/images/*.jpg and OUT/annotations.json in COCO format."""

import argparse
import sys

from ..data.shapes import SETTINGS, make_shapes


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.make_shapes", description=__doc__
    )
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--images", type=int, required=True, help="number of images")
    parser.add_argument("--size", type=int, default=128, help="longer side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--setting", choices=list(SETTINGS), default="easy")
    args = parser.parse_args(argv)
    path = make_shapes(args.out, args.images, args.size, args.seed, args.setting, _print_progress)
    print(f"\nwrote {args.images} images and {path}", file=sys.stderr)


def _print_progress(done: int) -> None:
    if done % 50 == 0:
        print(f"\r{done} images", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
