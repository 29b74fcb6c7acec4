"""Objects365 and CrowdHuman by name, as Detectron2 has COCO: below $DETECTRON2_DATASETS."""

import os

from detectron2.data import DatasetCatalog

from .data import register_coco

# json and image folder; `file_parts`: how many parts of a json's file names the folder has
_DATASETS = {
    "objects365_v2_train": ("objects365/zhiyuan_objv2_train.json", "objects365/train", 2),
    "objects365_v2_val": ("objects365/zhiyuan_objv2_val.json", "objects365/val", 2),
    "crowdhuman_train": ("crowdhuman/annotation_train.json", "crowdhuman/Images", None),
    "crowdhuman_val": ("crowdhuman/annotation_val.json", "crowdhuman/Images", None),
}
# The published json names these, the published archives lack them.
_ABSENT = {
    "objects365_v2_train": (
        "patch16/objects365_v2_00908726.jpg",
        "patch6/objects365_v1_00320532.jpg",
        "patch6/objects365_v1_00320534.jpg",
    )
}


def register_datasets(root: str) -> None:
    """Register the data sets below a folder; nothing is read before they are used.

    CrowdHuman's jsons are made by `python -m dino_d2.tools.convert_crowdhuman`.
    """
    for name, (json, images, file_parts) in _DATASETS.items():
        if name not in DatasetCatalog:
            paths = os.path.join(root, json), os.path.join(root, images)
            facts = {"file_parts": file_parts, "absent_files": _ABSENT.get(name, ())}
            register_coco(name, *paths, **facts)


register_datasets(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
