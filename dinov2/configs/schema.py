"""Every config key with its type, default, unit, accepted values and one line of meaning.

`ssl_default_config.yaml` holds the same defaults and `docs/configuration.md` the same table; tests compare
both with this file. Nothing here imports torch: a wrong config has to stop a run within its first second.
"""

from dataclasses import dataclass, field

from dinov2.configs.keys import Key, iterate_keys, setting
from dinov2.configs.scaling import SCALING_RULE

# Sizes of the built-in architectures: width, number of blocks, attention heads. The factories in
# dinov2.models have the same (a test compares them); whoever registers another one there adds a line here.
ARCHITECTURE_SIZES: dict[str, tuple[int, int, int]] = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}

AUTO = "auto"  # in place of an architecture: the one the weights have

DTYPES = ("fp32", "fp16", "bf16")
SHARDING_STRATEGIES = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")


@dataclass(kw_only=True)
class Model:
    WEIGHTS: str | None = setting(
        "", "Training checkpoint to start from when there is nothing to resume; empty for none"
    )


@dataclass(kw_only=True)
class MixedPrecision:
    param_dtype: str = setting(
        "fp16",
        "Number format of forward and backward passes, in which sharded parameters are sent, too",
        choices=DTYPES,
    )
    reduce_dtype: str = setting(
        "fp16",
        "Number format in which sharded gradients are sent and averaged; fp16 stands for param_dtype; what "
        "is not sharded is averaged in fp32",
        choices=DTYPES,
    )
    buffer_dtype: str = setting("fp32", "Read, not used: buffers are always fp32", choices=DTYPES)


@dataclass(kw_only=True)
class ModulePrecision:
    sharding_strategy: str = setting(
        "SHARD_GRAD_OP",
        "What the processes divide of parameters, gradients and optimizer state: nothing (NO_SHARD); all, "
        "with parameters gathered once per step (SHARD_GRAD_OP) or for forward and backward each "
        "(FULL_SHARD); or that within groups of hybrid_shard_size processes (HYBRID_SHARD)",
        choices=SHARDING_STRATEGIES,
    )
    mixed_precision: MixedPrecision = field(default_factory=MixedPrecision)


def _float32_gradients() -> ModulePrecision:
    return ModulePrecision(mixed_precision=MixedPrecision(reduce_dtype="fp32"))


@dataclass(kw_only=True)
class TeacherPrecision:
    backbone: ModulePrecision = field(default_factory=ModulePrecision)
    dino_head: ModulePrecision = field(default_factory=ModulePrecision)
    ibot_head: ModulePrecision = field(default_factory=ModulePrecision)


@dataclass(kw_only=True)
class StudentPrecision:
    """Like the teacher's, but the gradients of the heads are reduced in float32."""

    backbone: ModulePrecision = field(default_factory=ModulePrecision)
    dino_head: ModulePrecision = field(default_factory=_float32_gradients)
    ibot_head: ModulePrecision = field(default_factory=_float32_gradients)


@dataclass(kw_only=True)
class ComputePrecision:
    grad_scaler: bool = setting(True, "Scale the loss so that fp16 gradients do not underflow")
    hybrid_shard_size: int | None = setting(
        None, "Processes in a group of HYBRID_SHARD; null is those of one machine", at_least=1
    )
    teacher: TeacherPrecision = field(default_factory=TeacherPrecision)
    student: StudentPrecision = field(default_factory=StudentPrecision)


@dataclass(kw_only=True)
class Dino:
    loss_weight: float = setting(1.0, "Weight of the DINO loss on cls tokens; 0 turns it off", at_least=0)
    head_n_prototypes: int = setting(65536, "Outputs of the head", unit="prototypes", at_least=1)
    head_bottleneck_dim: int = setting(256, "Width before the last layer", unit="channels", at_least=1)
    head_nlayers: int = setting(3, "Linear layers before the last one", unit="layers", at_least=1)
    head_hidden_dim: int = setting(2048, "Width of the hidden layers", unit="channels", at_least=1)
    koleo_loss_weight: float = setting(
        0.1, "Weight of the KoLeo spreading loss on cls tokens; 0 turns it off", at_least=0
    )
    koleo_scope: str = setting(
        "rank",
        "Where KoLeo looks for nearest neighbours: in the batch of each process, or over all processes",
        choices=("rank", "global"),
    )


@dataclass(kw_only=True)
class Ibot:
    loss_weight: float = setting(1.0, "Weight of the iBOT loss on masked patches; 0 turns it off", at_least=0)
    mask_sample_probability: float = setting(
        0.5, "Share of the global crops that get a mask", at_least=0, at_most=1
    )
    mask_ratio_min_max: tuple[float, float] = setting(
        (0.1, 0.5), "Smallest and largest share of masked patches in a masked crop", at_least=0, at_most=1
    )
    separate_head: bool = setting(False, "Give iBOT a head of its own instead of the DINO head")
    head_n_prototypes: int = setting(
        65536, "As dino.head_n_prototypes; read only with separate_head", unit="prototypes", at_least=1
    )
    head_bottleneck_dim: int = setting(
        256, "As dino.head_bottleneck_dim; read only with separate_head", unit="channels", at_least=1
    )
    head_nlayers: int = setting(
        3, "As dino.head_nlayers; read only with separate_head", unit="layers", at_least=1
    )
    head_hidden_dim: int = setting(
        2048, "As dino.head_hidden_dim; read only with separate_head", unit="channels", at_least=1
    )


@dataclass(kw_only=True)
class Train:
    batch_size_per_gpu: int = setting(64, "Images per process and iteration", unit="images", at_least=1)
    dataset_path: str | list[str] = setting(
        "ImageNet:split=TRAIN",
        "Dataset string, Name:key=value:..., or a mixture, 2*Name:...+Name:..., also written as a list; the "
        "default still needs root and extra",
    )
    path_map: dict[str, str] = setting(
        {}, "Where folders that datasets name lie on this machine: {/recorded/folder: /folder/here}"
    )
    output_dir: str = setting(".", "Where everything is written; set from --output-dir")
    saveckp_freq: int = setting(20, "Without effect, see checkpointing.period")
    seed: int = setting(
        0, "Seed of weights, data order and augmentation; the process rank is added", at_least=0
    )
    num_workers: int = setting(10, "Data loading processes per training process", at_least=0)
    OFFICIAL_EPOCH_LENGTH: int = setting(
        1250, "Length of what the config calls an epoch, whatever the dataset", unit="iterations", at_least=1
    )
    max_bad_fraction: float = setting(
        0.001,
        "Share of the images drawn that may be unreadable and are replaced by others; above it the run stops",
        at_least=0,
        at_most=1,
    )
    worker_timeout: float = setting(
        900.0,
        "How long to wait for a batch from the data loading processes before the run stops; 0 for ever",
        unit="seconds",
        at_least=0,
    )
    prefetch_factor: int | None = setting(
        None, "Batches that each data loading process prepares ahead; null is PyTorch's 2", at_least=1
    )
    worker_start_method: str = setting(
        "default",
        "How data loading processes are started; default is Python's for this platform",
        choices=("default", "fork", "spawn", "forkserver"),
    )
    cache_dataset: bool = setting(True, "Without effect")
    centering: str = setting(
        "centering",
        "How teacher outputs become targets: softmax with a running centre, or Sinkhorn-Knopp",
        choices=("centering", "sinkhorn_knopp"),
    )
    device: str = setting(
        "auto", "Where to compute; auto takes CUDA when there is any", choices=("auto", "cpu", "cuda")
    )
    log_period: int = setting(10, "Distance of log lines and metrics rows", unit="iterations", at_least=1)
    init_weights_from_chkpt: str | None = setting("", "Other spelling of student.pretrained_weights")
    sampler_type: str = setting(
        "sharded_infinite",
        "Data order: a fixed share of the dataset per process, or one order dealt out to all",
        choices=("sharded_infinite", "infinite"),
    )
    sshid: str | int | None = setting("", "Without effect, it belongs in the dataset string")
    freeze_backbone_iterations: int = setting(
        0,
        "How long the backbone stays as it is while the heads learn; its learning rate then rises from 0 "
        "over as many iterations as the warm-up has",
        unit="iterations",
        at_least=0,
    )
    freeze_blocks: int = setting(
        0,
        "Keep the patch embedding, the tokens and so many first blocks of the backbone as they are; only a "
        "mask token that is all zeros learns",
        unit="blocks",
        at_least=0,
    )
    activation_checkpointing: str = setting(
        "none",
        "What the backward pass computes again instead of keeping it: nothing, everything in a block but its "
        "matrix products and attention (selective), or the whole block (full)",
        choices=("none", "selective", "full"),
    )
    compile: bool | None = setting(
        None,
        "Run transformer blocks and losses through torch.compile: equal but for rounding, nearly twice as "
        "fast on a GPU, and up to a minute more until the first steps are done; null: on a GPU whose "
        "compiler works",
    )
    cuda_graphs: bool | None = setting(
        None,
        "Record the compiled blocks as CUDA graphs, so that the GPU does not wait for the host to start its "
        "kernels; null: in a run of one process with memory to spare, without accumulation and LoRA",
    )
    max_bad_steps: int = setting(
        24,
        "Steps in a row that may be skipped because a loss or gradient is not finite; then the run goes back "
        "to its last checkpoint once, and stops when it happens again",
        unit="steps",
        at_least=1,
    )
    process_timeout: float = setting(
        1800.0,
        "How long a process may keep the others waiting before all stop with a message that names it",
        unit="seconds",
        above=0,
    )
    self_check: str = setting(
        "stop",
        "Check the run before its first step: stop when something is wrong, only warn, or off",
        choices=("stop", "warn", "off"),
    )


@dataclass(kw_only=True)
class Student:
    arch: str = setting(
        "vit_large",
        "Vision transformer: vit_tiny, vit_small, vit_base, vit_large or vit_giant2; auto takes sizes, "
        "patch, registers, biases, LayerScale and feed-forward from the pretrained weights",
    )
    patch_size: int = setting(16, "Side of a patch", unit="pixels", at_least=1)
    drop_path_rate: float = setting(
        0.3, "Share of residual branches dropped in training (student only)", at_least=0, below=1
    )
    layerscale: float | None = setting(
        1.0e-5, "Initial LayerScale factor; 0 or null for no LayerScale", at_least=0
    )
    drop_path_uniform: bool = setting(
        True, "The same drop path rate in every block instead of one rising from 0"
    )
    pretrained_weights: str | None = setting(
        "",
        "Backbone weights to start from: a file, a folder, an address, hub:<model>, hf-hub:<owner>/<name> or "
        "zenodo:<record>/<file>; empty for none",
    )
    ffn_layer: str = setting(
        "mlp", "Feed-forward layer", choices=("mlp", "swiglu", "swiglufused", "identity")
    )
    block_chunks: int = setting(
        0, "Number of groups the blocks are wrapped in for sharding; 0 for none", at_least=0
    )
    qkv_bias: bool = setting(True, "Bias in the query, key and value projection")
    proj_bias: bool = setting(True, "Bias in the attention output projection")
    ffn_bias: bool = setting(True, "Bias in the feed-forward layer")
    num_register_tokens: int = setting(0, "Register tokens", unit="tokens", at_least=0)
    interpolate_antialias: bool = setting(False, "Antialias the resampled position embedding")
    interpolate_offset: float = setting(
        0.1, "Historic offset in resampling the position embedding; 0 is exact", at_least=0
    )
    embed_dim: int | None = setting(
        None, "Width instead of the architecture's own", unit="channels", at_least=1
    )
    depth: int | None = setting(None, "Number of blocks instead of the architecture's own", at_least=1)
    num_heads: int | None = setting(None, "Attention heads instead of the architecture's own", at_least=1)
    mlp_ratio: float | None = setting(
        None, "Hidden width of the feed-forward as a multiple of the width, instead of 4", above=0
    )
    norm_eps: float = setting(
        1.0e-6, "What LayerNorm adds to the variance; transformers' ViTModel has 1e-12", above=0
    )
    pos_embed_resampling: str = setting(
        "interpolate",
        "How pretrained positions of another grid are fitted: bicubic interpolation, or their middle cut out",
        choices=("interpolate", "center_crop"),
    )
    patch_embed_resampling: str = setting(
        "none",
        "How a pretrained patch embedding of another patch size is fitted: not at all, or by the "
        "pseudo-inverse of resizing (FlexiViT)",
        choices=("none", "pseudo_inverse"),
    )
    lora_rank: int = setting(
        0,
        "Train low-rank updates of this rank instead of the backbone itself (needs peft); 0 for none",
        at_least=0,
    )
    lora_alpha: float = setting(16.0, "The low-rank updates count alpha / rank times", above=0)


@dataclass(kw_only=True)
class Teacher:
    momentum_teacher: float = setting(
        0.992, "Share of itself the teacher keeps per iteration, at the start", at_least=0, at_most=1
    )
    final_momentum_teacher: float = setting(1.0, "The same at the end of the run", at_least=0, at_most=1)
    warmup_teacher_temp: float = setting(0.04, "Teacher temperature at the start", above=0)
    teacher_temp: float = setting(0.07, "Teacher temperature after its warm-up", above=0)
    warmup_teacher_temp_epochs: int = setting(
        30, "Length of the teacher temperature's warm-up", unit="epochs", at_least=0
    )


@dataclass(kw_only=True)
class Optim:
    epochs: int = setting(
        100, "Length of the run, in units of train.OFFICIAL_EPOCH_LENGTH", unit="epochs", at_least=1
    )
    weight_decay: float = setting(0.04, "Weight decay at the start", at_least=0)
    weight_decay_end: float = setting(0.4, "Weight decay at the end", at_least=0)
    base_lr: float = setting(0.004, "Peak learning rate at the reference batch of scaling_rule", at_least=0)
    lr: float = setting(
        0.0, "Peak learning rate in use: derived from base_lr, given only with scaling_rule none", at_least=0
    )
    warmup_epochs: int = setting(10, "Length of the learning rate's warm-up", unit="epochs", at_least=0)
    min_lr: float = setting(1.0e-6, "Learning rate at the end", at_least=0)
    clip_grad: float | None = setting(
        3.0, "Largest gradient norm of each student submodule; 0 or null for no clipping", at_least=0
    )
    freeze_last_layer_epochs: int = setting(
        1, "How long the last layer of the heads stays as it is", unit="epochs", at_least=0
    )
    scaling_rule: str = setting(
        "sqrt_wrt_1024",
        "How lr follows from base_lr and the total batch: sqrt_wrt_N is base_lr * sqrt(batch / N), "
        "linear_wrt_N is base_lr * batch / N, none takes lr as it is",
        pattern=SCALING_RULE.pattern,
        pattern_words='"sqrt_wrt_<images>", "linear_wrt_<images>" or "none"',
    )
    patch_embed_lr_mult: float = setting(0.2, "Factor on the patch embedding's learning rate", at_least=0)
    layerwise_decay: float = setting(
        0.9, "Factor on the learning rate per block, from the last to the first", above=0, at_most=1
    )
    adamw_beta1: float = setting(0.9, "AdamW's decay of the gradient mean", at_least=0, below=1)
    adamw_beta2: float = setting(0.999, "AdamW's decay of the squared gradient", at_least=0, below=1)
    max_iterations: int | None = setting(
        None, "Length of the run instead of epochs", unit="iterations", at_least=1
    )
    max_images: int | None = setting(
        None, "Length of the run instead of epochs, over all processes", unit="images", at_least=1
    )
    max_passes: float | None = setting(
        None, "Length of the run instead of epochs", unit="passes over the dataset", above=0
    )
    backbone_lr_mult: float = setting(
        1.0, "Factor on the learning rate of the whole backbone, not of the heads", at_least=0
    )
    accumulate_steps: int = setting(
        1,
        "Batches of batch_size_per_gpu that every process adds up to one optimizer step; the result is that "
        "of so many times the processes",
        unit="batches",
        at_least=1,
    )
    start_iter: int = setting(
        0,
        "Where a run with nothing to resume begins in schedules and data order, to go on from head.head_path",
        unit="iterations",
        at_least=0,
    )


@dataclass(kw_only=True)
class Crops:
    global_crops_scale: tuple[float, float] = setting(
        (0.32, 1.0), "Smallest and largest share of the image in a global crop", above=0
    )
    local_crops_number: int = setting(8, "Local crops per image", at_least=0)
    local_crops_scale: tuple[float, float] = setting(
        (0.05, 0.32), "Smallest and largest share of the image in a local crop", above=0
    )
    global_crops_size: int = setting(224, "Side of a global crop", unit="pixels", at_least=1)
    local_crops_size: int = setting(96, "Side of a local crop", unit="pixels", at_least=1)
    horizontal_flip_prob: float = setting(0.5, "Probability of a left-right flip", at_least=0, at_most=1)
    vertical_flip_prob: float = setting(
        0.0, "Probability of an upside-down flip; 0.5 suits tissue", at_least=0, at_most=1
    )
    gaussian_blur: str = setting(
        "effective",
        "Blur probabilities of global crop 1, 2 and local crops: effective is 0, 0.9, 0.5, as DINOv2's code "
        "did; nominal is 1, 0.1, 0.5, as the paper says",
        choices=("effective", "nominal"),
    )
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406),
        "Channel means of the normalisation, red, green, blue of 0..1",
        at_least=0,
        at_most=1,
    )
    std: tuple[float, float, float] = setting(
        (0.229, 0.224, 0.225), "Channel standard deviations of the normalisation", above=0, at_most=1
    )
    pipeline: str = setting(
        "reference",
        "How crops are made: reference is torchvision on PIL images, bit for bit DINOv2's; fast makes the "
        "same with tensors in the loader's workers; device leaves the colours to the training device",
        choices=("reference", "fast", "device"),
    )
    scale_reference: str = setting(
        "image",
        "What the two scales are shares of: the image, or the crop's own area in pixels of the image, which "
        "limits the zoom and may exceed 1 (extended context)",
        choices=("image", "crop"),
    )
    aspect_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "Smallest and largest width / height of the region a crop is made of", above=0
    )
    quarter_turn_prob: float = setting(
        0.0,
        "Probability of a turn by 90, 180 or 270 degrees; 0.75 suits tissue",
        at_least=0,
        at_most=1,
    )
    color_jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.2, 0.1),
        "Strengths of the jitter of brightness, contrast, saturation and hue (at most 0.5)",
        at_least=0,
    )
    color_jitter_prob: float = setting(0.8, "Probability of colour jitter", at_least=0, at_most=1)
    grayscale_prob: float = setting(0.2, "Probability of a grey crop", at_least=0, at_most=1)
    solarize_prob: float = setting(
        0.2,
        "Probability that the bright half of the second global crop is inverted; 0 suits tissue",
        at_least=0,
        at_most=1,
    )
    hed_jitter: float = setting(
        0.0,
        "Strength of stain jitter: largest relative change of haematoxylin, eosin and residual, and largest "
        "addition to them",
        unit="optical density, natural logarithm",
        at_least=0,
        at_most=1,
    )
    hed_jitter_prob: float = setting(0.0, "Probability of stain jitter", at_least=0, at_most=1)


@dataclass(kw_only=True)
class EvaluationSlides:
    path: str = setting(
        "",
        "Slides that patients are scored by in the loop: a folder, a pattern, a file, or a CSV with a line "
        "per slide; empty for none",
    )
    labels: str = setting("", "CSV of their labels, with a line per slide: patient, slide, target")
    target: str = setting("", "Column of the labels that holds the classes")
    patient_column: str = setting("patient", "Column of the labels that names the patients")
    slide_column: str = setting("slide", "Column of the labels that names the slides")
    mpp: float = setting(0.5, "Resolution of the tiles", unit="um per pixel", above=0)
    tile_size: int | None = setting(
        None,
        "Side of the tiles before they are scaled to crops.global_crops_size; null is that size",
        unit="pixels",
        at_least=1,
    )
    max_tiles: int = setting(64, "Tiles of a slide, drawn once and the same in all runs", at_least=1)
    min_tissue: float = setting(0.25, "Least share of tissue in a tile", at_least=0, at_most=1)
    assume_mpp: float | None = setting(
        None,
        "Resolution of the slides that state none; null refuses them",
        unit="um per level-0 pixel",
        above=0,
    )
    folds: int = setting(5, "Folds of the cross-validation of the patients", at_least=2)
    aggregator: str = setting(
        "mean",
        "What scores patients: logistic regression on mean features (mean), or gated attention (abmil)",
        choices=("mean", "abmil"),
    )
    period: int | None = setting(
        None,
        "Distance of scorings, a multiple of that of evaluations in the loop; null is each of them",
        unit="iterations",
        at_least=1,
    )


@dataclass(kw_only=True)
class Evaluation:
    eval_period_iterations: int = setting(
        12500, "Distance of exports to eval/training_<iteration>; 0 or less for none", unit="iterations"
    )
    monitor_period: int | None = setting(
        None,
        "Distance of evaluations in the loop; null is eval_period_iterations, 0 or less for none",
        unit="iterations",
    )
    monitor_samples: int = setting(
        512, "Images that the signals without labels are computed on", unit="images", at_least=16
    )
    monitor_dataset_path: str = setting(
        "", "Dataset string of these images; empty takes them from the training set"
    )
    train_dataset_path: str = setting(
        "", "Dataset string of the labelled images that k-NN learns from; empty for no k-NN in the loop"
    )
    val_dataset_path: str = setting(
        "", "Dataset string of the labelled images that k-NN is judged by, not those of the final test"
    )
    nb_knn: int = setting(20, "Neighbours that vote in the loop", at_least=1)
    batch_size: int = setting(64, "Images per process and forward pass in the loop", at_least=1)
    best_checkpoint: str = setting(
        "auto",
        "Signal by which the iteration to ship is chosen; auto is knn_balanced_accuracy where there are "
        "labels, else rankme; none chooses nothing",
        choices=(
            "auto",
            "none",
            "knn_balanced_accuracy",
            "knn_macro_f1",
            "knn_auroc",
            "rankme",
            "slide_auroc",
        ),
    )
    early_stop: bool = setting(
        False, "End the run when the chosen signal has not become better for patience evaluations"
    )
    patience: int = setting(5, "Evaluations without a gain after which early_stop ends the run", at_least=1)
    on_collapse: str = setting(
        "warn", "What to do when the features collapse: warn, or stop with status 1", choices=("warn", "stop")
    )
    slides: EvaluationSlides = field(default_factory=EvaluationSlides)


@dataclass(kw_only=True)
class Checkpointing:
    period: int | None = setting(
        None, "Distance of resumable checkpoints; null is 3 epochs", unit="iterations", at_least=1
    )
    max_to_keep: int = setting(3, "How many resumable checkpoints are kept", at_least=1)
    keep_every: int | None = setting(
        None,
        "Checkpoints after multiples of this number are kept for ever, beside the max_to_keep latest",
        unit="iterations",
        at_least=1,
    )
    asynchronous: bool = setting(True, "Write checkpoints while the training goes on")


@dataclass(kw_only=True)
class Head:
    head_path: str | None = setting(
        None,
        "Folder (eval/training_<iteration>), or one of its files, with student and teacher heads to start "
        "from; null for none",
    )
    on_missing: str = setting(
        "stop",
        "What to do about heads that head.head_path lacks: stop, or start them with random weights",
        choices=("stop", "reinit"),
    )


@dataclass(kw_only=True)
class Tracking:
    tensorboard: bool = setting(False, "Write the metrics for TensorBoard, too, to <output_dir>/tensorboard")
    wandb: str = setting(
        "off",
        "Send the metrics to Weights & Biases, too; offline writes them to <output_dir>/wandb without an "
        "account",
        choices=("off", "offline", "online"),
    )
    wandb_project: str = setting("dinov2", "Project of the runs at Weights & Biases")


@dataclass(kw_only=True)
class Config:
    """The whole configuration, in the order in which ``config.yaml`` is written."""

    MODEL: Model = field(default_factory=Model)
    compute_precision: ComputePrecision = field(default_factory=ComputePrecision)
    dino: Dino = field(default_factory=Dino)
    ibot: Ibot = field(default_factory=Ibot)
    train: Train = field(default_factory=Train)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    optim: Optim = field(default_factory=Optim)
    crops: Crops = field(default_factory=Crops)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    head: Head = field(default_factory=Head)
    tracking: Tracking = field(default_factory=Tracking)


KEYS: dict[str, Key] = {key.path: key for key in iterate_keys(Config())}

SECTIONS: frozenset[str] = frozenset(
    path[:dot] for path in KEYS for dot, character in enumerate(path) if character == "."
)

# Keys that older configs carry and that change nothing: what to use instead.
DEAD_KEYS: dict[str, str] = {
    "train.saveckp_freq": "use checkpointing.period (iterations between resumable checkpoints)",
    "train.cache_dataset": "no dataset of this package has a cache to switch",
    "train.sshid": "write it into the dataset string, train.dataset_path=Pathology:...:sshid=<value>",
}
