import pytest
import torch

from dino_d2.box_ops import cxcywh_to_xyxy
from dino_d2.co_heads import BACKGROUND, IGNORED, Candidates, PositiveQueries
from dino_d2.losses import pack_targets
from dino_d2.types import Target

DIM, SIZE = 32, (40, 20)


def make_candidates(matched, share=1):
    matched = torch.tensor(matched)
    torch.manual_seed(len(matched))
    low = torch.rand(len(matched), 2) * 10
    features = torch.randn(len(matched) // share, DIM)
    return Candidates(torch.cat([low, low + 5], 1), matched, features)


def make_targets(*counts):
    targets = [Target(torch.zeros(n, dtype=torch.int64), torch.full((n, 4), 0.5)) for n in counts]
    return pack_targets(targets, 5, torch.zeros(()))


def run(*matched, counts=(2, 3), features=False, share=1, **options):
    torch.manual_seed(0)
    queries = PositiveQueries(DIM, given_positions=features, use_features=features, **options)
    candidates = [make_candidates(m, share) for m in matched]
    return queries, candidates, queries(candidates, make_targets(*counts), [SIZE] * len(matched))


FEW = [0, BACKGROUND, 1, IGNORED, BACKGROUND, BACKGROUND]
MANY = [2, 0, BACKGROUND, 1, 1, 0, BACKGROUND]


def test_positives_first_then_negatives():
    _, candidates, known = run(FEW, MANY, fewest=2)
    anchors = known.queries.anchors
    assert anchors.shape == (2, 5, 4)  # as many as MANY has
    assert known.padding is None
    assert known.attn_mask() is None
    boxes = cxcywh_to_xyxy(anchors) * torch.tensor(SIZE * 2)
    torch.testing.assert_close(boxes[0, :2], candidates[0].boxes[[0, 2]])
    negatives = candidates[0].boxes[[1, 4, 5]]
    distance = (boxes[0, 2:, None] - negatives).abs().amax(-1)
    assert sorted((distance < 1e-3).nonzero()[:, 1].tolist()) == [0, 1, 2]
    torch.testing.assert_close(boxes[1], candidates[1].boxes[[0, 1, 3, 4, 5]])
    image, (query,), (target,) = known.assignment
    assert image.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert query.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert target.tolist() == [0, 1, 4, 2, 3, 3, 2]  # objects of image 1 count from 2


def test_no_more_than_the_most():
    _, candidates, known = run(FEW, MANY, fewest=1, most=3)
    image, _, (target,) = known.assignment
    assert image.tolist() == [0, 0, 1, 1, 1]
    boxes = cxcywh_to_xyxy(known.queries.anchors[1]) * torch.tensor(SIZE * 2)
    for row, t in zip(boxes, target[2:].tolist(), strict=True):
        same = (candidates[1].boxes - row).abs().amax(1) < 1e-3
        assert candidates[1].matched[same].tolist() == [t - 2]


def test_at_least_the_fewest_and_padding_without_enough_negatives():
    """Three negatives are too few for nine places: the rest is hidden and has no loss."""
    _, _, known = run(FEW, MANY)
    assert known.queries.anchors.shape[1] == 9
    assert known.padding.tolist() == [[False] * 5 + [True] * 4, [False] * 7 + [True] * 2]
    mask = known.attn_mask()
    assert mask.shape == (2, 9, 9)
    assert mask[0, 0].tolist() == known.padding[0].tolist()
    assert not mask[:, range(9), range(9)].any()  # somebody is always seen
    assert (known.queries.anchors[0, 5:] == 0).all()


def test_places_may_stay_empty():
    _, _, known = run(FEW, MANY, fewest=2, pad_with_negatives=False)
    assert known.padding.tolist() == [[False] * 2 + [True] * 3, [False] * 5]


def test_no_objects_at_all():
    _, _, known = run([BACKGROUND] * 20, [BACKGROUND] * 20, counts=(0, 0))
    assert known.queries.anchors.shape == (2, 9, 4)
    assert known.assignment.query.shape == (1, 0)
    assert known.padding is None


@pytest.mark.parametrize("share", [1, 3])
def test_content_and_positions(share):
    """Linear(PE) and Linear(feature) in the form of Deformable DETR."""
    queries, candidates, known = run(FEW, counts=(2,), features=True, fewest=2, share=share)
    torch.nn.init.normal_(queries.head_embed)
    known = queries(candidates, make_targets(2), [SIZE])
    angles = 2 * torch.pi * known.queries.anchors[0, 0].clamp(1e-5, 1 - 1e-5)
    frequency = 10000 ** (-2 * (torch.arange(DIM // 2) // 2) / (DIM // 2))
    waves = angles[:, None] * frequency
    waves = torch.where(torch.arange(DIM // 2) % 2 == 0, waves.sin(), waves.cos())
    encoded = queries.from_box_norm(queries.from_box(waves.flatten()))
    feature = queries.from_feature_norm(queries.from_feature(candidates[0].features[0]))
    torch.testing.assert_close(known.queries.positions[0, 0], encoded[:DIM] + queries.head_embed)
    torch.testing.assert_close(known.queries.content[0, 0], encoded[DIM:] + feature)


def test_embedding_of_the_head():
    assert PositiveQueries(DIM, True, True).head_embed.shape == (1,)
    assert PositiveQueries(DIM, True, True, embed_per_channel=True).head_embed.shape == (DIM,)
    assert PositiveQueries(DIM, False, False).head_embed is None


def test_a_head_without_features():
    queries = PositiveQueries(DIM, True, True)
    candidates = make_candidates(FEW)._replace(features=None)
    with pytest.raises(ValueError, match="without features"):
        queries([candidates], make_targets(2), [SIZE])
