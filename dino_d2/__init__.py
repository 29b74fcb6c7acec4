"""DINO and its relatives as Detectron2 detectors; plain PyTorch inside, Detectron2 at the rim."""
