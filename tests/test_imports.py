"""The public contract: every import path of DINOv2 resolves, and calls are accepted as DINOv2 accepts them.

A signature is written as DINOv2 has it. Ours must take the same parameters in the same order with the same
defaults; what is added must be keyword-only and optional. Where the contract leaves a name open, the one here
starts with an underscore.
"""

import enum
import importlib
import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import REPO

NAMES = {
    "dinov2.models": "build_model build_model_from_cfg",
    "dinov2.models.vision_transformer": (
        "DinoVisionTransformer BlockChunk named_apply init_weights_vit_timm "
        "vit_small vit_base vit_large vit_giant2"
    ),
    "dinov2.layers": (
        "DINOHead LayerScale Mlp PatchEmbed SwiGLUFFN SwiGLUFFNFused SwiGLUFFNAligned NestedTensorBlock "
        "CausalAttentionBlock Attention MemEffAttention"
    ),
    "dinov2.layers.attention": "Attention MemEffAttention XFORMERS_ENABLED XFORMERS_AVAILABLE",
    "dinov2.layers.block": (
        "Block NestedTensorBlock CausalAttentionBlock drop_add_residual_stochastic_depth get_branges_scales "
        "add_residual get_attn_bias_and_cat drop_add_residual_stochastic_depth_list attn_bias_cache "
        "XFORMERS_ENABLED XFORMERS_AVAILABLE"
    ),
    "dinov2.layers.dino_head": "DINOHead",
    "dinov2.layers.drop_path": "DropPath drop_path",
    "dinov2.layers.layer_scale": "LayerScale",
    "dinov2.layers.mlp": "Mlp",
    "dinov2.layers.patch_embed": "PatchEmbed make_2tuple",
    "dinov2.layers.swiglu_ffn": (
        "SwiGLUFFN SwiGLUFFNFused SwiGLUFFNAligned XFORMERS_ENABLED XFORMERS_AVAILABLE"
    ),
    "dinov2.loss": "DINOLoss iBOTPatchLoss KoLeoLoss",
    "dinov2.loss.dino_clstoken_loss": "DINOLoss",
    "dinov2.loss.ibot_patch_loss": "iBOTPatchLoss",
    "dinov2.loss.koleo_loss": "KoLeoLoss",
    "dinov2.data": (
        "DatasetWithEnumeratedTargets make_data_loader make_dataset SamplerType collate_data_and_cast "
        "MaskingGenerator DataAugmentationDINO"
    ),
    "dinov2.data.adapters": "DatasetWithEnumeratedTargets",
    "dinov2.data.augmentations": "DataAugmentationDINO",
    "dinov2.data.collate": "collate_data_and_cast",
    "dinov2.data.loaders": "make_dataset make_data_loader SamplerType",
    "dinov2.data.masking": "MaskingGenerator",
    "dinov2.data.samplers": "EpochSampler InfiniteSampler ShardedInfiniteSampler",
    "dinov2.data.transforms": (
        "GaussianBlur MaybeToTensor IMAGENET_DEFAULT_MEAN IMAGENET_DEFAULT_STD make_normalize_transform "
        "make_classification_train_transform make_classification_eval_transform"
    ),
    "dinov2.data.datasets": "ImageNet ImageNet22k Pathology",
    "dinov2.data.datasets.CustomImageDataset": "CustomImageDataset",
    "dinov2.data.datasets.decoders": "Decoder ImageDataDecoder TargetDecoder DenseTargetDecoder",
    "dinov2.data.datasets.extended": "ExtendedVisionDataset",
    "dinov2.train": "get_args_parser main SSLMetaArch",
    "dinov2.train.ssl_meta_arch": "SSLMetaArch",
    "dinov2.train.train": (
        "get_args_parser main build_optimizer build_schedulers apply_optim_scheduler do_test do_train"
    ),
    "dinov2.eval.knn": (
        "get_args_parser main KnnModule DictKeysModule ModuleDictWithForward create_module_dict filter_train "
        "create_class_indices_mapping eval_knn eval_knn_with_model"
    ),
    "dinov2.eval.linear": (
        "get_args_parser main LinearClassifier AllClassifiers LinearPostprocessor create_linear_input "
        "scale_lr setup_linear_classifiers evaluate_linear_classifiers eval_linear make_eval_data_loader "
        "test_on_datasets run_eval_linear"
    ),
    "dinov2.eval.log_regression": "get_args_parser main C_POWER_RANGE",
    "dinov2.eval.metrics": (
        "MetricType AccuracyAveraging build_metric build_topk_accuracy_metric "
        "build_topk_imagenet_real_accuracy_metric ImageNetReaLAccuracy"
    ),
    "dinov2.eval.setup": "get_args_parser setup_and_build_model build_model_for_eval",
    "dinov2.eval.utils": (
        "ModelWithNormalize ModelWithIntermediateLayers evaluate all_gather_and_flatten extract_features "
        "extract_features_with_dataloader"
    ),
    "dinov2.run.submit": "get_args_parser get_shared_folder submit_jobs",
    "dinov2.run.train.train": "Trainer main",
    "dinov2.run.eval.knn": "Evaluator main",
    "dinov2.run.eval.linear": "Evaluator main",
    "dinov2.run.eval.log_regression": "Evaluator main",
    "dinov2.configs": "load_config load_and_merge_config dinov2_default_config",
    "dinov2.utils.config": "apply_scaling_rules_to_cfg write_config get_cfg_from_args default_setup setup",
    "dinov2.utils.utils": "load_pretrained_weights fix_random_seeds get_sha CosineScheduler has_batchnorms",
    "dinov2.utils.param_groups": "get_vit_lr_decay_rate get_params_groups_with_decay fuse_params_groups",
    "dinov2.utils.dtype": "as_torch_dtype",
    "dinov2.utils.cluster": (
        "ClusterType get_cluster_type get_checkpoint_path get_user_checkpoint_path get_slurm_partition "
        "get_slurm_executor_parameters"
    ),
    "dinov2.fsdp": (
        "get_fsdp_wrapper is_fsdp is_sharded_fsdp free_if_fsdp get_fsdp_modules reshard_fsdp_model rankstr "
        "FSDPCheckpointer ShardedGradScaler"
    ),
    "dinov2.distributed": (
        "is_enabled get_global_size get_global_rank get_local_rank get_local_size is_main_process enable"
    ),
    "dinov2.logging": "setup_logging MetricLogger SmoothedValue",
    "dinov2.logging.helpers": "MetricLogger SmoothedValue",
    "dinov2.hub.utils": "CenterPadding _make_dinov2_model_name _DINOV2_BASE_URL",
    "hubconf": "dependencies "
    + " ".join(f"dinov2_vit{size}14{end}" for size in "sblg" for end in ("", "_reg", "_lc", "_reg_lc")),
}

# Public in DINOv2 and absent here, each with its reason.
ABSENT = {
    "dinov2.eval.depth": "wraps mmcv-full 1.5.0, which no supported torch allows; only notebooks used it",
    "dinov2.eval.segmentation": "wraps mmcv-full 1.5.0 and mmsegmentation 0.27.0; only notebooks used it",
    "dinov2.eval.segmentation_m2f": "wraps mmcv-full 1.5.0 and mmsegmentation 0.27.0; only notebooks used it",
    "dinov2.hub.depthers": "heads for outdoor depth; no use on tissue",
    "dinov2.hub.dinotxt": "a text tower for everyday photographs; no use on tissue",
}

# What defaults in the signatures below stand for.
VALUES = {"nn": nn, "torch": torch, "math": math, "np": np}

SIGNATURES = {
    "dinov2.models:build_model": "args, only_teacher=False, img_size=224",
    "dinov2.models:build_model_from_cfg": "cfg, only_teacher=False",
    "dinov2.models.vision_transformer:DinoVisionTransformer": (
        "img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, "
        "qkv_bias=True, ffn_bias=True, proj_bias=True, drop_path_rate=0.0, drop_path_uniform=False, "
        "init_values=None, embed_layer=PatchEmbed, act_layer=nn.GELU, block_fn=NestedTensorBlock, "
        "ffn_layer='mlp', block_chunks=1, num_register_tokens=0, interpolate_antialias=False, "
        "interpolate_offset=0.1"
    ),
    "dinov2.models.vision_transformer:DinoVisionTransformer.prepare_tokens_with_masks": "self, x, masks=None",
    "dinov2.models.vision_transformer:DinoVisionTransformer.interpolate_pos_encoding": "self, x, w, h",
    "dinov2.models.vision_transformer:DinoVisionTransformer.forward_features": "self, x, masks=None",
    "dinov2.models.vision_transformer:DinoVisionTransformer.forward_features_list": (
        "self, x_list, masks_list"
    ),
    "dinov2.models.vision_transformer:DinoVisionTransformer.forward": (
        "self, *args, is_training=False, **kwargs"
    ),
    "dinov2.models.vision_transformer:DinoVisionTransformer.get_intermediate_layers": (
        "self, x, n=1, reshape=False, return_class_token=False, norm=True"
    ),
    "dinov2.models.vision_transformer:named_apply": (
        "fn, module, name='', depth_first=True, include_root=False"
    ),
    "dinov2.models.vision_transformer:init_weights_vit_timm": "module, name=''",
    **{
        f"dinov2.models.vision_transformer:{name}": "patch_size=16, num_register_tokens=0, **kwargs"
        for name in ("vit_small", "vit_base", "vit_large", "vit_giant2")
    },
    "dinov2.layers:Attention": (
        "dim, num_heads=8, qkv_bias=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0"
    ),
    "dinov2.layers:Attention.forward": "self, x, is_causal=False",
    "dinov2.layers:Attention.init_weights": "self, init_attn_std=None, init_proj_std=None, factor=1.0",
    "dinov2.layers:MemEffAttention": (
        "dim, num_heads=8, qkv_bias=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0"
    ),
    "dinov2.layers:MemEffAttention.forward": "self, x, attn_bias=None",
    **{
        f"dinov2.layers.block:{name}": (
            "dim, num_heads, mlp_ratio=4.0, qkv_bias=False, proj_bias=True, ffn_bias=True, drop=0.0, "
            "attn_drop=0.0, init_values=None, drop_path=0.0, act_layer=nn.GELU, norm_layer=nn.LayerNorm, "
            "attn_class=Attention, ffn_layer=Mlp"
        )
        for name in ("Block", "NestedTensorBlock")
    },
    "dinov2.layers:CausalAttentionBlock": (
        "dim, num_heads, ffn_ratio=4.0, ls_init_value=None, is_causal=True, act_layer=nn.GELU, "
        "norm_layer=nn.LayerNorm, dropout_prob=0.0"
    ),
    "dinov2.layers:CausalAttentionBlock.init_weights": (
        "self, init_attn_std=None, init_proj_std=None, init_fc_std=None, factor=1.0"
    ),
    "dinov2.layers.block:drop_add_residual_stochastic_depth": "x, residual_func, sample_drop_ratio=0.0",
    "dinov2.layers.block:get_branges_scales": "x, sample_drop_ratio=0.0",
    "dinov2.layers.block:add_residual": "x, brange, residual, residual_scale_factor, scaling_vector=None",
    "dinov2.layers.block:get_attn_bias_and_cat": "x_list, branges=None",
    "dinov2.layers.block:drop_add_residual_stochastic_depth_list": (
        "x_list, residual_func, sample_drop_ratio=0.0, scaling_vector=None"
    ),
    "dinov2.layers:DINOHead": (
        "in_dim, out_dim, use_bn=False, nlayers=3, hidden_dim=2048, bottleneck_dim=256, mlp_bias=True"
    ),
    "dinov2.layers.drop_path:DropPath": "drop_prob=None",
    "dinov2.layers.drop_path:drop_path": "x, drop_prob=0.0, training=False",
    "dinov2.layers:LayerScale": "dim, init_values=1e-5, inplace=False, device=None, dtype=None",
    "dinov2.layers:Mlp": (
        "in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0, bias=True"
    ),
    "dinov2.layers:PatchEmbed": (
        "img_size=224, patch_size=16, in_chans=3, embed_dim=768, norm_layer=None, flatten_embedding=True"
    ),
    **{
        f"dinov2.layers:{name}": (
            "in_features, hidden_features=None, out_features=None, act_layer=None, drop=0.0, bias=True"
        )
        for name in ("SwiGLUFFN", "SwiGLUFFNFused")
    },
    "dinov2.layers:SwiGLUFFNAligned": (
        "in_features, hidden_features=None, out_features=None, act_layer=None, drop=0.0, bias=True, "
        "align_to=8, device=None"
    ),
    "dinov2.loss:DINOLoss": "out_dim, student_temp=0.1, center_momentum=0.9",
    "dinov2.loss:DINOLoss.softmax_center_teacher": "self, _z, teacher_temp",
    "dinov2.loss:DINOLoss.sinkhorn_knopp_teacher": "self, _z, teacher_temp, n_iterations=3",
    "dinov2.loss:DINOLoss.forward": "self, student_output_list, teacher_out_softmaxed_centered_list",
    "dinov2.loss:DINOLoss.update_center": "self, _z",
    "dinov2.loss:iBOTPatchLoss": "patch_out_dim, student_temp=0.1, center_momentum=0.9",
    "dinov2.loss:iBOTPatchLoss.softmax_center_teacher": "self, _patches, teacher_temp",
    "dinov2.loss:iBOTPatchLoss.sinkhorn_knopp_teacher": (
        "self, _z, teacher_temp, n_masked_patches_tensor, n_iterations=3"
    ),
    "dinov2.loss:iBOTPatchLoss.forward": "self, _student, _teacher, _masks",
    "dinov2.loss:iBOTPatchLoss.update_center": "self, _patches",
    "dinov2.loss:iBOTPatchLoss.forward_masked": (
        "self, _student, _teacher, student_masks_flat, n_masked_patches=None, masks_weight=None"
    ),
    "dinov2.loss:KoLeoLoss": "",
    "dinov2.loss:KoLeoLoss.forward": "self, _x, eps=1e-8",
    "dinov2.data:make_dataset": "*, dataset_str, transform=None, target_transform=None",
    "dinov2.data:make_data_loader": (
        "*, dataset, batch_size, num_workers, shuffle=True, seed=0, sampler_type=SamplerType.INFINITE, "
        "sampler_size=-1, sampler_advance=0, drop_last=True, persistent_workers=False, collate_fn=None"
    ),
    "dinov2.data:collate_data_and_cast": (
        "samples_list, mask_ratio_tuple, mask_probability, dtype, n_tokens=None, mask_generator=None"
    ),
    "dinov2.data:MaskingGenerator": (
        "input_size, num_masking_patches=None, min_num_patches=4, max_num_patches=None, min_aspect=0.3, "
        "max_aspect=None"
    ),
    "dinov2.data:MaskingGenerator.__call__": "self, num_masking_patches=0",
    "dinov2.data:DataAugmentationDINO": (
        "global_crops_scale, local_crops_scale, local_crops_number, global_crops_size=224, "
        "local_crops_size=96"
    ),
    "dinov2.data:DataAugmentationDINO.__call__": "self, image",
    "dinov2.data:DatasetWithEnumeratedTargets": "dataset",
    "dinov2.data.samplers:EpochSampler": (
        "*, size, sample_count, shuffle=False, seed=0, start=None, step=None"
    ),
    "dinov2.data.samplers:InfiniteSampler": (
        "*, sample_count, shuffle=False, seed=0, start=None, step=None, advance=0"
    ),
    "dinov2.data.samplers:ShardedInfiniteSampler": (
        "*, sample_count, shuffle=False, seed=0, start=None, step=None, advance=0, "
        "use_new_shuffle_tensor_slice=False"
    ),
    "dinov2.data.transforms:GaussianBlur": "*, p=0.5, radius_min=0.1, radius_max=2.0",
    "dinov2.data.transforms:make_classification_train_transform": (
        "*, crop_size=224, interpolation=BICUBIC, hflip_prob=0.5, mean=MEAN, std=STD"
    ),
    "dinov2.data.transforms:make_classification_eval_transform": (
        "*, resize_size=256, interpolation=BICUBIC, crop_size=224, mean=MEAN, std=STD"
    ),
    "dinov2.data.datasets:ImageNet": (
        "*, split, root, extra, transforms=None, transform=None, target_transform=None"
    ),
    "dinov2.data.datasets:ImageNet22k": (
        "*, root, extra, transforms=None, transform=None, target_transform=None, mmap_cache_size=16"
    ),
    "dinov2.train.train:build_optimizer": "cfg, params_groups",
    "dinov2.train.train:build_schedulers": "cfg",
    "dinov2.train.train:apply_optim_scheduler": "optimizer, lr, wd, last_layer_lr",
    "dinov2.train.train:do_test": "cfg, model, iteration",
    "dinov2.train.train:do_train": "cfg, model, resume=False",
    "dinov2.train:main": "args",
    "dinov2.train:SSLMetaArch": "cfg",
    "dinov2.train:SSLMetaArch.forward_backward": "self, images, teacher_temp",
    "dinov2.train:SSLMetaArch.backprop_loss": "self, loss",
    "dinov2.train:SSLMetaArch.update_teacher": "self, m",
    "dinov2.train:SSLMetaArch.get_params_groups": "self",
    "dinov2.train:SSLMetaArch.get_maybe_fused_params_for_submodel": "self, m",
    "dinov2.train:SSLMetaArch.prepare_for_distributed_training": "self",
    "dinov2.train:SSLMetaArch.fsdp_synchronize_streams": "self",
    **{
        f"dinov2.eval.{name}:get_args_parser": "description=None, parents=None, add_help=True"
        for name in ("setup", "knn", "linear", "log_regression")
    },
    **{f"dinov2.eval.{name}:main": "args" for name in ("knn", "linear", "log_regression")},
    "dinov2.eval.setup:setup_and_build_model": "args",
    "dinov2.eval.setup:build_model_for_eval": "config, pretrained_weights",
    "dinov2.eval.utils:ModelWithNormalize": "model",
    "dinov2.eval.utils:ModelWithIntermediateLayers": "feature_model, n_last_blocks, autocast_ctx",
    "dinov2.eval.utils:evaluate": "model, data_loader, postprocessors, metrics, device, criterion=None",
    "dinov2.eval.utils:all_gather_and_flatten": "tensor",
    "dinov2.eval.utils:extract_features": "model, dataset, batch_size, num_workers, gather_on_cpu=False",
    "dinov2.eval.utils:extract_features_with_dataloader": (
        "model, data_loader, sample_count, gather_on_cpu=False"
    ),
    "dinov2.eval.metrics:build_metric": "metric_type, *, num_classes, ks=None",
    "dinov2.eval.metrics:build_topk_accuracy_metric": "average_type, num_classes, ks=(1, 5)",
    "dinov2.eval.metrics:build_topk_imagenet_real_accuracy_metric": "num_classes, ks=(1, 5)",
    "dinov2.eval.metrics:ImageNetReaLAccuracy": "num_classes, top_k=1",
    "dinov2.eval.knn:KnnModule": "train_features, train_labels, nb_knn, T, device, num_classes=1000",
    "dinov2.eval.knn:DictKeysModule": "keys",
    "dinov2.eval.knn:filter_train": "mapping, n_per_class, seed",
    "dinov2.eval.knn:create_class_indices_mapping": "labels",
    "dinov2.eval.knn:eval_knn_with_model": (
        "model, output_dir, train_dataset_str, val_dataset_str, nb_knn=(10, 20, 100, 200), temperature=0.07, "
        "autocast_dtype=torch.float, accuracy_averaging=MEAN_ACCURACY, transform=None, gather_on_cpu=False, "
        "batch_size=256, num_workers=5, n_per_class_list=[-1], n_tries=1"
    ),
    "dinov2.eval.linear:LinearClassifier": "out_dim, use_n_blocks, use_avgpool, num_classes=1000",
    "dinov2.eval.linear:LinearPostprocessor": "linear_classifier, class_mapping=None",
    "dinov2.eval.linear:AllClassifiers": "classifiers_dict",
    "dinov2.eval.linear:create_linear_input": "x_tokens_list, use_n_blocks, use_avgpool",
    "dinov2.eval.linear:scale_lr": "learning_rates, batch_size",
    "dinov2.run.submit:get_args_parser": "description=None, parents=None, add_help=True",
    "dinov2.run.submit:get_shared_folder": "",
    "dinov2.run.submit:submit_jobs": "task_class, args, name",
    "dinov2.run.train.train:Trainer": "args",
    **{f"dinov2.run.eval.{name}:Evaluator": "args" for name in ("knn", "linear", "log_regression")},
    "dinov2.configs:load_config": "name",
    "dinov2.configs:load_and_merge_config": "name",
    "dinov2.utils.config:apply_scaling_rules_to_cfg": "cfg",
    "dinov2.utils.config:write_config": "cfg, output_dir, name='config.yaml'",
    "dinov2.utils.config:get_cfg_from_args": "args",
    "dinov2.utils.config:default_setup": "args",
    "dinov2.utils.config:setup": "args",
    "dinov2.utils.utils:load_pretrained_weights": "model, pretrained_weights, checkpoint_key",
    "dinov2.utils.utils:fix_random_seeds": "seed=31",
    "dinov2.utils.utils:get_sha": "",
    "dinov2.utils.utils:CosineScheduler": (
        "base_value, final_value, total_iters, warmup_iters=0, start_warmup_value=0, freeze_iters=0"
    ),
    "dinov2.utils.utils:has_batchnorms": "model",
    "dinov2.utils.param_groups:get_vit_lr_decay_rate": (
        "name, lr_decay_rate=1.0, num_layers=12, force_is_backbone=False, chunked_blocks=False"
    ),
    "dinov2.utils.param_groups:get_params_groups_with_decay": (
        "model, lr_decay_rate=1.0, patch_embed_lr_mult=1.0"
    ),
    "dinov2.utils.param_groups:fuse_params_groups": (
        "all_params_groups, keys=('lr_multiplier', 'wd_multiplier', 'is_last_layer')"
    ),
    "dinov2.utils.dtype:as_torch_dtype": "dtype",
    "dinov2.utils.cluster:get_slurm_executor_parameters": (
        "nodes, num_gpus_per_node, cluster_type=None, **kwargs"
    ),
    "dinov2.fsdp:get_fsdp_wrapper": "model_cfg, modules_to_wrap=frozenset()",
    **{
        f"dinov2.fsdp:{name}": "x"
        for name in ("is_fsdp", "is_sharded_fsdp", "free_if_fsdp", "get_fsdp_modules", "reshard_fsdp_model")
    },
    "dinov2.fsdp:rankstr": "",
    "dinov2.fsdp:FSDPCheckpointer.save": "self, name, **kwargs",
    "dinov2.fsdp:FSDPCheckpointer.load": "self, path, checkpointables=None",
    "dinov2.distributed:enable": (
        "*, set_cuda_current_device=True, overwrite=False, allow_nccl_timeout=False"
    ),
    "dinov2.logging:setup_logging": "output=None, *, name=None, level=10, capture_warnings=True",
    "dinov2.logging:MetricLogger": "delimiter='\\t', output_file=None",
    "dinov2.logging:MetricLogger.log_every": (
        "self, iterable, print_freq, header=None, n_iterations=None, start_iteration=0"
    ),
    "dinov2.logging:MetricLogger.dump_in_output_file": "self, iteration, iter_time, data_time",
    "dinov2.logging:MetricLogger.update": "self, **kwargs",
    "dinov2.logging:MetricLogger.add_meter": "self, name, meter",
    "dinov2.logging:SmoothedValue": "window_size=20, fmt=None",
    "dinov2.logging:SmoothedValue.update": "self, value, num=1",
    "dinov2.hub.utils:CenterPadding": "multiple",
    **{
        f"hubconf:dinov2_vit{size}14{end}": "*, pretrained=True, weights='LVD142M', **kwargs"
        for size in "sblg"
        for end in ("", "_reg")
    },
    **{
        f"hubconf:dinov2_vit{size}14{end}": "*, layers=4, pretrained=True, weights='IMAGENET1K', **kwargs"
        for size in "sblg"
        for end in ("_lc", "_reg_lc")
    },
}


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_can_be_imported(module):
    imported = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(imported, name)]
    assert missing == []


@pytest.mark.parametrize("module", NAMES)
def test_every_public_function_and_class_says_what_it_is_for(module):
    members = {name: getattr(importlib.import_module(module), name) for name in NAMES[module].split()}
    undocumented = [
        name
        for name, member in members.items()
        if (inspect.isclass(member) and not vars(member).get("__doc__"))
        or (inspect.isfunction(member) and not member.__doc__)
    ]
    assert undocumented == []


@pytest.mark.parametrize("module", ABSENT)
def test_what_is_absent_is_absent_as_stated(module):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module)


def contract(text):
    from torchvision.transforms import InterpolationMode

    from dinov2.data import SamplerType
    from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from dinov2.eval.metrics import AccuracyAveraging
    from dinov2.layers import Attention, Mlp, NestedTensorBlock, PatchEmbed

    named = [Attention, Mlp, NestedTensorBlock, PatchEmbed, SamplerType]
    values = VALUES | {value.__name__: value for value in named}
    values |= {"BICUBIC": InterpolationMode.BICUBIC, "MEAN_ACCURACY": AccuracyAveraging.MEAN_ACCURACY}
    values |= {"MEAN": IMAGENET_DEFAULT_MEAN, "STD": IMAGENET_DEFAULT_STD}
    return inspect.signature(eval(f"lambda {text}: None", values)).parameters


def comparable(default):
    """Members of an enumeration stand for their values; sequences and sets are equal by content."""
    if isinstance(default, enum.Enum):
        return default.value
    if isinstance(default, (list, tuple, set, frozenset)):
        return sorted(default, key=str)
    return default


POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def positional(parameters):
    return [parameter for parameter in parameters if parameter.kind is POSITIONAL]


@pytest.mark.parametrize("path", SIGNATURES)
def test_calls_are_accepted_as_by_dinov2(path):
    module, _, name = path.partition(":")
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    ours, theirs = list(inspect.signature(target).parameters.values()), contract(SIGNATURES[path]).values()

    assert len(positional(ours)) == len(positional(theirs)), [str(parameter) for parameter in ours]
    for mine, expected in zip(positional(ours), positional(theirs), strict=True):
        assert mine.name == expected.name or expected.name.startswith("_")
        assert comparable(mine.default) == comparable(expected.default), mine.name

    keywords = {
        parameter.name: parameter for parameter in ours if parameter.kind not in (POSITIONAL, *VARIADIC)
    }
    for expected in theirs:
        if expected.kind in VARIADIC:
            assert expected.kind in {parameter.kind for parameter in ours}
        elif expected.kind is not POSITIONAL:
            assert comparable(keywords.pop(expected.name).default) == comparable(expected.default)
    assert all(added.default is not inspect.Parameter.empty for added in keywords.values())


def test_enumerations_have_the_members_of_dinov2():
    from dinov2.data import SamplerType
    from dinov2.eval.metrics import AccuracyAveraging, MetricType

    assert {member.name: member.value for member in SamplerType} == {
        "DISTRIBUTED": 0,
        "EPOCH": 1,
        "INFINITE": 2,
        "SHARDED_INFINITE": 3,
        "SHARDED_INFINITE_NEW": 4,
    }
    assert [member.value for member in MetricType] == [
        "mean_accuracy",
        "mean_per_class_accuracy",
        "per_class_accuracy",
        "imagenet_real_accuracy",
    ]
    assert [(member.name, member.value) for member in AccuracyAveraging] == [
        ("MEAN_ACCURACY", "micro"),
        ("MEAN_PER_CLASS_ACCURACY", "macro"),
        ("PER_CLASS_ACCURACY", "none"),
    ]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=REPO, capture_output=True, text=True
    )


def test_importing_everything_is_silent_and_needs_no_optional_package():
    """No warning, no output, no process group, no network; and not one of the optional packages."""
    optional = ["xformers", "sklearn", "openslide", "onnx", "timm", "transformers", "wandb", "fvcore", "mmcv"]
    result = run_python(
        f"""
import importlib, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("the network was asked for")
socket.socket.connect = refuse
for module in {list(NAMES)!r}:
    importlib.import_module(module)
print(sorted(set({optional!r}) & set(sys.modules)))
"""
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_a_config_is_checked_without_loading_torch():
    result = run_python(
        """
import sys
import dinov2.cli, dinov2.configs, dinov2.utils.config, dinov2.train
dinov2.train.get_args_parser()
print("torch" in sys.modules)
"""
    )
    assert (result.stdout, result.stderr) == ("False\n", "")


@pytest.mark.parametrize("module", ["dinov2.cli", "dinov2.data.slides.tile", "dinov2.data.index"])
def test_tools_for_slides_and_tiles_start_without_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'torchvision'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


@pytest.mark.parametrize("package", ["dinov2.data", "dinov2.data.datasets"])
def test_names_that_load_late_are_those_of_the_package(package):
    module = importlib.import_module(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Missing'"):
        _ = module.Missing


def test_modules_behind_late_names_are_attributes():
    code = "import dinov2.data as d; d.datasets.pathology.Pathology, d.samplers, d.loaders.make_dataset"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
