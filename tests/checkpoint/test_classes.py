"""Fine-tuning for other classes: rows follow the names."""

import logging
import re

import pytest
import torch
from tiny import tiny_dino

from dino_d2.checkpoint import CheckpointError, ClassNames, load_weights, map_classes
from dino_d2.data.coco import COCO_CATEGORY_IDS, COCO_CLASSES, read_class_names

HEADS = [
    "query_source.class_head.weight",
    "query_source.class_head.bias",
    "heads.class_heads.0.weight",
    "heads.class_heads.0.bias",
    "denoising.label_embed.weight",
]
GIVEN = ["person", "traffic light", "dog", "cat", "zebra"]


def load(wanted, given=GIVEN, **settings):
    """(weights of five classes, model before, model after)."""
    source = tiny_dino().state_dict()
    model = tiny_dino(num_classes=len(wanted), **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(model, source, classes=ClassNames(given, wanted))
    return source, before, model.state_dict()


def test_rows_follow_their_names():
    wanted = ["cat", "unicorn", "Traffic_Light"]
    source, before, after = load(wanted)
    for name in HEADS:
        assert torch.equal(after[name][0], source[name][3])
        assert torch.equal(after[name][1], before[name][1])
        assert torch.equal(after[name][2], source[name][1])


def test_all_else_is_loaded_as_ever():
    source, _, after = load(["cat"])
    for name in source.keys() - set(HEADS):
        assert torch.equal(after[name], source[name]), name


def test_the_same_number_of_classes_in_another_order():
    source, _, after = load(GIVEN[::-1])
    for name in HEADS:
        assert torch.equal(after[name], source[name].flip(0))


def test_it_is_told_what_became_of_the_classes(caplog):
    with caplog.at_level(logging.INFO, "detectron2.dino_d2"):
        load(["cat", "unicorn"])
    assert caplog.messages == [
        "Classes kept: 1 (cat)",
        "Classes initialised: 1 (unicorn)",
        "Classes dropped: 4 (person, traffic light, dog, zebra)",
    ]


WRONG = {
    "none known": (["unicorn"], GIVEN, r"no class of the model \(unicorn, ...\) is among"),
    "other number": (["cat"], [*GIVEN[:4], "x", "y"], r"has rows of 5 classes, but 6 are named"),
    "one name twice": (["cat"], ["cat", "Cat", "a", "b", "c"], "two classes .* have one name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_mapped_is_an_error(case):
    wanted, given, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message):
        load(wanted, given)


def test_the_meta_architecture_is_mapped_too():
    """Its names have a prefix."""
    weights = {"detector.heads.class_heads.0.bias": torch.arange(5.0)}
    wanted = {"detector.heads.class_heads.0.bias": torch.zeros(2)}
    result = map_classes(weights, wanted, ClassNames(GIVEN, ["dog", "bird"]))
    assert result["detector.heads.class_heads.0.bias"].tolist() == [2, 0]


def test_names_of_coco():
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert read_class_names("coco") == COCO_CLASSES
    by_id = read_class_names("coco91")
    assert len(by_id) == 91
    assert [by_id[i] for i in COCO_CATEGORY_IDS] == COCO_CLASSES
    assert by_id[90] == "toothbrush"
    assert by_id.count("") == 11
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", name) for name in COCO_CLASSES)


@pytest.mark.detectron2
def test_names_of_coco_are_detectron2s():
    from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

    assert _get_builtin_metadata("coco")["thing_classes"] == COCO_CLASSES


def test_names_of_a_json(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"images": [], "annotations": [], "categories": '
        '[{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]}'
    )
    assert read_class_names(tmp_path / "a.json") == ["a", "b"]
