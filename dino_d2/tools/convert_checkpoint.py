"""Turn a published checkpoint into one for this package, every weight accounted for.

    python -m dino_d2.tools.convert_checkpoint --from dino checkpoint0011_4scale.pth dino.pth \\
        --config dino/dino_r50_4scale_12ep

With --config, names and shapes are checked against that model (needs Detectron2). Official weights
score the 91 COCO ids; the 80 that exist are picked unless --num-classes 91 keeps all.
"""

import argparse
import sys
from collections.abc import Mapping

from torch import Tensor

from .. import model_zoo
from ..checkpoint import SOURCES, CheckpointError, convert, read_weights, write_weights
from ..checkpoint.convert import DETREX_SETTINGS
from ..checkpoint.names import detrex_model


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", choices=list(SOURCES), required=True)
    parser.add_argument("input", help="the published file")
    parser.add_argument("output", help="to write; .pth or .safetensors")
    parser.add_argument("--config", help="check against this config: its name, or a file")
    parser.add_argument("--num-classes", type=int, help="91 keeps all; default: 80 of 91, else all")
    parser.add_argument(
        "--without-co-heads", action="store_true", help="leave out Co-DETR's auxiliary heads"
    )
    args = parser.parse_args(argv)
    co_heads = not args.without_co_heads
    try:
        weights = read_weights(args.input)
        num_classes = args.num_classes or wanted_classes(convert(weights, args.source))
        wanted = state_of_config(args.config, num_classes, co_heads) if args.config else None
        converted = convert(weights, args.source, num_classes, wanted, co_heads)
        write_weights(converted, args.output)
    except (CheckpointError, ImportError, KeyError) as error:
        sys.exit(f"not converted: {error.args[0]}")
    checked = "checked against the config" if args.config else "not checked against a config"
    print(f"{args.output}: {len(converted)} weights for {num_classes} classes, {checked}")
    if args.source == "detrex":
        model = detrex_model(weights)
        changes = [f"model.{name}={value}" for name, value in DETREX_SETTINGS[model].items()]
        print(f"This is detrex's {model}: use our config with {' '.join(changes) or 'no changes'}.")
    if num_classes == 91:
        print("They score COCO's category ids; Detectron2's data sets number 80 classes from 0.")
    elif num_classes != 80:
        print(f"Use them with model.detector.num_classes={num_classes}.")


def wanted_classes(converted: Mapping[str, Tensor]) -> int:
    """80 of the 91 that official COCO weights have, else as many as there are."""
    given = next(len(tensor) for name, tensor in converted.items() if "class_heads" in name)
    return 80 if given == 91 else given


def state_of_config(config: str, num_classes: int, co_heads: bool = True) -> Mapping[str, Tensor]:
    """State dict of the detector that a config describes, for its names and shapes.

    Raises:
        ImportError: Detectron2 is not installed.
        KeyError: there is no such config.
    """
    cfg = model_zoo.get_config(config)
    from detectron2.config import instantiate  # after get_config has said what is missing

    cfg.model.detector.num_classes = num_classes
    if not co_heads and "co_heads" in cfg.model.detector:
        cfg.model.detector.co_heads = {}
    return instantiate(cfg.model).detector.state_dict()


if __name__ == "__main__":
    main()
