"""Co-DINO, Swin-L (384), from Objects365, LVIS v1, 16 epochs; give `train.init_checkpoint`."""

from ....configs.common.data.lsj import with_jitter
from ....configs.common.data.lvis_detr import LVIS_CLASSES, LVIS_EPOCH, dataloader
from ....configs.common.data.lvis_detr import federated as _federated
from ....configs.common.models.co_dino import CLASS_WEIGHTS as _CLASS_WEIGHTS
from ....configs.common.models.co_dino import swin_large_o365 as model
from ....configs.common.optim import optimizer
from ....configs.common.schedule import lr_16ep as lr_multiplier
from ....configs.common.train import train

with_jitter(dataloader, 1536)
dataloader.evaluator.max_detections = 1000
dataloader.evaluator.unsuppressed = True
model.detector.num_classes = LVIS_CLASSES
model.detector.base.federated = _federated
model.num_detections = 1000
train.init_skip = _CLASS_WEIGHTS  # Objects365 has other classes
optimizer.lr = 1e-4
train.max_iter = 16 * LVIS_EPOCH
train.eval_period = train.checkpointer.period = LVIS_EPOCH
train.output_dir = "./output/co_dino_swin_large_384_5scale_o365_lsj_lvis_16ep"
