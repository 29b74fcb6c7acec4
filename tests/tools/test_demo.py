"""The demo on shrunken data: all its outputs, with Detectron2 and without; and its data."""

import contextlib
import io
import json
import random

import pytest
import torch
from PIL import Image

from dino_d2.backbones import TimmBackbone
from dino_d2.checkpoint import load_weights
from dino_d2.data.coco import Example
from dino_d2.models import build_dino, small
from dino_d2.tools import demo, make_shapes
from dino_d2.types import Target


@pytest.fixture(scope="module", autouse=True)
def _shrunken():
    """A few images of 80 pixels, and one thread for work this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SPLITS", {"train": (6, 1), "val": (4, 2)})
        patch.setattr(demo, "SIZE", 80)
        patch.setattr(small, "SMALL_BATCH", 2)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of 60 iterations in plain PyTorch, and what they printed."""
    out, printed = tmp_path_factory.mktemp("plain"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(out, 60, "--without-detectron2")
    return out, printed.getvalue()


def run(out, iterations, *options):
    demo.main(["--out", str(out), "--iterations", str(iterations), *options])


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def check_outputs(out, printed):
    """Pictures, weights, and a report that names them."""
    assert "On 4 held-out images:\nAP " in printed
    assert ", AP50 " in printed
    for name in ("detections.png", "curves.png", "model_final.pth"):
        assert str(out / name) in printed
        assert (out / name).stat().st_size > 1000
    for name in ("detections.png", "curves.png"):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
    for split, count in (("train", 6), ("val", 4)):
        assert len(list((out / split / "images").iterdir())) == count
    assert "bbox/AP50" in metrics(out)[-1]


def test_plain_pytorch_writes_everything_and_says_where(plain):
    out, printed = plain
    check_outputs(out, printed)
    assert "Training for 60 iterations in plain PyTorch" in printed
    assert "iteration 20 of 60, loss " in printed
    assert "iteration 60 of 60, loss " in printed
    assert "about 0 s left" in printed


def test_plain_pytorch_logs_as_detectron2_does(plain):
    *losses, precision = metrics(plain[0])
    assert [line["iteration"] for line in losses] == [19, 39, 59]
    assert precision["iteration"] == 59
    for line in losses:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert line["total_loss"] == pytest.approx(sum(parts))
        assert len(parts) > 6


def test_plain_pytorch_learns(plain):
    first, _, last, _ = metrics(plain[0])
    assert last["total_loss"] < first["total_loss"]


def test_the_weights_fit_the_demos_model(plain):
    backbone = TimmBackbone(**small.SMALL_BACKBONE)
    model = build_dino(backbone, num_classes=3, **small.SMALL_DINO)
    load_weights(model, plain[0] / "model_final.pth")


def test_running_again_keeps_the_data_and_replaces_the_figures(tmp_path):
    run(tmp_path, 1, "--without-detectron2")
    before = (tmp_path / "train" / "annotations.json").stat().st_mtime_ns
    run(tmp_path, 1, "--without-detectron2")
    assert (tmp_path / "train" / "annotations.json").stat().st_mtime_ns == before
    assert len(metrics(tmp_path)) == 1


@pytest.mark.detectron2
def test_detectron2_writes_everything_and_says_where(tmp_path, capfd):
    run(tmp_path, 2)
    printed = capfd.readouterr().out
    check_outputs(tmp_path, printed)
    assert "Training for 2 iterations with Detectron2" in printed


def test_without_detectron2_plain_pytorch_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    run(tmp_path, 1)
    assert "in plain PyTorch" in capsys.readouterr().out


def test_flipping_moves_boxes_with_their_pixels():
    image = torch.zeros(3, 4, 10, dtype=torch.uint8)
    image[:, :, 1:3] = 255
    example = Example(image, Target(torch.tensor([1]), torch.tensor([[0.2, 0.5, 0.2, 1.0]])), 1)
    rng, seen = random.Random(0), set()
    for _ in range(20):
        flipped, target = demo._flip(example, rng)
        columns = flipped[0, 0].nonzero().flatten().tolist()
        left = round((target.boxes[0, 0] - target.boxes[0, 2] / 2).item() * 10)
        assert columns == [left, left + 1]
        seen.add(left)
    assert seen == {1, 7}
    assert example.target.boxes.tolist() == [[pytest.approx(0.2), 0.5, pytest.approx(0.2), 1]]


def test_make_shapes_says_what_it_wrote(tmp_path, capsys):
    make_shapes.main(["--out", str(tmp_path), "--images", "50", "--size", "80"])
    printed = capsys.readouterr().err
    assert "50 images" in printed
    assert f"wrote 50 images and {tmp_path / 'annotations.json'}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "3"], "--out"),
        (["--out", "x"], "--images"),
        (["--out", "x", "--images", "3", "--setting", "medium"], "'easy', 'hard'"),
        (["--out", "x", "--images", "many"], "invalid int"),
    ],
)
def test_make_shapes_refuses_what_it_does_not_know(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        make_shapes.main(arguments)
    assert message in capsys.readouterr().err
