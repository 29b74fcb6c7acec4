#!/usr/bin/env python
"""Train or evaluate a detector with a LazyConfig file.

    train_net.py --config-file projects/dino/configs/dino_r50_4scale_12ep.py --num-gpus 8
    train_net.py --config-file dino/dino_r50_4scale_12ep --eval-only train.init_checkpoint=dino.pth
    train_net.py --config-file dino/dino_r50_4scale_12ep --resume

Any COCO-format data set, here with three classes:

    train_net.py --config-file dino/dino_r50_4scale_12ep model.detector.num_classes=3 \\
        dataloader.train.dataset.names=train.json:images \\
        dataloader.test.dataset.names=val.json:images

Without a GPU, --num-gpus is the number of processes on the CPU. It also runs under torchrun and
srun, one process per task:

    torchrun --nproc-per-node 8 train_net.py --config-file dino/dino_r50_4scale_12ep
    srun --ntasks-per-node 8 python train_net.py --config-file dino/dino_r50_4scale_12ep
"""

from detectron2.engine import default_argument_parser, default_setup

from dino_d2 import model_zoo
from dino_d2.d2 import apply_overrides, evaluate_checkpoint, launch, load_config, train


def main(args):
    """One process of the job."""
    cfg = apply_overrides(load_config(args.config_file), args.opts)
    default_setup(cfg, args)
    if args.eval_only:
        return evaluate_checkpoint(cfg)
    return train(cfg, resume=args.resume)


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    arguments.config_file = model_zoo.get_config_file(arguments.config_file)
    launch(main, arguments)
