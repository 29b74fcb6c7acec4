"""Co-DINO, ResNet-50, 5 scales, LVIS v1, 12 epochs, large-scale jitter."""

from ....configs.common.data.lsj import with_jitter
from ....configs.common.data.lvis_detr import LVIS_CLASSES, LVIS_EPOCH, dataloader
from ....configs.common.data.lvis_detr import federated as _federated
from ....configs.common.models.co_dino import IMAGENET, model
from ....configs.common.optim import optimizer
from ....configs.common.schedule import lr_12ep as lr_multiplier
from ....configs.common.train import train

with_jitter(dataloader, 1024)
dataloader.evaluator.unsuppressed = True
model.detector.num_classes = LVIS_CLASSES
model.detector.base.federated = _federated
train.init_backbone = IMAGENET
optimizer.lr = 2e-4
train.max_iter = 12 * LVIS_EPOCH
train.eval_period = train.checkpointer.period = LVIS_EPOCH
train.output_dir = "./output/co_dino_r50_5scale_lsj_lvis_12ep"
