"""Real training steps on random images, for comparison with what is calculated about them."""

import torch

from dinov2.configs import resolve_config
from dinov2.train.input import build_collate
from dinov2.train.optimizer import build_optimizer
from dinov2.train.planning.memory import Memory, PartLayout, step_memory
from dinov2.train.planning.parameters import build_networks
from dinov2.train.planning.workload import Workload
from dinov2.train.schedules import ScheduleValues
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.step import train_step

SMALL = (
    "student.arch=vit_tiny",
    "student.depth=2",
    "student.patch_size=14",
    "crops.global_crops_size=84",
    "crops.local_crops_size=42",
    "train.batch_size_per_gpu=4",
    "train.centering=sinkhorn_knopp",
    "dino.head_n_prototypes=512",
    "dino.head_hidden_dim=256",
    "dino.head_bottleneck_dim=64",
)
VALUES = ScheduleValues(lr=1e-4, weight_decay=0.04, momentum=0.99, teacher_temp=0.07, last_layer_lr=1e-4)


def in_format(name: str) -> list[str]:
    """Overrides that let all networks compute in fp32, bf16 or fp16."""
    return [
        f"compute_precision.{network}.{part}.mixed_precision.param_dtype={name}"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]


def resolve(*overrides: str, number_format: str = "fp32"):
    return resolve_config("", [*in_format(number_format), *overrides])


def workload(cfg) -> Workload:
    networks = build_networks(cfg)
    return Workload.of(cfg, networks.backbone, batch=cfg.train.batch_size_per_gpu, mask_token_learns=True)


def build(cfg, device: str = "cpu") -> SSLMetaArch:
    torch.manual_seed(0)
    model = SSLMetaArch(cfg).to(device)
    model.prepare_for_distributed_training()
    model.train()
    return model


def random_batch(cfg, dtype: torch.dtype = torch.float32):
    def crops(count: int, pixels: int) -> list[torch.Tensor]:
        return [torch.randn(3, pixels, pixels) for _ in range(count)]

    samples = [
        (
            {
                "global_crops": crops(2, cfg.crops.global_crops_size),
                "local_crops": crops(cfg.crops.local_crops_number, cfg.crops.local_crops_size),
            },
            (),
        )
        for _ in range(cfg.train.batch_size_per_gpu)
    ]
    return build_collate(cfg, dtype)(samples)


def run_steps(cfg, count: int, device: str = "cpu") -> None:
    """Build everything and do ``count`` optimizer steps."""
    model = build(cfg, device)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    for _ in range(count):
        images = random_batch(cfg, model.precision.input_dtype)
        train_step(model, optimizer, images, VALUES, 3.0)


def calculated(cfg, number_format: str, device: str = "cpu") -> Memory:
    """What is calculated for one process."""
    networks = build_networks(cfg)
    size = 4 if number_format == "fp32" else 2
    layout = {
        (network, part.name): PartLayout("NO_SHARD", 1, size, 4)
        for network in ("student", "teacher")
        for part in networks.parts
    }
    return step_memory(workload(cfg), networks, layout, device=device)
