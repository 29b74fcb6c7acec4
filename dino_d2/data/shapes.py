"""The shapes data set: generated images with COCO-format annotations.

For demonstrations, tests and experiments that need a data set without a download: several classes,
objects from a few pixels to most of the image, overlap, textured backgrounds, images without
objects, and crowd regions. The same arguments give the same files.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


class Setting(NamedTuple):
    """How hard the images are."""

    classes: tuple[str, ...]
    smallest: int  # object, in pixels across
    rotation: float  # most that an object is turned, in radians
    objects: tuple[int, int]  # fewest and most in an image that has any
    empty: float  # share of images without objects
    crowd: float  # share of images with a crowd region
    largest_overlap: float  # share of an object that later ones may cover
    contrast: tuple[float, float]  # of an object's colour to the background, 0..255
    noise: float  # standard deviation, 0..255
    clutter: int  # most strokes that belong to no object


SETTINGS = {
    "easy": Setting(
        ("circle", "square", "triangle"), 20, 0.25, (1, 4), 0.05, 0.03, 0.2, (90, 160), 4, 0
    ),
    "hard": Setting(
        ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon"),
        8,
        np.pi,
        (1, 14),
        0.1,
        0.15,
        0.6,
        (25, 110),
        14,
        8,
    ),
}
CROWD_MEMBERS = (8, 16)
CROWD_DIAMETER = 8


def make_shapes(
    out: str | Path,
    num_images: int,
    size: int = 128,
    seed: int = 0,
    setting: str = "easy",
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write OUT/images/*.jpg and OUT/annotations.json.

    Args:
        num_images: how many, numbered from 1.
        size: longer side in pixels; the shorter one varies down to 3/4 of it.
        seed: of all randomness.
        setting: "easy" or "hard".
        progress: called with the number of finished images.

    Returns:
        The path of the annotations.

    Raises:
        ValueError: an unknown setting, or a size or number that cannot be.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting must be one of {', '.join(SETTINGS)}, not {setting!r}")
    chosen = SETTINGS[setting]
    if size < 4 * chosen.smallest or num_images < 1:
        raise ValueError(f"need size >= {4 * chosen.smallest} and num_images >= 1")
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        rng = np.random.default_rng([seed, image_id])
        scene = Scene(rng, size, chosen)
        name = f"{image_id:06d}.jpg"
        Image.fromarray(scene.pixels()).save(out / "images" / name, quality=92)
        images.append(
            {"id": image_id, "file_name": name, "height": scene.height, "width": scene.width}
        )
        for entry in scene.annotations():
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
        progress(image_id)
    categories = [{"id": i, "name": name} for i, name in enumerate(chosen.classes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = out / "annotations.json"
    path.write_text(json.dumps(content))
    return path


class Drawn(NamedTuple):
    """A shape on the canvas."""

    category_id: int
    mask: np.ndarray  # (height, width) bool, where it is still visible
    area: int  # before anything covered it
    is_crowd: bool


class Scene:
    """One image: background, then objects from back to front."""

    def __init__(self, rng: np.random.Generator, size: int, setting: Setting):
        self.rng, self.setting = rng, setting
        sides = [size, int(rng.integers(size * 3 // 4, size + 1))]
        rng.shuffle(sides)
        self.height, self.width = sides
        self.canvas = self._background()
        self.drawn: list[Drawn] = []
        for _ in range(rng.integers(0, setting.clutter + 1)):
            self._stroke()
        if rng.random() < setting.empty:
            return
        if rng.random() < setting.crowd:
            self._add_crowd()
        low, high = setting.objects
        for _ in range(rng.integers(low, high + 1)):
            self._add_object()

    def pixels(self) -> np.ndarray:
        """(height, width, 3) uint8."""
        noise = self.rng.normal(0, self.setting.noise, self.canvas.shape)
        return np.clip(self.canvas + noise, 0, 255).astype(np.uint8)

    def annotations(self) -> list[dict]:
        """COCO entries without ids. Boxes are tight around what is visible."""
        entries = []
        for shape in self.drawn:
            rows, columns = np.flatnonzero(shape.mask.any(1)), np.flatnonzero(shape.mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            encoded = coco_mask.encode(np.asfortranarray(shape.mask, dtype=np.uint8))
            entries.append(
                {
                    "category_id": shape.category_id,
                    "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                    "area": int(shape.mask.sum()),
                    "iscrowd": int(shape.is_crowd),
                    "segmentation": {
                        "size": encoded["size"],
                        "counts": encoded["counts"].decode("ascii"),
                    },
                }
            )
        return entries

    def _background(self) -> np.ndarray:
        """Waves of random direction and length over a random colour."""
        y, x = np.mgrid[: self.height, : self.width]
        canvas = np.empty((self.height, self.width, 3))
        canvas[:] = self.rng.uniform(60, 195, 3)
        for _ in range(4):
            wavelength = self.rng.uniform(0.05, 0.8) * self.width
            angle, phase = self.rng.uniform(0, 2 * np.pi, 2)
            wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wavelength + phase)
            canvas += wave[..., None] * self.rng.uniform(-14, 14, 3)
        return canvas

    def _colour(self, mask: np.ndarray) -> np.ndarray:
        """A colour that differs from what is under the mask by the setting's contrast."""
        under = self.canvas[mask].mean(0)
        direction = self.rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        distance = self.rng.uniform(*self.setting.contrast)
        candidates = np.clip([under + distance * direction, under - distance * direction], 0, 255)
        return max(candidates, key=lambda colour: np.abs(colour - under).sum())

    def _stroke(self) -> None:
        y, x = np.mgrid[: self.height, : self.width]
        x0, y0 = self.rng.uniform(0, self.width), self.rng.uniform(0, self.height)
        angle = self.rng.uniform(0, np.pi)
        distance = np.abs((x - x0) * np.sin(angle) - (y - y0) * np.cos(angle))
        along = np.abs((x - x0) * np.cos(angle) + (y - y0) * np.sin(angle))
        mask = (distance < self.rng.uniform(0.7, 2)) & (along < self.rng.uniform(5, 40))
        if mask.any():
            self.canvas[mask] = self._colour(mask)

    def _shape(self, diameter: float, centre: tuple[float, float]) -> tuple[int, np.ndarray]:
        category = int(self.rng.integers(len(self.setting.classes)))
        angle = self.rng.uniform(-1, 1) * self.setting.rotation
        return category + 1, self._mask(category, diameter, centre, angle)

    def _mask(self, category: int, diameter: float, centre, angle: float) -> np.ndarray:
        y, x = np.mgrid[: self.height, : self.width]
        dx, dy = x + 0.5 - centre[0], y + 0.5 - centre[1]
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / (diameter / 2)
        v = (dy * np.cos(angle) - dx * np.sin(angle)) / (diameter / 2)
        return SHAPES[self.setting.classes[category]](u, v)

    def _add_object(self, attempts: int = 10) -> None:
        """Place one, at a size that is uniform in its logarithm; give up where there is no room."""
        largest = 0.95 * min(self.height, self.width)
        for _ in range(attempts):
            diameter = float(
                np.exp(self.rng.uniform(np.log(self.setting.smallest), np.log(largest)))
            )
            low = min(diameter / 2, min(self.height, self.width) / 2 - 1)
            centre = (
                self.rng.uniform(low, self.width - low),
                self.rng.uniform(low, self.height - low),
            )
            category_id, mask = self._shape(diameter, centre)
            if mask.sum() >= 12 and self._leaves_others_visible(mask):
                self._paint(category_id, mask)
                return

    def _leaves_others_visible(self, mask: np.ndarray) -> bool:
        return all(
            (shape.mask & ~mask).sum() >= (1 - self.setting.largest_overlap) * shape.area
            for shape in self.drawn
        )

    def _paint(self, category_id: int, mask: np.ndarray) -> None:
        self.canvas[mask] = self._colour(mask)
        self.drawn = [shape._replace(mask=shape.mask & ~mask) for shape in self.drawn]
        self.drawn.append(Drawn(category_id, mask, int(mask.sum()), False))

    def _add_crowd(self) -> None:
        """Many small shapes of one class side by side, annotated as one region."""
        count = int(self.rng.integers(*CROWD_MEMBERS))
        x = self.rng.uniform(0.25, 0.75) * self.width
        y = self.rng.uniform(0.25, 0.75) * self.height
        category = int(self.rng.integers(len(self.setting.classes)))
        region = np.zeros((self.height, self.width), bool)
        for _ in range(count):
            spread = self.rng.normal(0, CROWD_DIAMETER * 1.5, 2)
            centre = (x + spread[0], y + spread[1])
            angle = self.rng.uniform(-1, 1) * self.setting.rotation
            mask = self._mask(category, CROWD_DIAMETER, centre, angle)
            if mask.any():
                self.canvas[mask] = self._colour(mask)
                region |= mask
        if region.any():
            self.drawn.append(Drawn(category + 1, region, int(region.sum()), True))


def _polygon(sides: int) -> Callable:
    """A regular polygon in the unit circle, standing on a side."""
    angles = np.pi / 2 + np.arange(sides) * 2 * np.pi / sides
    apothem = np.cos(np.pi / sides)

    def inside(u, v):
        return np.all([u * np.cos(a) + v * np.sin(a) <= apothem for a in angles], axis=0)

    return inside


def _star(u, v):
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    spoke = np.abs((angle / (2 * np.pi / 5)) % 1 - 0.5) * 2  # 0 between the points, 1 on them
    return radius <= 0.4 + 0.6 * spoke**1.5


def _cross(u, v):
    return ((np.abs(u) <= 0.3) | (np.abs(v) <= 0.3)) & (np.maximum(np.abs(u), np.abs(v)) <= 0.9)


# From coordinates in which the shape's radius is 1 to whether they are inside.
SHAPES: dict[str, Callable] = {
    "circle": lambda u, v: np.hypot(u, v) <= 1,
    "square": _polygon(4),
    "triangle": _polygon(3),
    "star": _star,
    "ring": lambda u, v: (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= 0.55),
    "cross": _cross,
    "diamond": lambda u, v: np.abs(u) + np.abs(v) / 0.5 <= 1,
    "hexagon": _polygon(6),
}
