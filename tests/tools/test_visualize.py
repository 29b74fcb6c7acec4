"""The command draws its pictures for detectors with and without co-heads."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dino_d2 import model_zoo
from dino_d2.data.shapes import make_shapes
from dino_d2.tools import visualize
from dino_d2.types import Assignment, Detections, Queries

pytestmark = pytest.mark.detectron2

CONFIG = "dino/dino_shapes"
PICTURES = {"score_maps.png", "iof_iob.png", "query_positions.png"}


class StubCoHeads:
    """Two heads, one of which looks at the first token alone."""

    heads = {"first": None, "all": None}

    def __call__(self, memory, padding_mask, targets):
        anchors = torch.full((1, 4, 4), 0.5)
        assignment = Assignment(torch.zeros(2, dtype=torch.int64), torch.tensor([[1, 3]]), None)
        known = SimpleNamespace(queries=Queries(None, anchors), assignment=assignment)
        return SimpleNamespace(queries={"first": known, "all": known})

    def detect(self, name, memory, padding_mask):
        tokens = memory.tokens[0, :1] if name == "first" else memory.tokens[0]
        return [Detections(tokens.square().sum(-1), None, None)]


@pytest.fixture(scope="module")
def run_files(tmp_path_factory):
    """Options for a small untrained DINO on three images."""
    from detectron2.config import instantiate

    folder = tmp_path_factory.mktemp("visualize")
    path = make_shapes(folder, 3, 80)
    model = instantiate(model_zoo.get_config(CONFIG).model)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return {"--weights": str(folder / "model.pth"), "--data": f"{path}:{folder / 'images'}"}


def draw(options, out):
    arguments = [part for pair in options.items() for part in pair]
    visualize.main(["--config", CONFIG, "--num-images", "2", *arguments, "--out", str(out)])
    return {file.name for file in out.iterdir()}


def test_a_detector_without_co_heads(run_files, tmp_path, capsys):
    assert draw(run_files, tmp_path / "new" / "folder") == PICTURES
    assert capsys.readouterr().out.startswith("2 images; pictures are in ")
    for name in PICTURES:
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert picture.format == "PNG"


def test_a_detector_with_co_heads(run_files, tmp_path, capsys, monkeypatch):
    load = visualize.load

    def load_with_co_heads(*args):
        model, examples = load(*args)
        model.detector.co_heads = StubCoHeads()
        return model, examples

    monkeypatch.setattr(visualize, "load", load_with_co_heads)
    one = {**run_files, "--num-images": "1"}
    assert draw(one, tmp_path) == {*PICTURES, "head_distances.png"}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in printed[:3]] == ["decoder", "first", "all"]
    assert all(float(line.split()[-1]) > 0 for line in printed[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--config": "dino/dino_r5"}, "no config 'dino/dino_r5'"),
        ({"--data": "here.json:there"}, "does not exist"),
        ({"--config": "dino/dino_r50_4scale_12ep"}, "do not fit the model"),
    ],
)
def test_what_cannot_be_drawn_is_said(run_files, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        draw({**run_files, **change}, tmp_path)
