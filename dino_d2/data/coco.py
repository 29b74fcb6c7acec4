"""Facts and checks of COCO-format data."""

# The 80 of the ids 1..90 that COCO uses, in the order of Detectron2's contiguous classes.
COCO_CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
