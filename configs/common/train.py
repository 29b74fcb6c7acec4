"""Keys of training; those that Detectron2's lazy trainer knows keep its names."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights of a whole detector
    init_skip=[],  # patterns of names in it that start afresh, such as "*class_head*"
    init_classes="",  # its classes, taken over by name: "coco", or a COCO-format json
    init_backbone="",  # ImageNet weights of the backbone, where there is no init_checkpoint
    max_iter=90000,
    warmup=0,  # iterations in which the learning rate rises from a thousandth
    reference_batch=0,  # batch size that rates and iterations are for, to be scaled; 0: as it is
    amp=dict(enabled=False, dtype="bfloat16"),  # or "float16"
    accumulate=1,  # parts that a process's batch is taken in, one after the other
    recompute=False,  # activations of encoder and decoder in the backward pass, to save memory
    compile=False,  # the layers of encoder and decoder, by `torch.compile`
    clip_grad=dict(max_norm=0.1),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    fsdp=False,  # shard weights and optimizer over the GPUs instead of copying them to each
    checkpointer=dict(period=7393, max_to_keep=5),
    eval_period=7393,
    best_metric="bbox/AP",  # its best evaluation's weights stay in model_best.pth; "" keeps none
    ema=dict(decay=0.0),  # of an average of the weights, such as 0.9997: its AP is "ema/bbox/AP"
    instability_period=0,  # iterations between matchings of the test set; 0 never
    log_period=20,
    device="auto",  # "cuda" where there is a GPU, else "cpu"
    seed=42,
    hang_timeout=300,  # seconds that a process may keep the others waiting in a step
    worker_timeout=120,  # seconds that a data loader's workers may be silent
)
