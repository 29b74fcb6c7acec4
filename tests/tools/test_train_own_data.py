"""Own data in one command."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from bad_data import CONTENT, changed, write
from PIL import Image

from dino_d2.data.shapes import make_shapes
from dino_d2.tools import train

TINY = [
    "model.detector.embed_dim=32",
    "model.detector.ffn_dim=32",
    "model.detector.encoder_layers=1",
    "model.detector.num_queries=10",
    "train.device=cpu",
]


def make_strange_data(folder):
    """Odd ids, modes and formats, images without objects, sizes left out; nothing to validate on.

    Nothing of it is wrong.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (folder / "pictures").mkdir(parents=True)
    kinds = [("RGB", "png"), ("L", "jpg"), ("RGBA", "webp"), ("CMYK", "jpg"), ("P", "gif"),
             ("1", "bmp"), ("I;16", "png"), ("RGB", "tiff")]  # fmt: skip
    for number, (mode, suffix) in enumerate(kinds):
        pixels = rng.integers(0, 256, (50 + 3 * number, 64, 3), np.uint8)
        picture = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        name = f"bild {number}é.{suffix}"
        picture.save(folder / "pictures" / name)
        key = f"img-{number * 7}"
        images.append({"id": key, "file_name": name})
        if number % 3:
            box = [4, 5, 20, 30.5]
            annotations.append({"image_id": key, "category_id": 1000 + number % 2, "bbox": box})
    categories = [{"id": 1001, "name": "b $"}, {"id": 1000, "name": "a"}, {"id": 0, "name": "none"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "my labels.json").write_text(json.dumps(content))


def load(out):
    from detectron2.config import LazyConfig

    return LazyConfig.load(str(out / "train_config.py"))


@pytest.mark.detectron2
def test_a_strangers_data_trains(tmp_path):
    make_strange_data(tmp_path / "data")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dino_d2.tools.train", "--data", tmp_path / "data"]
    command += ["--model", "dino_shapes", "--out", out, "--epochs", "1", "--batch", "4", *TINY]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no validation images: 1 of the training images are held out" in done.stdout
    assert "16-bit values brought to 8 bits: 1" in done.stdout
    assert "annotation ids that are missing" in done.stdout
    cfg = load(out)
    assert cfg.model.detector.num_classes == 3
    assert cfg.train.max_iter == 2
    assert (out / "model_final.pth").exists()
    found = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    (held_out,) = json.loads((out / "data" / "val.json").read_text())["images"]
    assert {entry["image_id"] for entry in found} == {held_out["id"]}
    assert {entry["category_id"] for entry in found} <= {0, 1000, 1001}


@pytest.mark.detectron2
def test_everything_is_derived_from_the_data(tmp_path, capsys):
    for split, count in (("train", 20), ("val", 3)):
        make_shapes(tmp_path / "data" / split, count, 96, seed=count)
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path / "data"), "--out", str(out), "--batch", "8", "--dry-run"]
    (tmp_path / "dino.pth").touch()
    train.main([*arguments, "--init", str(tmp_path / "dino.pth")])
    cfg, text = load(out), (out / "train_config.py").read_text()
    assert text in capsys.readouterr().out
    assert cfg.model.detector.num_classes == 3
    assert cfg.dataloader.train.dataset.names.endswith("train/images")
    assert cfg.dataloader.test.dataset.names.endswith("val/images")
    assert cfg.dataloader.evaluator.dataset_name == cfg.dataloader.test.dataset.names
    assert cfg.optimizer.lr == pytest.approx(1e-4 / 2)  # half the recipe's batch
    assert cfg.train.max_iter == train.MIN_ITERATIONS
    assert cfg.train.eval_period == cfg.train.checkpointer.period == train.MIN_ITERATIONS / 20
    assert cfg.train.init_checkpoint == str(tmp_path / "dino.pth")
    assert cfg.train.init_classes == "coco"
    resize = cfg.dataloader.test.mapper.augmentations[0]
    assert 100 < resize.short_edge_length < 170  # 72 to 96 pixels, enlarged as COCO's 480 to 800
    sizes = cfg.dataloader.train.mapper.augmentations[2].short_edge_length
    assert max(sizes) == resize.short_edge_length
    assert min(sizes) == pytest.approx(0.6 * max(sizes), abs=1)


def test_large_images_keep_the_recipes_sizes(tmp_path):
    content = changed(images={"width": 900, "height": 1200})
    content["images"][0].update(width=800, height=600)
    sizes = {"a": Image.new("RGB", (800, 600)), "b": Image.new("RGB", (900, 1200))}
    splits = train.prepare(":".join(map(str, write(tmp_path, content, **sizes))), None, "heads",
                           tmp_path)  # fmt: skip
    args = train._parser().parse_args(["--data", "x"])
    assert "scale_sizes(" not in train.make_config(splits, "dino/dino_r50_4scale_12ep", args)


def test_what_is_unchanged_is_used_in_its_place(tmp_path):
    data = ":".join(map(str, write(tmp_path / "a")))
    splits = train.prepare(data, data, "heads", tmp_path / "out")
    assert splits["train"].annotations == splits["val"].annotations == tmp_path / "a" / \
        "annotations.json"  # fmt: skip
    assert not (tmp_path / "out").exists()


def run(tmp_path, content=CONTENT, *more):
    data = ":".join(map(str, write(tmp_path / "data", content)))
    train.main(["--data", data, "--out", str(tmp_path / "out"), "--dry-run", *more])


@pytest.fixture
def _with_detectron2(monkeypatch):
    """For what happens before it is needed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: name == "detectron2" or find_spec(name))  # fmt: skip


@pytest.mark.usefixtures("_with_detectron2")
def test_bad_data_is_not_trained_on(tmp_path):
    with pytest.raises(SystemExit, match=r"not trained: (?s:.)*annotation 2 .*category_id 3"):
        run(tmp_path, changed(annotations={"category_id": 3}))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_with_detectron2")
def test_splits_of_other_classes_are_refused(tmp_path):
    other = write(tmp_path / "other", changed(categories={"name": "wolf"}))
    with pytest.raises(SystemExit, match=r"training has the classes .*dog.*validation .*wolf"):
        run(tmp_path, CONTENT, "--val", ":".join(map(str, other)))


@pytest.mark.usefixtures("_with_detectron2")
def test_unknown_arguments_and_models_are_named(tmp_path):
    with pytest.raises(SystemExit, match="unknown arguments: --epoch5 3"):
        run(tmp_path, CONTENT, "--epoch5", "3")
    with pytest.raises(
        SystemExit, match=r"not trained: no config for 'yolo'; there are .*dino_r50"
    ):
        run(tmp_path, CONTENT, "--model", "yolo")


@pytest.mark.usefixtures("_with_detectron2")
def test_wrong_arguments_are_told_before_the_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "prepare", None)
    with pytest.raises(SystemExit, match=r"not trained: x\.pth: there is no such file"):
        run(tmp_path, CONTENT, "--init", "x.pth")
    with pytest.raises(SystemExit, match=r"not trained: names: there is no such file"):
        run(tmp_path, CONTENT, "--init", "x.pth", "--init-classes", "names")
    for option in ("--epochs", "--batch"):
        with pytest.raises(SystemExit):
            run(tmp_path, CONTENT, option, "0")
        assert f"argument {option}: 0 is not above 0" in capsys.readouterr().err


@pytest.mark.usefixtures("_with_detectron2")
def test_the_process_becomes_that_of_training(tmp_path, monkeypatch):
    """So that signals to stop reach it; a parent would kill it in its last step."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, command: commands.append(command))
    data = ":".join(map(str, write(tmp_path / "data")))
    train.main(["--data", data, "--out", str(tmp_path / "out"), "--num-gpus", "0", "train.seed=1"])
    (command,) = commands
    assert command[0] == sys.executable
    assert command[-5:] == ["--config-file", str(tmp_path / "out" / "train_config.py"),
                            "--num-gpus", "0", "train.seed=1"]  # fmt: skip


@pytest.mark.usefixtures("_with_detectron2")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"not trained: .*out/data/.* cannot be written"):
        run(tmp_path)


def test_without_detectron2_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs Detectron2, which is not installed: pip install"):
        run(tmp_path)


def test_configs_are_found_by_short_names():
    wanted = "dino/dino_r50_4scale_12ep"
    for name in ("dino_r50_4scale", "dino_r50_4scale_12ep", "dino/dino_r50_4scale", wanted):
        assert train.find_config(name) == wanted
    assert train.find_config("dn_detr_r50") == "dn_detr/dn_detr_r50_50ep"
