"""What Detectron2's loaders get is checked, wherever it comes from."""

import copy
import logging

import numpy as np
import pytest
import torch
from bad_data import CONTENT, added, changed, write
from PIL import Image

from dino_d2.data.findings import DataError

pytestmark = pytest.mark.detectron2


def load(folder, content=CONTENT, **pictures):
    from dino_d2.d2.data import load_datasets

    return load_datasets(":".join(map(str, write(folder, content, **pictures))))


@pytest.fixture
def registered(request):
    """A function that registers what a function returns, until the test is over."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = f"of {request.node.name}"

    def register(sources, **metadata):
        DatasetCatalog.register(name, lambda: sources)
        MetadataCatalog.get(name).set(thing_classes=["dog", "cat"], **metadata)
        return name

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_entries_are_detectron2s(tmp_path):
    from detectron2.data.datasets import load_coco_json

    paths = write(tmp_path)
    assert load(tmp_path) == load_coco_json(*map(str, paths), "test_entries_are_detectron2s")


def test_bad_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"annotation 2 .*category_id 77"):
        load(tmp_path, changed(annotations={"category_id": 77}))


def test_drops_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "detectron2.dino_d2"):
        sources = load(tmp_path, changed(annotations={"bbox": [1, 2, float("nan"), 4]}))
    assert [len(source["annotations"]) for source in sources] == [1, 0]
    assert "dropped: box is not finite: 1 (image 7, annotation 2" in caplog.text


def test_registered_jsons_are_checked_too(tmp_path):
    from detectron2.data.datasets import register_coco_instances

    from dino_d2.d2.data import load_datasets

    paths = write(tmp_path, added("images"))
    register_coco_instances("json with an image id twice", {}, *map(str, paths))
    with pytest.raises(DataError, match=r"image id twice: 1 \(images\[2\], id 9\)"):
        load_datasets("json with an image id twice")


def of_function(**fields):
    """What a registered function may return: two boxes as corners."""
    entries = [{"bbox": [1, 2, 11, 22], "bbox_mode": 0, "category_id": 0} for _ in range(2)]
    entries[1].update(fields)
    file = {"file_name": "a.png", "height": 60, "width": 80, "image_id": "x"}
    return [{**file, "annotations": entries}, {**file, "image_id": "y", "annotations": []}]


def test_registered_functions_are_checked_too(registered):
    from dino_d2.d2.data import load_datasets

    sources = of_function(bbox=[5, 5, 5, 9])
    before = copy.deepcopy(sources)
    name = registered(sources)
    assert [source["annotations"] for source in load_datasets(name)] == [
        before[0]["annotations"][:1],
        [],
    ]
    assert sources == before
    sources[0]["annotations"][1]["category_id"] = 2
    with pytest.raises(DataError, match=r"(?s)'of test.*image \"x\", annotation 2 .*category_id 2"):
        load_datasets(name)


def test_the_evaluator_knows_the_drops(tmp_path):
    from dino_d2.d2.data import coco_evaluator

    content = changed(annotations={"bbox": [1, 2, 0, 4]})
    evaluator = coco_evaluator(":".join(map(str, write(tmp_path, content))))
    assert [entry["id"] for entry in evaluator._coco_api.anns.values()] == [1]
    assert evaluator._metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1}


def test_annotations_with_id_0_can_be_found(tmp_path):
    """pycocotools takes the id 0 of a matched annotation for no match."""
    from detectron2.structures import Boxes, Instances

    from dino_d2.d2.data import coco_evaluator

    content = changed(annotations={"id": 0})
    evaluator = coco_evaluator(":".join(map(str, write(tmp_path, content))))
    evaluator.reset()
    found = Instances((60, 80))
    found.pred_boxes = Boxes(torch.tensor([[8.0, 6, 24, 18], [1, 2, 4, 6]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.9]), torch.tensor([0, 1])
    nothing = found[:0]
    sources = [{"image_id": 7}, {"image_id": 9}]
    evaluator.process(sources, [{"instances": found}, {"instances": nothing}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def mapper(**options):
    from dino_d2.d2.mapper import CheckedMapper

    return CheckedMapper(**{"is_train": True, "augmentations": [], **options})


def test_the_mapper_gives_what_detectron2s_does(tmp_path):
    import detectron2.data.transforms as T  # noqa: N812
    from detectron2.data import DatasetMapper

    sources = load(tmp_path)
    augmentations = [T.RandomFlip(1.0), T.Resize((30, 45))]
    for image_format in ("RGB", "BGR"):
        settings = {"augmentations": augmentations, "image_format": image_format}
        for is_train in (True, False):
            ours = mapper(is_train=is_train, **settings)(sources[0])
            theirs = DatasetMapper(is_train=is_train, **settings)(sources[0])
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours["image"], theirs["image"])
            if is_train:
                boxes = [x["instances"].gt_boxes.tensor for x in (ours, theirs)]
                assert torch.equal(*boxes)
    assert len(sources[0]["annotations"]) == 2


def test_an_image_of_one_column_can_be_mirrored(tmp_path):
    import detectron2.data.transforms as T  # noqa: N812

    Image.new("RGB", (1, 9)).save(tmp_path / "line.png")
    source = {"file_name": str(tmp_path / "line.png"), "image_id": 1}
    assert mapper(augmentations=[T.RandomFlip(1.0)])(source)["image"].shape == (3, 9, 1)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(np.ones((50, 40), np.int32)), r"image 9: .*b\.png: holds 32-bit"),
        (Image.new("RGB", (50, 40)), r"image 9: .*b\.png: 40 x 50 in the json, 50 x 40"),
    ],
    ids=["32 bits", "size"],
)
def test_the_mapper_names_the_image(tmp_path, picture, message):
    _, source = load(tmp_path)
    picture.save(tmp_path / "b.tiff")
    (tmp_path / "b.tiff").rename(tmp_path / "b.png")
    with pytest.raises(DataError, match=message):
        mapper()(source)


def test_sizes_are_added_where_they_are_unknown(tmp_path):
    _, source = load(tmp_path)
    del source["width"], source["height"]
    assert mapper()(source)["height"] == 50


def test_an_unknown_format_is_an_error():
    with pytest.raises(ValueError, match="must be RGB or BGR, not 'L'"):
        mapper(image_format="L")
