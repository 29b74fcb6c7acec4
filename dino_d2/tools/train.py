"""Train a detector on your own data in one command; needs Detectron2.

    python -m dino_d2.tools.train --data my_data --model dino_r50_4scale --out output/mine
    python -m dino_d2.tools.train --data train.json:images --val val.json:images ...

Checks the data, holds out a tenth for validation where there is none, derives classes, image sizes,
schedule and evaluation, writes all that as a config file, shows it and runs it by train_net.py.
Further arguments such as train.amp.enabled=True go to train_net.py.
"""

import argparse
import importlib.util
import math
import os
import re
import statistics
import sys
from pathlib import Path

import torch

from .. import model_zoo
from ..checkpoint import CheckpointError
from ..checkpoint.io import verify
from ..data.check import Checked, check_data_set, check_splits_apart
from ..data.coco import read_class_names
from ..data.findings import DataError
from ..data.layouts import find_sources, split_content
from ..data.writing import write_annotations, write_text
from ..files import WritingError
from .check_dataset import check_sources, print_findings

MIN_ITERATIONS = 3000  # small data sets are passed over more often
_COCO_SHORT_EDGE = 480  # of the usual image of COCO, which the recipe enlarges to 800


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args, overrides = _parser().parse_known_args(argv)
    wrong = [word for word in overrides if "=" not in word or word.startswith("-")]
    if wrong:
        sys.exit(f"unknown arguments: {' '.join(wrong)}; settings have the form train.seed=1")
    if importlib.util.find_spec("detectron2") is None:
        sys.exit(
            "Training by this command needs Detectron2, which is not installed: pip install "
            "--no-build-isolation 'dino_d2[detectron2]'. The check works without it: python -m "
            f"dino_d2.tools.check_dataset {args.data}"
        )
    try:
        config = find_config(args.model)
        _check_init(args)
        splits = prepare(args.data, args.val, "heads" if args.quick else "decode", Path(args.out))
        text = make_config(splits, config, args)
        path = Path(args.out) / "train_config.py"
        write_text(text, path)
    except (DataError, CheckpointError, WritingError, KeyError) as error:
        sys.exit(f"not trained: {error.args[0]}")
    print(f"\n{path}:\n\n{text}", flush=True)
    if not args.dry_run:
        command = [sys.executable, str(model_zoo.root() / "train_net.py")]
        command += ["--config-file", str(path), "--num-gpus", str(args.num_gpus), *overrides]
        print(f"Weights, curves, logs and detections will be in {args.out}.\n", flush=True)
        os.execv(sys.executable, command)  # in this process, which gets the signals to stop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dino_d2.tools.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="a folder, a json, or json:image_folder")
    parser.add_argument("--val", help="for validation: a json, or json:image_folder")
    parser.add_argument(
        "--model", default="dino_r50_4scale", help="a config, with or without _12ep"
    )
    parser.add_argument("--out", default="output/train", help="folder for everything")
    parser.add_argument("--init", default="", help="weights of a detector to start from")
    parser.add_argument(
        "--init-classes", default="coco", help="its classes: coco, coco91, or a json"
    )
    parser.add_argument(
        "--epochs", type=_positive, help=f"default 12, or {MIN_ITERATIONS} iterations"
    )
    parser.add_argument(
        "--batch", type=_positive, help="images of all processes; default 2 for each"
    )
    gpus = max(1, torch.cuda.device_count())
    parser.add_argument("--num-gpus", type=int, default=gpus, help="processes; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="do not decode images in the check")
    parser.add_argument("--dry-run", action="store_true", help="check and write the config only")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _check_init(args: argparse.Namespace) -> None:
    """Rather now than after the check of the data."""
    if args.init:
        read_class_names(args.init_classes)
        if "://" not in args.init:
            verify(args.init)


def find_config(model: str) -> str:
    """A config's name from its own, its file's, or its file's without the number of epochs.

    Raises:
        KeyError: there is none.
    """
    names = model_zoo.list_configs()
    found = [name for name in names if model in (name, name.partition("/")[2])]
    pattern = re.compile(re.escape(model.rpartition("/")[2]) + r"_(\d+)ep")
    matches = [(pattern.fullmatch(name.partition("/")[2]), name) for name in names]
    found += [name for _, name in sorted((int(m[1]), name) for m, name in matches if m)]
    if not found:
        raise KeyError(f"no config for {model!r}; there are {', '.join(names)}")
    return found[0]


def prepare(data: str, val: str | None, files: str, out: Path) -> dict[str, Checked]:
    """Check the data and make sure that "train" and "val" are there, as jsons that need no change.

    Raises:
        DataError: the data cannot be used, or the splits have different classes.
    """
    splits = check_sources(data, files)
    if val is not None:
        splits["val"] = check_data_set(*find_sources(val)["train"], files=files)
        check_splits_apart(splits["train"], splits["val"])
    splits = {name: splits[name] for name in ("train", "val") if name in splits}
    print_findings(splits)
    for checked in splits.values():
        checked.findings.raise_errors()
    contents = {name: checked.content for name, checked in splits.items()}
    if "val" not in splits:
        contents = dict(zip(("train", "val"), split_content(contents["train"]), strict=True))
        splits["val"] = splits["train"]
        print(f"no validation images: {len(contents['val']['images'])} of the training images are "
              "held out")  # fmt: skip
    train, held_out = ([(c["id"], c["name"]) for c in x["categories"]] for x in contents.values())
    if train != held_out:
        raise DataError(f"training has the classes {train}, validation {held_out}")
    return {name: _written(splits[name], contents[name], out, name) for name in contents}


def _written(checked: Checked, content: dict, out: Path, name: str) -> Checked:
    """The same with a json that holds just this content; its own, if it does."""
    if content is checked.content and not checked.changed:
        return checked
    path = out / "data" / f"{name}.json"
    write_annotations(content, path)
    return checked._replace(annotations=path, content=content)


def make_config(splits: dict[str, Checked], config: str, args: argparse.Namespace) -> str:
    """The text of a config file that trains `config` on this data."""
    train, val = splits["train"], splits["val"]
    images = train.content["images"]
    batch = args.batch or 2 * max(1, args.num_gpus)
    per_epoch = math.ceil(len(images) / batch)
    epochs = args.epochs or max(12, math.ceil(MIN_ITERATIONS / per_epoch))
    period = max(per_epoch, math.ceil(epochs * per_epoch / 20))
    short = statistics.median(min(image["width"], image["height"]) for image in images)
    names = {"train": _dataset_name(train), "test": _dataset_name(val)}
    lines = [f'"""{config} for {len(train.classes)} classes, by dino_d2.tools.train."""', ""]
    lines += ["from dino_d2 import model_zoo", "from dino_d2.d2.mapper import scale_sizes", ""]
    lines += [f"_base = model_zoo.get_config({config!r})"]
    parts = ("dataloader", "lr_multiplier", "model", "optimizer", "train")
    lines += [f"{part} = _base.{part}" for part in parts]
    lines += [f"model.detector.num_classes = {len(train.classes)}"]
    lines += [f"dataloader.{loader}.dataset.names = {name!r}" for loader, name in names.items()]
    lines += [f"optimizer.lr *= {batch} / dataloader.train.total_batch_size"]
    lines += [f"dataloader.train.total_batch_size = {batch}"]
    lines += [f"dataloader.evaluator.output_dir = {f'{args.out}/inference'!r}"]
    factor = round(min(1.0, short / _COCO_SHORT_EDGE), 3)
    if factor < 1:
        lines += [f"# The short edge is usually {short:g} pixels, COCO's {_COCO_SHORT_EDGE}."]
        lines += [f"scale_sizes(dataloader, {factor})"]
    lines += [f"train.max_iter = {epochs * per_epoch}  # {epochs} epochs of {len(images)} images"]
    lines += [f"train.eval_period = train.checkpointer.period = {period}"]
    lines += [f"train.output_dir = {args.out!r}"]
    if args.init:
        lines += [f"train.init_checkpoint = {args.init!r}"]
        lines += [f"train.init_classes = {args.init_classes!r}"]
    return "\n".join(lines) + "\n"


def _dataset_name(checked: Checked) -> str:
    return f"{checked.annotations.resolve()}:{checked.images.resolve()}"


if __name__ == "__main__":
    main()
