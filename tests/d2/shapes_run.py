"""Tiny runs of training on generated shapes: data, overrides, `train_net.py` as a process."""

import json
import os
import subprocess
import sys

from dino_d2 import model_zoo
from dino_d2.data.shapes import make_shapes

TINY = [
    "model.detector.embed_dim=32",
    "model.detector.ffn_dim=32",
    "model.detector.encoder_layers=1",
    "model.detector.num_queries=10",
    "dataloader.train.total_batch_size=2",
    "train.log_period=1",
    "train.device=cpu",
]


def make_data(folder, num_images=4):
    """Images of at most 80 pixels, the first without objects; returns the data set's name."""
    path = make_shapes(folder, num_images, 80, seed=2)
    content = json.loads(path.read_text())
    entries = [entry for entry in content["annotations"] if entry["image_id"] > 1]
    path.write_text(json.dumps({**content, "annotations": entries}))
    return f"{path}:{folder / 'images'}"


def overrides(out, data, steps, *more):
    """For `train_net.py`, of the config for shapes."""
    return [
        *TINY,
        f"train.output_dir={out}",
        f"train.max_iter={steps}",
        f"train.checkpointer.period={steps}",
        f"train.eval_period={steps}",
        f"dataloader.train.dataset.names={data}",
        f"dataloader.test.dataset.names={data}",
        f"dataloader.evaluator.output_dir={out}/inference",
        *more,
    ]


def make_config(out, data, steps, *more, name="dino/dino_shapes"):
    """The same as a config."""
    from dino_d2.d2 import apply_overrides

    chosen = overrides(out, data, steps, *more)
    if name.startswith("co_detr/"):  # whose settings are those of the base
        chosen = [x.replace("model.detector.", "model.detector.base.") for x in chosen]
    return apply_overrides(model_zoo.get_config(name), chosen)


def train_net(*arguments, check=True, **env):
    """Run it on the CPU with the config for shapes; returns the process with its output."""
    command = [sys.executable, model_zoo.root() / "train_net.py"]
    command += ["--config-file", "dino/dino_shapes", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    return done
