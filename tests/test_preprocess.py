"""Normalising, padding and masking of images."""

import pytest
import torch

from dino_d2.preprocess import PIXEL_MEAN, PIXEL_STD, batch_images, make_padding_mask

MEAN, STD = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)


def random_image(height, width, dtype=torch.uint8):
    return torch.randint(256, (3, height, width)).to(dtype)


def test_pixels_are_normalised_by_channel():
    image = random_image(5, 7)
    batch, _ = batch_images([image], MEAN, STD)
    assert batch.shape == (1, 3, 5, 7)
    for channel in range(3):
        expected = (image[channel].double() - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(batch[0, channel].double(), expected)


def test_statistics_are_imagenets_by_default():
    image = torch.tensor(PIXEL_MEAN).view(3, 1, 1) + torch.tensor(PIXEL_STD).view(3, 1, 1)
    batch, _ = batch_images([image.expand(3, 2, 2)])
    torch.testing.assert_close(batch, torch.ones(1, 3, 2, 2))


def test_padding_is_at_the_bottom_and_right_and_zero_after_normalising():
    images = [random_image(4, 9), random_image(6, 5)]
    batch, mask = batch_images(images, MEAN, STD)
    assert batch.shape == (2, 3, 6, 9)
    for image, slot, padding in zip(images, batch, mask, strict=True):
        alone, _ = batch_images([image], MEAN, STD)
        height, width = image.shape[1:]
        assert torch.equal(slot[:, :height, :width], alone[0])
        assert (slot[:, height:] == 0).all()
        assert (slot[:, :, width:] == 0).all()
        assert not padding[:height, :width].any()
        assert padding.sum() == 6 * 9 - height * width


def test_equal_sizes_need_no_padding():
    _, mask = batch_images([random_image(4, 5), random_image(4, 5)])
    assert mask.shape == (2, 4, 5)
    assert mask.dtype == torch.bool
    assert not mask.any()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.uint8, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_single_unless_images_are_double(given, expected):
    batch, _ = batch_images([random_image(2, 3, given)])
    assert batch.dtype == expected


def test_images_are_not_changed():
    image = random_image(3, 4, torch.float32)
    before = image.clone()
    batch, _ = batch_images([image])
    batch.zero_()
    assert torch.equal(image, before)


def test_mask_covers_what_is_beyond_each_image():
    mask = make_padding_mask([(2, 3), (4, 1)], torch.zeros(2, 3, 4, 4))
    assert mask.tolist() == [
        [[False] * 3 + [True]] * 2 + [[True] * 4] * 2,
        [[False] + [True] * 3] * 4,
    ]


def test_mask_needs_a_size_for_every_image():
    with pytest.raises(ValueError, match="zip"):
        make_padding_mask([(2, 3)], torch.zeros(2, 3, 4, 4))


@pytest.mark.cuda
def test_batch_and_mask_are_where_the_images_are():
    batch, mask = batch_images([random_image(2, 3).cuda()])
    assert batch.is_cuda
    assert mask.is_cuda


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (torch.zeros(5, 7), r"\(5, 7\)"),
        (torch.zeros(1, 5, 7), r"\(1, 5, 7\)"),
        (torch.zeros(5, 7, 3), r"\(5, 7, 3\)"),
        (torch.zeros(3, 0, 7), r"\(3, 0, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 5, 7).numpy(), "ndarray"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_is_an_error(image, named):
    with pytest.raises(ValueError, match=rf"image 1 of the batch must be .* it is .*{named}"):
        batch_images([random_image(5, 7), image])


def test_a_batch_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        batch_images([])
