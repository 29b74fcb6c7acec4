import copy

import pytest
import torch
from torch import nn

from dino_d2.checkpoint import CheckpointError, load_weights, write_weights
from dino_d2.checkpoint.load import all_finite


def make_detector():
    return nn.ModuleDict({"neck": nn.Linear(2, 3), "heads": nn.Linear(3, 1)})


def assert_state(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


def test_file_and_dictionary_load_alike(tmp_path):
    source, from_file, from_names = make_detector(), make_detector(), make_detector()
    write_weights(source.state_dict(), tmp_path / "weights.pth")
    load_weights(from_file, tmp_path / "weights.pth")
    load_weights(from_names, source.state_dict())
    assert_state(from_file, source.state_dict())
    assert_state(from_names, source.state_dict())


def test_all_problems_are_listed_at_once_and_nothing_is_loaded():
    model = make_detector()
    before = copy.deepcopy(model.state_dict())
    weights = {"neck.weight": torch.ones(3, 2), "heads.weight": torch.ones(5, 3)}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, {**weights, "extra.one": torch.ones(1), "extra.two": torch.ones(1)})
    assert str(error.value).split("\n", 1) == [
        "the weights do not fit the model. 2 missing:",
        "  neck.bias\n  heads.bias\n2 unexpected:\n  extra.one\n  extra.two\n"
        "1 of another shape:\n  heads.weight: (5, 3) given, (1, 3) wanted\n"
        "`skip` (train.init_skip, in yacs MODEL.WEIGHTS_SKIP) leaves names out, by patterns; "
        "`classes` (train.init_classes, MODEL.WEIGHTS_CLASSES) takes classes over by names.",
    ]
    assert_state(model, before)


def test_skipped_names_stay_whatever_their_shape():
    model = make_detector()
    before = copy.deepcopy(model.state_dict())
    weights = {"neck.weight": torch.ones(3, 2), "neck.bias": torch.ones(3)}
    load_weights(model, {**weights, "heads.weight": torch.ones(5, 3)}, skip=["heads.*"])
    assert_state(model, {**before, **weights})


def test_patterns_allow_missing_and_unexpected_names():
    model = make_detector()
    before = copy.deepcopy(model.state_dict())
    weights = {"neck.weight": torch.ones(3, 2), "neck.bias": torch.ones(3), "old": torch.ones(1)}
    load_weights(model, weights, allow_missing=["heads.*"], allow_unexpected=["ol?"])
    assert_state(
        model, {**before, "neck.weight": weights["neck.weight"], "neck.bias": weights["neck.bias"]}
    )


def test_patterns_allow_nothing_else():
    weights = {**make_detector().state_dict(), "old": torch.ones(1), "older": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n  older$"):
        load_weights(make_detector(), weights, allow_unexpected=["old"])


def test_patterns_do_not_allow_another_shape():
    weights = {**make_detector().state_dict(), "neck.bias": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"neck.bias: \(4,\) given, \(3,\) wanted"):
        load_weights(make_detector(), weights, ["*"], ["*"])


@pytest.mark.parametrize(("source_wrapped", "target_wrapped"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_detector_and_meta_architecture_exchange_weights(source_wrapped, target_wrapped):
    detectors = source, target = make_detector(), make_detector()
    wrapped = source_wrapped, target_wrapped
    models = [
        nn.ModuleDict({"detector": model}) if wrap else model
        for model, wrap in zip(detectors, wrapped, strict=True)
    ]
    load_weights(models[1], models[0].state_dict())
    assert_state(target, source.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found(dtype):
    weights = torch.full((3, 40), torch.finfo(dtype).max, dtype=dtype)  # whose sum is infinite
    assert all_finite(weights)
    assert all_finite(weights[:0])
    for bad in (torch.nan, torch.inf, -torch.inf):
        ruined = weights.clone()
        ruined[1, 17] = bad
        assert not all_finite(ruined)
