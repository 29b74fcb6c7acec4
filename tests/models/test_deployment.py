"""The detector in half precision, compiled and exported."""

import pytest
import torch
from tiny import tiny_batch, tiny_dino

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_dino(torch.float32).eval().to(dtype)
    images, mask = tiny_batch(dtype=dtype)
    predictions = model(images, mask)
    assert predictions.logits.dtype == dtype
    assert predictions.boxes.isfinite().all()


@torch.no_grad()
def test_export_with_any_number_and_size_of_images():
    model = tiny_dino(torch.float32).eval()
    images, mask = tiny_batch(dtype=torch.float32)
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in "bhw")
    sizes = {0: batch, 2: 16 * height, 3: 16 * width}
    mask_sizes = {0: batch, 1: 16 * height, 2: 16 * width}
    exported = torch.export.export(model, (images, mask), dynamic_shapes=(sizes, mask_sizes))
    other = torch.randn(3, 3, 96, 80), torch.zeros(3, 96, 80, dtype=torch.bool)
    for expected, actual in zip(model(*other), exported.module()(*other), strict=True):
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_compile_without_a_break():
    """By the eager backend: what the compiler sees is whole."""
    model = tiny_dino(torch.float32).eval()
    batch = tiny_batch(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch).boxes, model(*batch).boxes)
