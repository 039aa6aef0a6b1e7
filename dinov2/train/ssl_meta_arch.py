"""Student, teacher and the DINOv2 objective (arXiv:2304.07193, section 4).

Shapes: B images per rank, L local crops per image, N patches per global crop, M masked patches, D width,
K prototypes. Rows of crops are crop-major: the first global crop of every image, then the second; then the
first local crop of every image, and so on.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov2 import distributed
from dinov2.configs import dinov2_default_config
from dinov2.data.device_crops import finish_batch
from dinov2.errors import ConfigError
from dinov2.fsdp import ShardedGradScaler, reshard_fsdp_model
from dinov2.layers import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.centering import CenteredLoss
from dinov2.loss.targets import Targets, joint_sinkhorn_knopp
from dinov2.models import build_model_from_cfg
from dinov2.train.compilation import compile_blocks, wants_compiling
from dinov2.train.cuda_graphs import record_blocks, records
from dinov2.train.freezing import freeze_first_blocks, move_towards, moving_pairs
from dinov2.train.head_losses import NUM_GLOBAL_CROPS, Entry, dino_entries, head_loss
from dinov2.train.initialization import load_initial_weights
from dinov2.train.lora import add_adapters, follow_adapted
from dinov2.train.precision import Precision
from dinov2.train.recompute import recompute_activations
from dinov2.train.sharding import shard_networks
from dinov2.utils.config import collective_timeout
from dinov2.utils.param_groups import fuse_params_groups, get_params_groups_with_decay
from dinov2.utils.utils import has_batchnorms

logger = logging.getLogger("dinov2")

STUDENT_TEMP = 0.1
# In the order in which DINOv2 logs them.
LOGGED = ("dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")
CENTERINGS = ("centering", "sinkhorn_knopp")


@dataclass(frozen=True)
class Batch:
    """One collated batch, on the networks' device."""

    global_crops: Tensor  # [2B, 3, H, W]
    local_crops: Tensor | None  # [L*B, 3, h, w]
    masks: Tensor  # [2B, N] bool
    mask_indices: Tensor  # [M] positions in the flattened [2B * N] grid
    masks_weight: Tensor  # [M] 1 / masked patches of the crop

    @classmethod
    def from_collated(cls, images: dict[str, Any], device: torch.device, num_local_crops: int) -> "Batch":
        """Move the entries of ``collate_data_and_cast`` to ``device``."""

        def to_device(key: str) -> Tensor:
            return images[key].to(device, non_blocking=True)

        return cls(
            global_crops=to_device("collated_global_crops"),
            local_crops=to_device("collated_local_crops") if num_local_crops else None,
            masks=to_device("collated_masks"),
            mask_indices=to_device("mask_indices_list"),
            masks_weight=to_device("masks_weight"),
        )


@dataclass(frozen=True)
class TeacherLogits:
    """What the targets are made from; None for a term that is off."""

    cls: Tensor | None  # [2B, K], rows as in TeacherTargets
    patches: Tensor | None  # [M, K]


@dataclass(frozen=True)
class TeacherTargets:
    """Prototype assignments; None for a term that is off."""

    cls: Targets | None  # of 2B rows, row i made from the other view of the image in student row i
    patches: Targets | None  # of M rows


@dataclass(frozen=True)
class StudentTokens:
    """What the student's heads and losses look at."""

    global_cls: Tensor  # [2B, D]
    local_cls: Tensor | None  # [L*B, D]
    patches: Tensor  # [M, D]


@dataclass(frozen=True)
class Losses:
    """The scalar that is minimised, and the entries shown under DINOv2's names and with its scaling."""

    total: Tensor
    logged: dict[str, Tensor]


class SSLMetaArch(nn.Module):
    """The networks being trained and one method for each part of a training step.

    Args:
        cfg: resolved training config (``dinov2.configs.resolve_config``).

    Attributes:
        student, teacher: ``nn.ModuleDict`` with ``backbone``, ``dino_head`` and, if separate, ``ibot_head``.
        dino_loss, ibot_patch_loss, koleo_loss: the terms that are on.
        fp16_scaler: gradient scaler, or None where no network runs in fp16.
        initial_weights: which parts were loaded from a file.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        # A config written for DINOv2 itself lacks the keys that were added here.
        self.cfg = cfg = OmegaConf.merge(OmegaConf.to_container(dinov2_default_config), cfg)
        self.do_dino = cfg.dino.loss_weight > 0
        self.do_ibot = cfg.ibot.loss_weight > 0
        self.do_koleo = cfg.dino.koleo_loss_weight > 0
        self.ibot_separate_head = bool(cfg.ibot.separate_head)
        self.num_local_crops = cfg.crops.local_crops_number
        self.dino_out_dim = cfg.dino.head_n_prototypes
        self.ibot_out_dim = cfg.ibot.head_n_prototypes if self.ibot_separate_head else self.dino_out_dim
        self.need_to_synchronize_fsdp_streams = False
        if cfg.train.centering not in CENTERINGS:
            raise NotImplementedError(f"train.centering {cfg.train.centering!r} is not one of {CENTERINGS}.")

        student_backbone, teacher_backbone, self.embed_dim = build_model_from_cfg(cfg)
        self.student = nn.ModuleDict({"backbone": student_backbone, **self._build_heads()})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **self._build_heads()})
        self.teacher.requires_grad_(False)
        recompute_activations(student_backbone, cfg.train.activation_checkpointing)
        self.compile_losses = False
        if self.do_dino:
            self.dino_loss = DINOLoss(self.dino_out_dim, STUDENT_TEMP)
        if self.do_koleo:
            self.koleo_loss = KoLeoLoss(scope=cfg.dino.koleo_scope)
        if self.do_ibot:
            self.ibot_patch_loss = iBOTPatchLoss(self.ibot_out_dim, STUDENT_TEMP)

        self.initial_weights = load_initial_weights(self.student, self.teacher, self.centers(), cfg)
        self.precision = Precision(cfg.compute_precision, torch.device("cpu"))
        self.fp16_scaler: ShardedGradScaler | None = None

    def _build_heads(self) -> dict[str, DINOHead]:
        sections = {}
        if self.do_dino or (self.do_ibot and not self.ibot_separate_head):
            sections["dino_head"] = self.cfg.dino
        if self.do_ibot and self.ibot_separate_head:
            sections["ibot_head"] = self.cfg.ibot
        return {
            name: DINOHead(
                in_dim=self.embed_dim,
                out_dim=section.head_n_prototypes,
                hidden_dim=section.head_hidden_dim,
                bottleneck_dim=section.head_bottleneck_dim,
                nlayers=section.head_nlayers,
            )
            for name, section in sections.items()
        }

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.student.parameters()).device

    def forward(self, inputs: Any) -> None:
        """Not defined: a training step is :meth:`forward_backward`, features come from a backbone."""
        raise NotImplementedError("Use forward_backward() to train, or teacher.backbone for features.")

    def forward_backward(self, images: dict[str, Any], teacher_temp: float) -> dict[str, Tensor]:
        """Run both networks and backpropagate the total loss.

        Args:
            images: what ``collate_data_and_cast`` returns.
            teacher_temp: teacher temperature, > 0.

        Returns:
            The logged entries, scalars on the device. ``ibot_loss`` and ``koleo_loss`` are half of what is
            minimised and no loss weight of DINO or iBOT is applied, as DINOv2 logs them.
        """
        losses = self.compute_losses(images, teacher_temp)
        self.backprop_loss(losses.total)
        return losses.logged

    def compute_losses(self, images: dict[str, Any], teacher_temp: float) -> Losses:
        """Run both networks on a collated batch and return the losses with their graph."""
        (losses,) = self.micro_batch_losses([images], teacher_temp)
        return losses

    def micro_batch_losses(
        self,
        micro_batches: Sequence[dict[str, Any]],
        teacher_temp: float,
        seed: Callable[[int], None] = lambda number: None,
    ) -> Iterator[Losses]:
        """Yield the losses of every micro-batch of a step, with the graph of the student's pass over it.

        The teacher sees all of them first, and its targets are balanced or centred over all of them. Until
        its turn comes a micro-batch keeps its crops and the teacher's logits on the device: [2B + M, K]
        numbers in the format of the teacher's heads. Backpropagate what is yielded before asking for more.

        Args:
            micro_batches: what ``collate_data_and_cast`` returns, each.
            teacher_temp: teacher temperature, > 0.
            seed: called with the number of the micro-batch before the student's pass over it, which draws
                random numbers for stochastic depth.
        """
        batches = [self._prepare(images) for images in micro_batches]
        targets = self.assign_targets([self.teacher_logits(batch) for batch in batches], teacher_temp)
        for number in range(len(batches)):
            batch, wanted = batches.pop(0), targets.pop(0)
            seed(number)
            losses = self.combine_losses(batch, wanted, self.student_tokens(batch))
            del batch, wanted  # the graph holds what it needs, until the backward pass is done
            yield losses

    def _prepare(self, images: dict[str, Any]) -> Batch:
        images = finish_batch(images, self.device, self.precision.input_dtype)
        return Batch.from_collated(images, self.device, self.num_local_crops)

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> TeacherLogits:
        """Run the teacher on the unmasked global crops."""
        (tokens,) = self._needed_outputs("teacher", batch, [batch.global_crops], [None])
        cls_tokens, patch_tokens = tokens.tensor_split([len(batch.global_crops)])
        first, second = cls_tokens.chunk(NUM_GLOBAL_CROPS)
        cls_tokens = torch.cat((second, first))
        run = partial(self._run_head, self.teacher, "teacher")
        if self.do_dino and self.do_ibot and not self.ibot_separate_head:
            logits = run("dino_head", torch.cat((cls_tokens, patch_tokens)))
            return TeacherLogits(*logits.tensor_split([len(cls_tokens)]))
        return TeacherLogits(
            cls=run("dino_head", cls_tokens) if self.do_dino else None,
            patches=run(self._patch_part, patch_tokens) if self.do_ibot else None,
        )

    def assign_targets(self, logits: Sequence[TeacherLogits], teacher_temp: float) -> list[TeacherTargets]:
        """Turn the logits of all micro-batches of a step into targets, together.

        Returns:
            The targets of each micro-batch, to be read within the step.
        """
        none = [None] * len(logits)
        cls, patches = none, none
        if self.do_dino:
            cls = self._assign(self.dino_loss, [part.cls for part in logits], teacher_temp)
        if self.do_ibot:
            patches = self._assign(self.ibot_patch_loss, [part.patches for part in logits], teacher_temp)
        return [TeacherTargets(*both) for both in zip(cls, patches, strict=True)]

    def _assign(self, loss: CenteredLoss, chunks: list[Tensor], teacher_temp: float) -> list[Targets]:
        if self.cfg.train.centering == "sinkhorn_knopp":
            return joint_sinkhorn_knopp(chunks, teacher_temp, compile=self.compile_losses)
        return loss.center_jointly(chunks, teacher_temp)

    def student_tokens(self, batch: Batch) -> StudentTokens:
        """Run the student on the masked global crops and the local crops in one packed pass."""
        crops, masks = [batch.global_crops], [batch.masks]
        if batch.local_crops is not None:
            crops.append(batch.local_crops)
            masks.append(None)
        tokens, *local = self._needed_outputs("student", batch, crops, masks)
        cls_tokens, patches = tokens.tensor_split([len(batch.global_crops)])
        return StudentTokens(global_cls=cls_tokens, local_cls=local[0] if local else None, patches=patches)

    def _needed_outputs(
        self, network: str, batch: Batch, crops: list[Tensor], masks: list[Tensor | None]
    ) -> list[Tensor]:
        """Return the tokens that heads and losses look at, for each size of crop.

        Of global crops the cls tokens and then the masked patches, of local crops the cls tokens. A backbone
        of another library, behind DINOv2's interface, computes all tokens.
        """
        backbone = getattr(self, network)["backbone"]
        with self.precision.autocast(network, "backbone"):
            if hasattr(backbone, "forward_tokens"):
                return backbone(crops, masks, tokens=self._needed_tokens(batch, backbone)[: len(crops)])
            features = backbone(crops, masks=masks, is_training=True)
        needed = [entry["x_norm_clstoken"] for entry in features]
        if self.do_ibot:
            patches = features[0]["x_norm_patchtokens"].flatten(0, 1)[batch.mask_indices]
            needed[0] = torch.cat([needed[0], patches])
        return needed

    def _needed_tokens(self, batch: Batch, backbone: nn.Module) -> list[Tensor]:
        """Return where in a backbone's output those tokens are, for each size of crop."""
        first_patch = 1 + backbone.num_register_tokens
        crops, patches = batch.masks.shape
        needed = [torch.arange(crops, device=self.device) * (first_patch + patches)]
        if self.do_ibot:
            crop = batch.mask_indices // patches
            needed[0] = torch.cat([needed[0], batch.mask_indices + (crop + 1) * first_patch])
        if batch.local_crops is not None:
            height, width = batch.local_crops.shape[-2:]
            patches = (height // backbone.patch_size) * (width // backbone.patch_size)
            crop = torch.arange(len(batch.local_crops), device=self.device)
            needed.append(crop * (first_patch + patches))
        return needed

    def combine_losses(self, batch: Batch, targets: TeacherTargets, tokens: StudentTokens) -> Losses:
        """Weigh the terms into the total; every term may be off."""
        total, logged = self._prototype_losses(batch, targets, tokens)
        if self.do_koleo:
            # Per view: two views of one image must not push each other apart.
            views = tokens.global_cls.chunk(NUM_GLOBAL_CROPS)
            loss = self.cfg.dino.koleo_loss_weight * sum(self.koleo_loss(view) for view in views)
            logged["koleo_loss"] = loss.detach() / NUM_GLOBAL_CROPS
            total = total + loss
        return Losses(total, {name: logged[name] for name in LOGGED if name in logged})

    def _prototype_losses(
        self, batch: Batch, targets: TeacherTargets, tokens: StudentTokens
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the student's heads, and return DINO's and iBOT's part of the total and what is logged."""
        by_head: dict[str, list[Entry]] = {}
        if self.do_dino:
            by_head["dino_head"] = dino_entries(
                tokens.global_cls, tokens.local_cls, targets.cls, self.cfg.dino.loss_weight
            )
        if self.do_ibot:
            weights = batch.masks_weight.float() / len(batch.masks)
            weight = self.cfg.ibot.loss_weight
            entry = Entry("ibot_loss", tokens.patches, weights, [targets.patches], weight)
            by_head.setdefault(self._patch_part, []).append(entry)
        total = torch.zeros((), device=self.device)
        logged: dict[str, Tensor] = {}
        for part, entries in by_head.items():
            head = partial(self._run_head, self.student, "student", part)
            loss, values = head_loss(head, entries, STUDENT_TEMP, compile=self.compile_losses)
            total = total + loss
            logged |= values
        if self.do_ibot:
            logged["ibot_loss"] = logged["ibot_loss"] / NUM_GLOBAL_CROPS
        return total, logged

    def backprop_loss(self, loss: Tensor) -> None:
        """Backpropagate, scaled where the student runs in fp16."""
        if self.fp16_scaler is not None:
            loss = self.fp16_scaler.scale(loss)
        loss.backward()

    @property
    def _patch_part(self) -> str:
        """The head that patches go through."""
        return "ibot_head" if self.ibot_separate_head else "dino_head"

    def _run_head(self, heads: nn.ModuleDict, network: str, part: str, *arguments: Any) -> Any:
        with self.precision.autocast(network, part):
            return heads[part](*arguments)

    @torch.no_grad()
    def update_teacher(self, m: float) -> None:
        """Move the teacher's parameters towards the student's: teacher <- m * teacher + (1 - m) * student.

        Those that are frozen in the student stay as they are. With LoRA, the student's are the merged ones.
        """
        reshard_fsdp_model(self)
        followed = list(self.student)
        if self.cfg.student.lora_rank:
            followed.remove("backbone")
            follow_adapted(self.teacher["backbone"], self.student["backbone"], 1.0 - m)
        for name in followed:
            move_towards(moving_pairs(self.teacher[name], self.student[name]), 1.0 - m)

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """Set the student's mode; the teacher always stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def centers(self) -> dict[str, nn.Module]:
        """Return the loss modules that keep a running centre, by the name of the buffer in a run state."""
        names = ("dino_loss", "ibot_patch_loss")
        return {f"{name}.center": getattr(self, name) for name in names if hasattr(self, name)}

    def finish_center_updates(self) -> None:
        """Apply pending centre updates, so that the state saved is complete."""
        for loss in self.centers().values():
            loss.apply_center_update()

    def discard_center_updates(self) -> None:
        """Forget pending centre updates, of a step that does not count."""
        for loss in self.centers().values():
            loss.discard_center_update()

    def get_maybe_fused_params_for_submodel(self, m: nn.Module) -> list[dict[str, Any]]:
        """Return the fused parameter groups of one student submodule."""
        is_backbone = m is self.student["backbone"]
        groups = get_params_groups_with_decay(
            m,
            lr_decay_rate=self.cfg.optim.layerwise_decay,
            patch_embed_lr_mult=self.cfg.optim.patch_embed_lr_mult,
            lr_mult=self.cfg.optim.backbone_lr_mult if is_backbone else 1.0,
        )
        return [{**group, "is_backbone": is_backbone, "fused": True} for group in fuse_params_groups(groups)]

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of all student submodules, backbone first."""
        return [group for m in self.student.values() for group in self.get_maybe_fused_params_for_submodel(m)]

    def prepare_for_distributed_training(self) -> None:
        """Give teacher and student, on every rank, the values to start from; shard; choose number formats.

        Call once the networks are on their device, and before an optimizer is made. Teacher parts that were
        loaded from a file keep their values, the others copy the student's.

        Raises:
            ConfigError: if the student holds batch normalisation, whose statistics ranks would not share, or
                the processes cannot be grouped for HYBRID_SHARD.
        """
        if has_batchnorms(self.student):
            raise ConfigError(
                "The student contains batch normalisation, which is not synchronised between processes; "
                "build its heads with use_bn=False."
            )
        for name, module in self.student.items():
            if f"teacher.{name}" not in self.initial_weights.parts:
                self.teacher[name].load_state_dict(module.state_dict())
        self._restrict_training()
        self._compile()
        self.precision = Precision(self.cfg.compute_precision, self.device)
        if distributed.is_enabled():
            for tensor in self.state_dict().values():
                dist.broadcast(tensor, src=0)
        if distributed.get_global_size() > 1:
            timeout = collective_timeout(self.cfg.train.process_timeout)
            shard_networks(self.student, self.teacher, self.precision, self.cfg.compute_precision, timeout)
        if self.cfg.compute_precision.grad_scaler and self.precision.needs_grad_scaler:
            self.fp16_scaler = ShardedGradScaler()

    def _restrict_training(self) -> None:
        """Freeze what the config wants frozen for the whole run; the weights to start from are in place."""
        freeze_first_blocks(self.student["backbone"], self.cfg.train.freeze_blocks)
        if self.cfg.student.lora_rank:
            add_adapters(self.student["backbone"], self.cfg.student.lora_rank, self.cfg.student.lora_alpha)

    def _compile(self) -> None:
        setting = self.cfg.train.compile
        self.compile_losses = wants_compiling(setting, self.device)
        backbones = {name: getattr(self, name)["backbone"] for name in ("student", "teacher")}
        if self.compile_losses:
            compile_blocks(*backbones.values(), required=setting is True)
        if records(self.cfg, self.device, compiled=self.compile_losses):
            micro_batches, required = self.cfg.optim.accumulate_steps, self.cfg.train.cuda_graphs is True
            record_blocks(backbones, calls_per_step=micro_batches, required=required)

    def fsdp_synchronize_streams(self) -> None:
        """Kept for scripts that call it; there are no private streams to synchronise."""
