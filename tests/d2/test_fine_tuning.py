"""Training from a checkpoint with other classes."""

import json
import logging
from pathlib import Path

import pytest
from shapes_run import make_config, make_data

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]


def test_classes_are_taken_over_by_name(tmp_path, caplog):
    import torch
    from detectron2.config import instantiate

    from dino_d2.d2 import train

    data = make_data(tmp_path / "data")
    path = Path(data.split(":")[0])
    cfg = make_config(tmp_path / "out", data, 1)
    weights = instantiate(cfg.model).state_dict()
    torch.save({"model": weights}, tmp_path / "three.pth")
    (tmp_path / "three.json").write_text(path.read_text())
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], ("Square", "blob", "circle"), strict=True):
        category["name"] = name
    path.write_text(json.dumps(content))
    options = [f"train.init_checkpoint={tmp_path}/three.pth", "optimizer.lr=0"]
    options += [f"train.init_classes={tmp_path}/three.json"]
    with caplog.at_level(logging.INFO, "detectron2.dino_d2"):
        train(make_config(tmp_path / "out", data, 1, *options))
    assert "Classes kept: 2 (Square, circle)" in caplog.messages
    assert "Classes dropped: 1 (triangle)" in caplog.messages
    name = "detector.heads.class_heads.0.weight"
    found = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"][name]
    assert torch.equal(found[0], weights[name][1])
    assert torch.equal(found[2], weights[name][0])
    assert not torch.equal(found[1], weights[name][2])
