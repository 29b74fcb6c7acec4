"""Co-DINO, ViT-L (EVA-02), 5 scales, from Objects365, 12 epochs; give `train.init_checkpoint`."""

from detectron2.config import LazyCall as L

from dino_d2.d2.solver import LayerDecayLR

from ....configs.common.coco_12ep import dataloader, optimizer, train
from ....configs.common.data.coco_detr import with_large_images
from ....configs.common.models.co_dino import CLASS_WEIGHTS as _CLASS_WEIGHTS
from ....configs.common.models.co_dino import vit_large as model
from ....configs.common.schedule import lr_12ep_vit as lr_multiplier

with_large_images(dataloader, 2400)
dataloader.evaluator.unsuppressed = True
optimizer.lr = 5e-5
optimizer.weight_decay = 0.01
optimizer.params.lr_factor_func = L(LayerDecayLR)(decay=0.8, num_layers=24)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
optimizer.params.weight_decay_norm = optimizer.params.weight_decay_bias = 0.0
train.ema.decay = 0.9999
train.init_skip = _CLASS_WEIGHTS  # Objects365 has other classes
train.output_dir = "./output/co_dino_vit_large_5scale_o365_12ep"
