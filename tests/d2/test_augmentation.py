"""Large-scale jitter and copy-paste, on pictures whose pixels say where their objects are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dino_d2 import model_zoo
from dino_d2.data.findings import DataError
from dino_d2.data.shapes import make_shapes

pytestmark = pytest.mark.detectron2

TRIANGLE = [20, 20, 120, 20, 20, 100]  # right-angled: a crop's box differs from the cropped box
CORNERS = [20, 20, 120, 100]


@pytest.fixture
def mapper():
    """Makes images of 64 x 64."""
    from dino_d2.d2.augmentation import JitterMapper, large_scale_jitter

    np.random.seed(0)  # Detectron2's transforms draw from it
    return JitterMapper(large_scale_jitter(64), "RGB")


@pytest.fixture
def entry(tmp_path):
    """A red triangle on black, in Detectron2's form."""
    from detectron2.structures import BoxMode

    y, x = np.mgrid[:150, :200] + 0.5
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[(x > 20) & (y > 20) & ((x - 20) / 100 + (y - 20) / 80 < 1), 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    triangle = {
        "bbox": CORNERS,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": [TRIANGLE],
    }
    file = {"file_name": str(tmp_path / "red.png"), "height": 150, "width": 200, "image_id": 9}
    return {**file, "annotations": [triangle]}


def without_masks(entry):
    annotations = [
        {k: v for k, v in a.items() if k != "segmentation"} for a in entry["annotations"]
    ]
    return {**entry, "annotations": annotations}


def make_example(boxes, classes, value, masks=True, size=(60, 80)):
    """An image of one grey with objects that fill their boxes."""
    from detectron2.structures import BitMasks, Boxes, Instances

    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        bits = torch.zeros(len(boxes), *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(bits, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        instances.gt_masks = BitMasks(bits)
    image = torch.full((3, *size), value, dtype=torch.uint8)
    return {"image": image, "instances": instances, "image_id": value}


def paste(example, partner, chosen):
    from dino_d2.d2.augmentation import paste_objects

    return paste_objects(example, partner, torch.tensor(chosen, dtype=torch.int64))


def boxes_of(example):
    return example["instances"].gt_boxes.tensor.tolist()


def extent(marked):
    """Corners of the pixels that are True."""
    rows, columns = marked.any(1).nonzero()[:, 0], marked.any(0).nonzero()[:, 0]
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]


def test_jittered_boxes_are_tight_around_what_is_left(mapper, entry):
    scales = []
    for _ in range(60):
        example = mapper(entry)
        assert example["image"].shape == (3, 64, 64)
        red = (example["image"][0] > 127) & (example["image"][1] < 57)  # padding is grey
        if not len(example["instances"]):
            assert red.sum() < 20
            continue
        (box,) = boxes_of(example)
        assert box == pytest.approx(extent(red), abs=2)
        scales.append((example["image"][1] < 57).any(0).sum().item())
    assert min(scales) < 20
    assert scales.count(64) > 20  # padded, and cropped


def test_without_masks_boxes_are_cropped(mapper, entry):
    """Some are wider than the part of the triangle that is left."""
    examples = [mapper(without_masks(entry)) for _ in range(60)]
    found = 0
    for example in examples:
        assert not example["instances"].has("gt_masks")
        red = (example["image"][0] > 127) & (example["image"][1] < 57)
        for x0, y0, x1, y1 in boxes_of(example):
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            found += not red.any() or max(x1 - extent(red)[2], y1 - extent(red)[3]) > 5
    assert found > 5


def test_masks_of_some_objects_count_for_nothing(mapper, entry):
    bare = without_masks(entry)["annotations"]
    for _ in range(20):
        example = mapper({**entry, "annotations": [*entry["annotations"], *bare]})
        assert not example["instances"].has("gt_masks")
        assert boxes_of(example)[:1] == boxes_of(example)[1:]


def test_polygons_and_run_length_codes_give_the_same(mapper, entry):
    from pycocotools import mask as coco_mask

    code = coco_mask.merge(coco_mask.frPyObjects([TRIANGLE], 150, 200))
    coded = {**entry, "annotations": [{**entry["annotations"][0], "segmentation": code}]}
    for seed in range(20):
        examples = []
        for source in (entry, coded):
            np.random.seed(seed)
            examples.append(mapper(source))
        assert boxes_of(examples[0]) == boxes_of(examples[1])


@pytest.mark.parametrize("crowd", [False, True], ids=["empty", "only crowd"])
def test_images_without_objects(mapper, entry, crowd):
    annotations = [{**entry["annotations"][0], "iscrowd": 1}] if crowd else []
    empty = {**entry, "annotations": annotations}
    assert boxes_of(mapper(empty)) == []
    assert boxes_of(mapper({**empty, "partner": empty})) == []
    found = [boxes_of(mapper({**empty, "partner": entry})) for _ in range(20)]
    assert {len(boxes) for boxes in found} == {0, 1}


def test_objects_are_pasted_with_their_pixels():
    example = make_example([[0, 0, 10, 10]], [3], 10)
    partner = make_example([[30, 20, 50, 40], [60, 5, 70, 15]], [4, 5], 20)
    result = paste(example, partner, [1])
    assert boxes_of(result) == [[0, 0, 10, 10], [60, 5, 70, 15]]
    assert result["instances"].gt_classes.tolist() == [3, 5]
    assert result["image_id"] == 10
    expected = torch.full((3, 60, 80), 10, dtype=torch.uint8)
    expected[:, 5:15, 60:70] = 20
    assert torch.equal(result["image"], expected)
    masks = result["instances"].gt_masks.tensor
    assert [extent(mask) for mask in masks] == boxes_of(result)


def test_nothing_chosen_changes_nothing():
    example = make_example([[0, 0, 10, 10]], [3], 10)
    assert paste(example, make_example([[0, 0, 50, 40]], [4], 20), []) is example


@pytest.mark.parametrize(
    ("box", "cover", "left"),
    [
        ([10, 10, 30, 30], [0, 0, 40, 40], None),  # out of sight
        ([0, 0, 8, 8], [0, 0, 8, 8], None),  # the same where no side can move by 10
        ([10, 10, 30, 30], [19, 0, 40, 40], None),  # the side moved by 11, 180 pixels are left
        ([10, 10, 30, 30], [20, 0, 40, 40], [10, 10, 20, 30]),  # 200, but the side moved by 10
        ([10, 10, 60, 30], [26, 0, 80, 40], [10, 10, 26, 30]),  # moved by 34, but 320 are left
        ([10, 10, 60, 30], [25, 0, 80, 40], None),  # 300 are left
        ([10, 10, 60, 50], [20, 20, 30, 30], [10, 10, 60, 50]),  # a hole
        ([10, 10, 12, 12], [40, 40, 50, 50], [10, 10, 12, 12]),  # small but free
    ],
)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_covered_objects(box, cover, left, masks):
    example, partner = make_example([box], [1], 10, masks), make_example([cover], [2], 20, masks)
    result = paste(example, partner, [0])
    assert boxes_of(result) == [*([left] if left else []), cover]
    assert result["instances"].has("gt_masks") == masks
    if masks and left:
        assert extent(result["instances"].gt_masks.tensor[0]) == left


def test_boxes_of_free_objects_stay_exact():
    example = make_example([[0, 0, 10, 10]], [3], 10, masks=False)
    example["instances"].gt_boxes.tensor += 0.3
    result = paste(example, make_example([[30, 30, 40, 40]], [4], 20, masks=False), [0])
    assert boxes_of(result)[0] == pytest.approx([0.3, 0.3, 10.3, 10.3])


def test_a_box_is_pasted_with_the_pixels_it_touches():
    partner = make_example([[30, 20, 50, 40]], [4], 20, masks=False)
    partner["instances"].gt_boxes.tensor += torch.tensor([0.3, 0.3, -0.3, -0.3])
    result = paste(make_example([], [], 10, masks=False), partner, [0])
    assert extent(result["image"][0] == 20) == [30, 20, 50, 40]


@pytest.mark.parametrize("masks", [True, False])
def test_masks_go_where_only_one_of_the_images_has_them(masks):
    example = make_example([[0, 0, 10, 10]], [3], 10, masks)
    result = paste(example, make_example([[30, 20, 50, 40]], [4], 20, not masks), [0])
    assert boxes_of(result) == [[0, 0, 10, 10], [30, 20, 50, 40]]
    assert not result["instances"].has("gt_masks")


def test_images_of_different_sizes():
    partner = make_example([[0, 0, 5, 5]], [1], 20, size=(60, 81))
    with pytest.raises(ValueError, match=r"from an image of \(60, 81\) pixels onto \(60, 80\)"):
        paste(make_example([], [], 10), partner, [0])


def test_a_random_number_of_the_partners_objects_is_pasted(mapper, entry, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "dino_d2.d2.augmentation.paste_objects", lambda e, p, chosen: drawn.append(chosen.tolist())
    )
    mapper.augmentations.augs.clear()
    mapper.max_pasted = 3
    partner = {**entry, "annotations": [dict(*entry["annotations"]) for _ in range(5)]}
    for _ in range(40):
        mapper({**entry, "partner": partner})
    assert {len(chosen) for chosen in drawn} == {0, 1, 2}
    assert {index for chosen in drawn for index in chosen} == {0, 1, 2, 3, 4}
    assert all(len(set(chosen)) == len(chosen) for chosen in drawn)


def test_partners_are_drawn_from_the_whole_data_set_as_numpy_is_seeded():
    from dino_d2.d2.augmentation import Pairs

    pairs = Pairs([{"image_id": i} for i in range(6)])
    assert len(pairs) == 6
    runs = []
    for _ in range(2):
        np.random.seed(3)
        runs.append([pairs[i % 6] for i in range(60)])
    assert runs[0] == runs[1]
    assert [pair["image_id"] for pair in runs[0][:6]] == [0, 1, 2, 3, 4, 5]
    assert {pair["partner"]["image_id"] for pair in runs[0]} == set(range(6))


def test_detections_on_a_padded_square_go_back_to_the_image(entry):
    from dino_d2.d2.augmentation import SquareMapper, fit_into_square

    example = SquareMapper(fit_into_square(64), "RGB")(entry)
    image = example["image"]
    assert image.shape == (3, 64, 64)
    assert (image[:, 48:] == 114).all()
    scale = example["height"] / 64
    assert example["width"] == example["height"]
    assert [x * scale for x in extent(image[0, :48] > 127)] == pytest.approx(CORNERS, abs=5)


def test_images_are_checked(mapper, entry):
    from dino_d2.d2.augmentation import SquareMapper, fit_into_square

    Image.open(entry["file_name"]).convert("F").save(entry["file_name"], "TIFF")
    for chosen, source in (
        (mapper, entry),
        (mapper, {**entry, "partner": entry}),
        (SquareMapper(fit_into_square(64), "RGB"), entry),
    ):
        with pytest.raises(DataError, match=r"image 9: .*red\.png: holds floating-point values"):
            chosen(source)


@pytest.fixture
def dataloader(tmp_path):
    """The config's, for three generated images, one of them without objects."""
    from detectron2.config import LazyConfig

    path = make_shapes(tmp_path, 3, 96)
    content = json.loads(path.read_text())
    entries = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    path.write_text(json.dumps({**content, "annotations": entries}))
    file = model_zoo.root() / "configs" / "common" / "data" / "coco_lsj.py"
    cfg = LazyConfig.load(str(file)).dataloader
    cfg.train.dataset.names = cfg.test.dataset.names = f"{path}:{tmp_path / 'images'}"
    cfg.train.mapper.augmentations.size = 128
    cfg.train.total_batch_size, cfg.train.num_workers, cfg.test.num_workers = 2, 1, 0
    return cfg


def test_the_loaders_of_the_config(dataloader):
    from detectron2.config import instantiate

    batches = iter(instantiate(dataloader.train))
    examples = [example for _ in range(8) for example in next(batches)]
    assert {tuple(example["image"].shape) for example in examples} == {(3, 128, 128)}
    counts = [len(example["instances"]) for example in examples]
    assert max(counts) > 0
    assert all(example["instances"].has("gt_masks") for example in examples)
    for loader in (dataloader.test, dataloader.matching):
        (example,) = next(iter(instantiate(loader)))
        assert example["image"].shape == (3, 128, 128)
    assert "instances" in example
