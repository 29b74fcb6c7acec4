"""The configs: their names, what they build, and that they survive being saved."""

import ast
import copy
import re
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from dino_d2 import model_zoo

ROOT = Path(__file__).parents[1]
NAMES = model_zoo.list_configs()
SHAPES = [name for name in NAMES if name.endswith("_shapes")]
LVIS = [name for name in NAMES if "_lvis_" in name]
COCO = [name for name in NAMES if name not in SHAPES + LVIS]
DINO = [name for name in NAMES if name.startswith("dino/") and name not in LVIS]
CO_DETR = [name for name in NAMES if name.startswith("co_detr/")]  # see test_co_detr_configs.py
OTHERS = [name for name in NAMES if name not in DINO + LVIS + CO_DETR]
COCO_EPOCH = 7393  # iterations: 118,287 images in batches of 16
DROP = {12: 11, 24: 20, 36: 30, 50: 40}  # a schedule's length: after which epoch the rate drops

# Parameters of every backbone in millions, from its paper or release, without classification head.
BACKBONES = {
    "r50": 23.5,
    "r101": 42.5,
    "swin_tiny_224": 27.5,
    "swin_small_224": 48.8,
    "swin_base_384": 86.9,
    "swin_large_224": 195.0,
    "swin_large_384": 195.2,
    "convnext_tiny_384": 27.8,
    "convnext_small_384": 49.5,
    "convnext_base_384": 87.6,
    "convnext_large_384": 196.2,
    "convnext_xlarge_384": 348.1,
    "vitdet_base": 89.0,
    "vitdet_large": 308.0,
    "shapes": 1.25,
}


def parts(name):
    """(backbone, scales, epochs) by a config's name."""
    pattern = r"dino/dino_(\w+?)_(\d)scale_(\d+)ep(?:_detrex)?"
    backbone, scales, epochs = re.fullmatch(pattern, name).groups()
    return backbone, int(scales), int(epochs)


@cache
def load(name):
    return model_zoo.get_config(name)


@pytest.fixture
def build(monkeypatch):
    """A function that builds a config's model without memory for its weights."""
    from detectron2.config import instantiate

    # Detectron2's ViT and Swin read their stochastic depth rates from a linspace.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))

    def build(cfg):
        with torch.device("meta"):
            return instantiate(cfg)

    return build


def test_every_config_of_the_first_issue_is_there():
    r50 = [f"r50_{scales}scale_{epochs}ep" for scales in (4, 5) for epochs in (12, 24, 36)]
    swin = [f"swin_{size}_4scale_12ep" for size in ("tiny_224", "small_224", "base_384")]
    swin += [f"swin_{size}_5scale_12ep" for size in ("tiny_224", "small_224", "base_384")]
    swin += [f"swin_large_384_{n}scale_{epochs}ep" for n in (4, 5) for epochs in (12, 36)]
    sizes = ("tiny", "small", "base", "large", "xlarge")
    others = [f"convnext_{size}_384_4scale_12ep" for size in sizes]
    others += [f"vitdet_{size}_4scale_{n}ep" for size in ("base", "large") for n in (12, 50)]
    expected = {f"dino/dino_{x}" for x in (*r50, *swin, *others, "r101_4scale_12ep", "shapes")}
    assert expected <= set(NAMES)


def test_every_published_relative_is_there():
    backbones = ("r50", "r101", "dc5_r50", "dc5_r101")
    dn = [f"dn_detr_{b}_50ep" for b in backbones]
    dn += [f"dn_detr_dc5_{b}_3patterns_12ep" for b in ("r50", "r101")]
    dn += [f"dn_detr_deformable_encoder_{b}" for b in ("r50_12ep", "r101_12ep", "r50_50ep")]
    dn += [f"dn_deformable_detr_{x}" for x in ("r50_12ep", "r50_24ep", "r50_50ep", "shapes")]
    dab = [f"dab_detr_{b}_50ep" for b in backbones]
    dab += [f"dab_detr_{b}_3patterns_50ep" for b in ("r50", "dc5_r50")]
    dab += [f"dab_deformable_detr_{x}" for x in ("r50_50ep", "shapes")]
    variants = ("", "refine_", "two_stage_", "single_scale_")
    deformable = [f"deformable_detr_r50_{variant}50ep" for variant in variants]
    expected = {"dn_detr": dn, "dab_detr": dab, "deformable_detr": deformable}
    for project, names in expected.items():
        assert {f"{project}/{name}" for name in (*names, f"{project}_shapes")} <= set(NAMES)


@pytest.mark.parametrize("name", ["dino/dino_r50_4scale_12ep", "dino/dino_r50_4scale_12ep.py"])
def test_file_of_a_name(name):
    file = model_zoo.get_config_file(name)
    assert Path(file) == ROOT / "projects" / "dino" / "configs" / "dino_r50_4scale_12ep.py"
    assert model_zoo.get_config_file(file) == file


@pytest.mark.parametrize("name", ["dino/dino_r50", "dino", "dino/", "", "dino_r50_4scale_12ep"])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(KeyError) as failure:
        model_zoo.get_config_file(name)
    message = failure.value.args[0]
    assert message == f"no config {name!r}; there are {', '.join(NAMES)}"


def test_without_detectron2_the_error_says_what_to_install(monkeypatch):
    for module in [m for m in sys.modules if m.startswith("detectron2.config")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match=r"install dino_d2\[detectron2\]"):
        model_zoo.get_config("dino/dino_shapes")


def relative_imports(file):
    """The configs that a config imports."""
    nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
    for node in nodes:
        if node.level:
            yield file.parents[node.level - 1] / (node.module.replace(".", "/") + ".py")


def depth(file):
    return max((1 + depth(other) for other in relative_imports(file)), default=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_states_differences(name):
    file = Path(model_zoo.get_config_file(name))
    assert len(file.read_text().splitlines()) <= 30
    assert depth(file) <= 2


def test_no_lambdas():
    files = [f for folder in ("configs", "projects") for f in (ROOT / folder).rglob("*.py")]
    nodes = [(f.name, n) for f in files for n in ast.walk(ast.parse(f.read_text()))]
    assert nodes
    assert [file for file, node in nodes if isinstance(node, ast.Lambda)] == []


@pytest.mark.detectron2
@pytest.mark.parametrize("name", OTHERS)
def test_relatives_are_what_their_names_say(name, build):
    model, stem = build(load(name).model), name.partition("/")[2]
    kinds = {"dn_": "DNDETR", "dab_detr": "DABDETR", "deformable_detr": "DeformableDETR"}
    kinds["dab_deformable"] = "DABDeformableDETR"
    (kind,) = [kind for prefix, kind in kinds.items() if stem.startswith(prefix)]
    assert type(model).__name__ == kind
    detector = model.detector
    if name in SHAPES:
        assert detector.num_classes == 3
        return
    size = 42.5 if "r101" in stem else 23.5
    weights = sum(p.numel() for p in detector.backbone.parameters()) / 1e6
    assert weights == pytest.approx(size, rel=0.02)
    assert getattr(detector.query_source, "num_patterns", 0) == (
        3 if "patterns" in stem or "encoder" in stem else 0
    )
    strides = detector.backbone.output_shape()
    coarsest = strides[detector.neck.in_features[-1]].stride
    assert coarsest == (16 if "dc5" in stem else 32)
    multi_scale = "deformable" in stem and "single" not in stem
    assert len(detector.neck.projections) == (4 if multi_scale else 1)
    assert (detector.denoising is not None) == stem.startswith("dn_")
    assert model.num_detections == (100 if "deformable_detr" in stem else 300)
    cfg = load(name).train
    assert cfg.init_backbone.endswith("/R-101.pkl" if "r101" in stem else "/R-50.pkl")
    assert (cfg.output_dir, cfg.init_checkpoint) == (f"./output/{stem}", "")


# Parameters of the official models with 91 classes: all of them; of Deformable DETR those trained.
# DN-Deformable-DETR's 255 are a label embedding that nothing uses.
OFFICIAL = {
    "dn_detr/dn_detr_r50_50ep": 43_694_977,
    "dn_detr/dn_detr_dc5_r50_3patterns_12ep": 43_694_977 + 768,
    "dn_detr/dn_detr_r101_50ep": 62_634_881,
    "dn_detr/dn_deformable_detr_r50_50ep": 47_429_154 - 255,
    "dn_detr/dn_detr_deformable_encoder_r50_12ep": 48_488_589,
    "dn_detr/dn_detr_deformable_encoder_r101_12ep": 67_428_493,
    "dab_detr/dab_detr_r50_50ep": 43_694_977 - 92 * 255,  # DN-DETR without its embedding
    "deformable_detr/deformable_detr_r50_50ep": 39_847_265,
}


@pytest.mark.detectron2
@pytest.mark.parametrize("name", OFFICIAL)
def test_number_of_parameters(name, build):
    cfg = copy.deepcopy(load(name).model)
    cfg.detector.num_classes = 91
    parameters = list(build(cfg).parameters())
    if name.startswith("deformable_detr"):
        parameters = [p for p in parameters if p.requires_grad]
    assert sum(p.numel() for p in parameters) == OFFICIAL[name]


@pytest.mark.detectron2
@pytest.mark.parametrize("name", DINO)
def test_model_is_what_the_name_says(name, build):
    model = build(load(name).model)
    backbone, scales, _ = ("shapes", 3, 12) if name == "dino/dino_shapes" else parts(name)
    detector = model.detector
    assert len(detector.neck.projections) == scales
    shapes = detector.backbone.output_shape()
    strides = [shapes[feature].stride for feature in detector.neck.in_features]
    finest = 4 if scales == 5 else 8
    assert strides == [finest * 2**i for i in range(len(strides))]
    weights = sum(p.numel() for p in detector.backbone.parameters()) / 1e6
    assert weights == pytest.approx(BACKBONES[backbone], rel=0.02)
    assert all(p.is_meta for p in model.parameters())
    assert model.num_classes == (3 if backbone == "shapes" else 80)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", [name for name in DINO if name in COCO])
def test_weights_and_folder_are_those_of_the_name(name):
    cfg = load(name)
    backbone, _, _ = parts(name)
    family, *size = backbone.split("_")
    file = cfg.train.init_backbone.rpartition("/")[2]
    patterns = {
        "r50": r"R-50\.pkl",
        "r101": r"R-101\.pkl",
        "swin": rf"swin_{size[0]}_patch4_window\d+_{size[-1]}(_22k)?\.pth" if size else "",
        "convnext": rf"convnext_{size[0]}_22k_1k_384(_ema)?\.pth" if size else "",
        "vitdet": rf"mae_pretrain_vit_{size[0]}\.pth" if size else "",
    }
    assert re.fullmatch(patterns[family], file)
    if family == "swin":
        net = cfg.model.detector.backbone
        assert str(net.pretrain_img_size) == size[-1]
        assert f"window{net.window_size}_" in file
    assert cfg.train.output_dir == f"./output/{name.partition('/')[2]}"
    assert cfg.train.init_checkpoint == ""


@pytest.mark.detectron2
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CO_DETR])
def test_keys_of_training(name, build):
    from detectron2.config import instantiate

    cfg = load(name)
    loaders = [cfg.dataloader[part] for part in ("train", "test", "matching")]
    assert all("_target_" in part for part in (*loaders, cfg.dataloader.evaluator))
    assert len({loader.mapper.image_format for loader in loaders}) == 1
    assert cfg.dataloader.matching.dataset == cfg.dataloader.test.dataset
    cfg = build_optimizer_config(cfg, build(cfg.model))
    groups = instantiate(cfg).param_groups
    dense = name in ("dab_detr/dab_detr_shapes", "dn_detr/dn_detr_shapes")
    rate = (
        (2e-3 if dense else 1e-3)
        if name in SHAPES
        else 2e-4
        if name.startswith("deformable_detr")
        else 1e-4
    )
    rates = sorted({group["lr"] for group in groups}, reverse=True)
    assert rates == pytest.approx([rate] if name in SHAPES else [rate, rate / 10])
    assert {group["weight_decay"] for group in groups} == {1e-4}


def build_optimizer_config(cfg, model):
    from omegaconf import OmegaConf

    copy = OmegaConf.create(OmegaConf.to_container(cfg.optimizer), flags={"allow_objects": True})
    copy.params.model = model
    return copy


@pytest.mark.detectron2
@pytest.mark.parametrize("name", [name for name in COCO if name not in CO_DETR])
def test_schedule(name):
    from detectron2.config import instantiate

    cfg = load(name)
    epochs = int(re.search(r"_(\d+)ep", name)[1])
    batch = 32 if name.startswith("deformable_detr") else 16
    assert cfg.train.max_iter == epochs * COCO_EPOCH * 16 // batch
    assert cfg.train.eval_period == cfg.train.checkpointer.period == COCO_EPOCH * 16 // batch
    assert cfg.dataloader.train.total_batch_size == batch
    multiplier = instantiate(cfg.lr_multiplier)
    drop = DROP[epochs] * COCO_EPOCH * 16 // batch
    iterations = (0, drop - 1, drop, cfg.train.max_iter - 1)
    factors = [multiplier(iteration / cfg.train.max_iter) for iteration in iterations]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


@pytest.mark.detectron2
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_config_loads_again(name, build, tmp_path):
    from detectron2.config import LazyConfig

    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    LazyConfig.save(load(name), str(first))
    loaded = LazyConfig.load(str(first))
    LazyConfig.save(loaded, str(second))
    assert sorted(tmp_path.iterdir()) == [first, second], "Detectron2 pickles what yaml cannot hold"
    assert first.read_text() == second.read_text()
    state, again = (build(cfg.model).state_dict() for cfg in (load(name), loaded))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in again.items()}


@pytest.mark.detectron2
@pytest.mark.parametrize("name", LVIS)
def test_lvis(name, build):
    from detectron2.data import MetadataCatalog

    cfg = load(name)
    model = build(cfg.model)
    assert model.num_classes == 1203
    assert model.num_detections == (1000 if "o365" in name else 300)
    choose = model.detector.criterion.federated
    counts = [c["image_count"] for c in MetadataCatalog.get("lvis_v1_train").class_image_count]
    assert choose.weights == pytest.approx([count**0.5 for count in counts])
    assert choose.num_classes == 50
    epochs = int(re.search(r"_(\d+)ep", name)[1])
    assert cfg.train.max_iter == epochs * 6261 == epochs * -(-100_170 // 16)
    assert cfg.train.output_dir == f"./output/{name.partition('/')[2]}"
