"""Data sets that need no Detectron2."""
