"""Co-DETR's weights, by the names of its repository."""

import re

import pytest
import torch
from golden import read_json
from tiny import SETTINGS, StubBackbone, add_noise, tiny_batch, tiny_detector

from dino_d2.checkpoint import CheckpointError, convert
from dino_d2.checkpoint.names import official_co_detr, rename
from dino_d2.models import build_co_detr, build_dino

HEADS = ("faster_rcnn", "atss")
NAMES = {
    case: list(read_json(f"co_detr/{case}", "spec")["parameters"])
    for case in ("co_dino_r50_eval", "co_deformable_r50_eval")
}
cases = pytest.mark.parametrize("case", NAMES)


@cases
def test_every_name_has_one_of_ours(case):
    table = official_co_detr(NAMES[case])
    ours = [rename(name, table) for name in NAMES[case]]
    assert None not in ours
    assert len(set(ours)) == len(ours)
    for head in HEADS:
        assert any(name.startswith(f"co_heads.heads.{head}.") for name in ours)
        assert f"co_heads.queries.{head}.from_box.weight" in ours


def small(names):
    return {name: torch.zeros(2, 2) for name in names}


@cases
def test_without_heads(case):
    kept = convert(small(NAMES[case]), "co-detr", co_heads=False)
    assert not any(name.startswith("co_heads") for name in kept)
    with_heads = convert(small(NAMES[case]), "co-detr")
    assert {name for name in with_heads if not name.startswith("co_heads")} == set(kept)


def test_a_single_head_has_the_first_number():
    """The repository counts the heads that there are."""
    left_out = r"rpn_head|roi_head|aux_pos_trans(_norm)?\.1|pos_feats_\w+\.1"
    names = [n for n in NAMES["co_deformable_r50_eval"] if not re.search(left_out, n)]
    weights = small(names)
    weights["query_head.transformer.head_pos_embed.weight"] = torch.tensor([[7.0]])
    ours = convert(weights, "co-detr")
    assert {n.split(".")[2] for n in ours if n.startswith("co_heads.queries")} == {"atss"}
    assert ours["co_heads.queries.atss.head_embed"].tolist() == [7.0]


def test_each_head_gets_its_row():
    weights = small(NAMES["co_deformable_r50_eval"])
    weights["query_head.transformer.head_pos_embed.weight"] = torch.tensor([[3.0], [4.0]])
    ours = convert(weights, "co-detr")
    rows = [ours[f"co_heads.queries.{head}.head_embed"].tolist() for head in HEADS]
    assert rows == [[3.0], [4.0]]


def test_mask_heads_are_left_out_and_others_not():
    weights = small(NAMES["co_dino_r50_eval"])
    weights["mask_head.stage1.weight"] = weights["mask_iou_head.fc.weight"] = torch.zeros(1)
    assert not any("mask" in name for name in convert(weights, "co-detr"))
    weights["bbox_head.1.paa_cls.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"bbox_head\.1\.paa_cls"):
        convert(weights, "co-detr")


def test_a_model_without_heads_takes_weights_without_them():
    with_heads = tiny_detector("co_dino")
    base = build_co_detr(build_dino(StubBackbone(), **SETTINGS, denoising_queries=16), {}).double()
    add_noise(base)
    state = with_heads.state_dict()
    base.load_state_dict({n: t for n, t in state.items() if not n.startswith("co_heads.")})
    batch = tiny_batch()
    for expected, actual in zip(with_heads.eval()(*batch), base.eval()(*batch), strict=True):
        torch.testing.assert_close(actual, expected)
