import argparse

import pytest
import torch
from golden import official_state

from dino_d2.checkpoint import read_weights
from dino_d2.data.coco import COCO_CATEGORY_IDS
from dino_d2.tools import convert_checkpoint

CASE = "dino/dino_4scale_r50_eval"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as the authors publish them."""
    path = tmp_path_factory.mktemp("published") / "checkpoint0011_4scale.pth"
    torch.save({"model": official_state(CASE), "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def test_picks_the_80_classes(published, tmp_path, capsys):
    out = tmp_path / "dino.safetensors"
    convert_checkpoint.main(["--from", "dino", str(published), str(out)])
    assert "80 classes" in capsys.readouterr().out
    theirs = official_state(CASE)["class_embed.0.weight"]
    ours = read_weights(out)["heads.class_heads.0.weight"]
    assert torch.equal(ours, theirs[COCO_CATEGORY_IDS])


@pytest.mark.detectron2
@pytest.mark.parametrize("num_classes", [80, 91])
def test_checks_against_a_config(published, tmp_path, num_classes):
    out = tmp_path / "dino.pth"
    arguments = ["--from", "dino", str(published), str(out), "--num-classes", str(num_classes)]
    convert_checkpoint.main([*arguments, "--config", "dino/dino_r50_4scale_12ep"])
    wanted = convert_checkpoint.state_of_config("dino/dino_r50_4scale_12ep", num_classes)
    assert {n: t.shape for n, t in read_weights(out).items()} == {
        n: t.shape for n, t in wanted.items()
    }


@pytest.mark.detectron2
def test_another_model_is_refused_and_nothing_written(published, tmp_path):
    out = tmp_path / "dino.pth"
    with pytest.raises(SystemExit, match=r"neck\.projections\.4\.0\.weight"):
        convert_checkpoint.main(
            ["--from", "dino", str(published), str(out), "--config", "dino/dino_r50_5scale_12ep"]
        )
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "detrex"], r"unknown weight 'transformer\.level_embed'"),
        (["--from", "dino", "--num-classes", "7"], "cannot turn 91 classes into 7"),
        (["--from", "dino", "--config", "dino/none"], "no config 'dino/none'"),
    ],
)
def test_errors_end_in_a_message(published, tmp_path, arguments, message):
    out = tmp_path / "dino.pth"
    with pytest.raises(SystemExit, match=message):
        convert_checkpoint.main([*arguments, str(published), str(out)])
    assert not out.exists()
