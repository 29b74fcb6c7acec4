"""Data sets for Detectron2's loaders: registered names, or any COCO-format json."""

import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators


def register_if_file(name: str) -> str:
    """Turn "annotations.json:image_folder" into a registered data set of that name.

    Names that are already registered are returned as they are.

    Raises:
        FileNotFoundError: the json or the folder does not exist.
        KeyError: the name is neither registered nor of that form.
    """
    if name in DatasetCatalog.list():
        return name
    json, separator, images = name.rpartition(":")
    if not separator:
        raise KeyError(
            f"data set {name!r} is not registered; give a registered name or "
            "'annotations.json:image_folder'"
        )
    for path, exists in ((json, Path(json).is_file()), (images, Path(images).is_dir())):
        if not exists:
            raise FileNotFoundError(f"{path!r}, of data set {name!r}, does not exist")
    register_coco_instances(name, {}, json, images)
    return name


def load_datasets(names: str | Sequence[str], filter_empty: bool = False) -> list[dict]:
    """Detectron2's dicts of one or more data sets, given as `register_if_file` takes them.

    Images without objects stay by default: they are part of DETR's training.
    """
    names = [names] if isinstance(names, str) else list(names)
    return get_detection_dataset_dicts(
        [register_if_file(name) for name in names], filter_empty=filter_empty
    )


def coco_evaluator(
    dataset_name: str | Sequence[str], output_dir: str | None = None, unsuppressed: bool = False
) -> DatasetEvaluator:
    """Detectron2's COCOEvaluator for boxes on a data set as `register_if_file` takes it.

    Args:
        unsuppressed: also evaluate the detections before the suppression of duplicates, as
            "bbox_unsuppressed".

    Raises:
        ValueError: several data sets; they cannot be evaluated as one.
    """
    if not isinstance(dataset_name, str):
        if len(dataset_name) != 1:
            raise ValueError(f"evaluate one data set at a time, not {list(dataset_name)}")
        (dataset_name,) = dataset_name
    name = register_if_file(dataset_name)
    evaluator = COCOEvaluator(name, ("bbox",), output_dir=output_dir)
    if not unsuppressed:
        return evaluator
    other_dir = output_dir and os.path.join(output_dir, "unsuppressed")
    other = COCOEvaluator(name, ("bbox",), output_dir=other_dir)
    return DatasetEvaluators([evaluator, UnsuppressedEvaluator(other)])


class UnsuppressedEvaluator(DatasetEvaluator):
    """Another evaluator's results for the detections before suppression.

    Raises:
        KeyError: the model has no suppression.
    """

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self) -> None:
        """Forget all images."""
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Pass on what was there before suppression."""
        self.evaluator.process(inputs, [{"instances": o["unsuppressed"]} for o in outputs])

    def evaluate(self) -> dict | None:
        """The results, by other names."""
        results = self.evaluator.evaluate()
        return results and {f"{task}_unsuppressed": found for task, found in results.items()}


def check_num_classes(names: str | Sequence[str], num_classes: int) -> None:
    """Compare a model's classes with those of the data sets, before they ruin a run.

    Raises:
        ValueError: a data set has another number of classes.
    """
    for name in [names] if isinstance(names, str) else names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:5])}...), the "
                f"model has {num_classes}; set model.detector.num_classes={len(classes)}"
            )
