"""Objects365, CrowdHuman and LVIS by name."""

import copy
import json
import logging
import os
import subprocess
import sys

import pytest
from bad_data import CONTENT, write

pytestmark = pytest.mark.detectron2

NAMES = ["objects365_v2_train", "objects365_v2_val", "crowdhuman_train", "crowdhuman_val"]
IN_A_NEW_PROCESS = """
import dino_d2.d2
from dino_d2.d2.data import load_datasets
from detectron2.data import DatasetCatalog, MetadataCatalog
sources = load_datasets("objects365_v2_train")
assert sources == DatasetCatalog.get("objects365_v2_train")
print(len(sources), sources[0]["file_name"], MetadataCatalog.get("crowdhuman_val").image_root)
"""


def test_names_are_registered_with_the_package():
    from detectron2.data import DatasetCatalog, MetadataCatalog

    import dino_d2.d2  # noqa: F401

    for name in NAMES:
        assert name in DatasetCatalog.list()
        assert MetadataCatalog.get(name).evaluator_type == "coco"


def test_they_lie_below_the_folder_of_detectron2s(tmp_path):
    content = copy.deepcopy(CONTENT)
    for image in content["images"]:
        image["file_name"] = f"images/v1/patch3/{image['file_name']}"
    absent = "images/v1/patch6/objects365_v1_00320534.jpg"  # as in the published archives
    content["images"].append({**content["images"][0], "id": 10, "file_name": absent})
    path, _ = write(tmp_path / "objects365", content)
    path.rename(tmp_path / "objects365" / "zhiyuan_objv2_train.json")
    env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, file, images = done.stdout.splitlines()[-1].split()
    assert count == "2"
    assert "does not have: 1 (patch6/objects365_v1_00320534.jpg)" in done.stderr
    assert file == f"{tmp_path}/objects365/train/patch3/a.png"
    assert images == f"{tmp_path}/crowdhuman/Images"


@pytest.fixture
def lvis(tmp_path):
    """A small data set of LVIS's format under a name."""
    pytest.importorskip("lvis", reason="LVIS's evaluation needs its package: pip install lvis")
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_lvis_instances

    content = {**copy.deepcopy(CONTENT), "categories": []}
    for number in range(1, 1204):
        entry = {"id": number, "name": f"c{number}", "frequency": "f", "image_count": 1}
        content["categories"].append(entry)
    for image in content["images"]:
        more = {"not_exhaustive_category_ids": [], "neg_category_ids": []}
        image.update(coco_url=f"http://x.org/train2017/{image['file_name']}", **more)
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path, folder = write(tmp_path, content)
    register_lvis_instances("lvis_v1_small", {}, str(path), str(folder))
    yield "lvis_v1_small"
    DatasetCatalog.remove("lvis_v1_small")
    MetadataCatalog.remove("lvis_v1_small")


def test_lvis_is_loaded_checked_and_repeated(lvis, tmp_path, caplog):
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    cfg = model_zoo.get_config("dino/dino_r50_4scale_lvis_24ep")
    cfg.dataloader.train.dataset.names = lvis
    sampler = cfg.dataloader.train.sampler
    sampler.repeat_factors.repeat_thresh = 2.0
    with caplog.at_level(logging.INFO, "detectron2.dino_d2"):
        factors = instantiate(sampler.repeat_factors)
    assert factors.tolist() == [pytest.approx(2.0), 1.0]  # classes of the first: half of all images
    assert "images without objects" in caplog.text


def test_lvis_is_evaluated(lvis, tmp_path):
    import torch
    from detectron2.config import instantiate
    from detectron2.structures import Boxes, Instances

    from dino_d2 import model_zoo
    from dino_d2.d2.data import load_datasets

    cfg = model_zoo.get_config("dino/dino_r50_4scale_lvis_24ep")
    cfg.dataloader.test.dataset.names = lvis
    evaluator = instantiate(cfg.dataloader.evaluator)
    evaluator.reset()
    for source in load_datasets(lvis):
        boxes = torch.tensor([e["bbox"] for e in source["annotations"]]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((source["height"], source["width"]), pred_boxes=Boxes(boxes))
        found.scores = torch.full((len(boxes),), 0.9)
        found.pred_classes = torch.tensor([e["category_id"] for e in source["annotations"]]).long()
        evaluator.process([source], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_without_lvis_it_says_what_to_install(monkeypatch):
    from dino_d2.d2.data import lvis_evaluator

    monkeypatch.setitem(sys.modules, "lvis", None)
    monkeypatch.setitem(sys.modules, "lvis.eval", None)
    with pytest.raises(ImportError, match="pip install lvis"):
        lvis_evaluator("lvis_v1_val")


def test_frequencies_of_classes():
    from dino_d2.d2.data import class_frequencies

    assert len(class_frequencies("lvis_v1_train")) == 1203
    with pytest.raises(ValueError, match="'coco_2017_val' has no class_image_count"):
        class_frequencies("coco_2017_val")


def test_masks_of_a_registered_set_do_not_reach_training(tmp_path):
    from dino_d2.d2.mapper import CheckedMapper

    write(tmp_path)
    box = {"bbox": [8, 6, 16, 12], "bbox_mode": 1, "category_id": 0, "segmentation": [[1e9] * 6]}
    source = {"file_name": f"{tmp_path}/a.png", "image_id": 1, "annotations": [box]}
    instances = CheckedMapper(is_train=True, augmentations=[])(source)["instances"]
    assert instances.get_fields().keys() == {"gt_boxes", "gt_classes"}
    assert json.dumps(source["annotations"][0]["bbox"]) == "[8, 6, 16, 12]"
