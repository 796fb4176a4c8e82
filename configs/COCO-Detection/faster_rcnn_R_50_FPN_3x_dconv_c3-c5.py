# LazyConfig of faster_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml, for Detectron2's
# tools/lazyconfig_train_net.py. Further arguments: modulated, offset_groups (see DeformResNet).
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from dcn_plugin.modeling import DeformResNet

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.use_instance_mask = False
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train
train.max_iter = 270000
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(name)
model.backbone.bottom_up = L(DeformResNet)(
    depth=50,
    deform_last=[0, 4, 6, 3],
    out_features=["res2", "res3", "res4", "res5"],
    norm="FrozenBN",
    freeze_at=2,
)
