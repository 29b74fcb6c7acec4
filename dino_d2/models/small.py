"""Settings of detectors that train on a CPU in minutes: the demo's and the tests'."""

# of `TimmBackbone`
SMALL_BACKBONE = {"name": "resnet10t", "strides": (8, 16)}

# of the builders of dense and of deformable detectors
_SMALL = {"num_queries": 40, "embed_dim": 96, "ffn_dim": 384, "decoder_layers": 2}
SMALL_DENSE = {
    **_SMALL,
    "in_features": ("stride16",),
    "encoder_layers": 1,
    "anchor_temperature": 20,
}
SMALL_DEFORMABLE = {
    **_SMALL,
    "in_features": ("stride8", "stride16"),
    "num_levels": 3,
    "encoder_layers": 2,
}

# of `build_dino`
SMALL_DINO = {**SMALL_DEFORMABLE, "denoising_queries": 80}

# of `Criterion`: from scratch and with few classes, the classes learn late at weight 1
SMALL_CRITERION = {"class_weight": 8.0}

# the recipe on the easy shapes of 160 pixels
SMALL_LR = 1e-3
SMALL_MAX_NORM = 5.0
SMALL_BATCH = 8
SMALL_ITERATIONS = 600
SMALL_EVAL_PERIOD = 150
