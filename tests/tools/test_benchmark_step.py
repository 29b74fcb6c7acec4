import pytest
import torch
from tiny import tiny_detector

from dino_d2.tools import benchmark_step


def test_report(monkeypatch, capsys):
    """Co-heads cost a training step, and inference nothing that matters here."""
    models = {
        "with": tiny_detector("co_dino", torch.float32),
        "without": tiny_detector("dino", torch.float32),
    }
    monkeypatch.setattr(benchmark_step, "build", models.get)
    size = ["--height", "64", "--width", "96", "--objects", "2"]
    benchmark_step.main(["with", "without", "--rounds", "1", "--device", "cpu", *size])
    title, step, inference, kept = capsys.readouterr().out.splitlines()
    assert title == "one image of 64x96 with 2 objects, cpu"
    assert step.startswith("training step: with ")
    assert inference.startswith("inference: with ")
    assert float(kept.rpartition(" ")[2]) > 1


def test_kept_bytes_counts_a_storage_once():
    x = torch.ones(1000, requires_grad=True)

    def job():
        y = x.exp()  # keeps its result
        (y * y).sum()  # keeps it again

    assert benchmark_step.kept_bytes(job) == 4000


@pytest.mark.detectron2
def test_a_config_is_built():
    detector = benchmark_step.build("co_detr/co_dino_shapes")
    assert list(detector.co_heads.heads) == ["faster_rcnn", "atss"]
