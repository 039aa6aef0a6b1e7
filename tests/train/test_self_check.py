"""The self-check before the first step: a healthy start passes, and every fault by itself is named."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from dinov2.configs import resolve_config
from dinov2.models.report import LoadReport
from dinov2.train import SSLMetaArch
from dinov2.train.initial_weights import InitialWeights, Part, fingerprint
from dinov2.train.input import build_dataset
from dinov2.train.optimizer import build_optimizer
from dinov2.train.self_check import Line, SelfCheck, SelfCheckError, enforce, run_self_check
from dinov2.train.self_check.images import measure_constants
from dinov2.train.self_check.learning import peak_rates
from dinov2.train.self_check.losses import fresh_range
from dinov2.train.self_check.probe import find_start
from dinov2.train.self_check.record import merge
from dinov2.utils.config import apply_scaling_rules_to_cfg
from dinov2.utils.seeding import seed_everything
from tests.checkpoints import read_state
from tests.conftest import REPO

HOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


class Run:
    """A run up to its first step, to be spoiled before it is checked."""

    def __init__(self, cfg, output_dir):
        cfg.train.output_dir = str(output_dir)
        apply_scaling_rules_to_cfg(cfg)
        seed_everything(0)
        self.cfg = cfg
        self.model = SSLMetaArch(cfg)
        self.model.prepare_for_distributed_training()
        self.model.train()
        self.initial = self.model.initial_weights
        self.dataset = build_dataset(cfg)
        self.optimizer = build_optimizer(cfg, self.model.get_params_groups())

    @property
    def student(self):
        return self.model.student["backbone"]

    def check(self, start_iteration=0, *, continues=False) -> SelfCheck:
        return run_self_check(
            self.cfg,
            self.model,
            self.optimizer,
            self.dataset,
            initial=self.initial,
            start_iteration=start_iteration,
            continues=continues,
        )

    def claim_loaded(self, name, **facts):
        """Say that a module was loaded from a file as it is now."""
        network, module = name.split(".")
        report = LoadReport("file.pth", loaded=[], **facts)
        part = Part(report, fingerprint(getattr(self.model, network)[module]))
        self.initial = InitialWeights({**self.initial.parts, name: part})


@pytest.fixture
def start(tiny, tmp_path):
    return lambda *overrides: Run(tiny.resolve(*overrides), tmp_path / "run")


def verdict(check, name) -> tuple[str, str]:
    (line,) = [line for line in check.lines if line.name == name]
    return line.status, line.text


def content_of(check, name):
    return next(line.values for line in check.lines if line.name == name)


def names(lines) -> set[str]:
    return {line.name for line in lines}


HEALTHY = {
    "default": [],
    "sinkhorn": ["train.centering=sinkhorn_knopp"],
    "separate": ["ibot.separate_head=true", "ibot.head_n_prototypes=24"],
    "chunks": ["student.block_chunks=2"],
    "registers": ["student.num_register_tokens=3"],
    "no-local-crops": ["crops.local_crops_number=0"],
    "no-ibot": ["ibot.loss_weight=0"],
    "no-dino": ["dino.loss_weight=0"],
    "rising-drop-path": ["student.drop_path_uniform=false"],
    "no-drop-path": ["student.drop_path_rate=0"],
    "no-temperature-warm-up": ["teacher.warmup_teacher_temp=0.2", "teacher.warmup_teacher_temp_epochs=0"],
    "one-block": ["student.depth=1", "student.drop_path_uniform=false"],
    "tiny-lr": ["optim.base_lr=1e-9"],
    "no-decay": ["optim.layerwise_decay=1"],
    "small-layerscale": ["student.layerscale=1e-5"],
    "one-image": ["train.batch_size_per_gpu=1"],
    "bf16": [
        f"compute_precision.{n}.backbone.mixed_precision.param_dtype=bf16" for n in ("student", "teacher")
    ],
    "own-lr": ["optim.scaling_rule=none", "optim.lr=1e-3"],
    "other-constants": [f"crops.mean={list(HOPTIMUS[0])}", f"crops.std={list(HOPTIMUS[1])}"],
}


@pytest.mark.parametrize("overrides", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_start_has_nothing_wrong(start, overrides):
    check = start(*overrides).check()
    assert check.wrong == []
    assert len(check.lines) > 20


RECIPES = sorted(path.stem for path in (REPO / "dinov2" / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_starts(recipe, tile_folder, tmp_path):
    """At a reduced size, which the checks do not look at."""
    sizes = {
        "student.embed_dim": 48,
        "student.depth": 4,
        "student.num_heads": 3,
        "train.freeze_blocks": 2,
        "train.batch_size_per_gpu": 2,
    }
    heads = {"n_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 256}
    sizes |= {f"{part}.head_{key}": value for part in ("dino", "ibot") for key, value in heads.items()}
    file = REPO / "dinov2" / "configs" / "train" / f"{recipe}.yaml"
    if resolve_config(str(file), []).train.freeze_blocks:
        sizes["train.freeze_blocks"] = 2
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    cfg = resolve_config(str(file), [*overrides, f"train.dataset_path=ImageFolder:root={tile_folder}"])
    check = Run(cfg, tmp_path / "run").check()
    assert check.wrong == [], check.table()


def test_a_start_from_the_real_vit_s_has_nothing_wrong(real_vits14, tile_folder, tmp_path):
    overrides = [f"student.pretrained_weights={real_vits14}", "student.drop_path_rate=0.1"]
    overrides += [f"train.dataset_path=ImageFolder:root={tile_folder}", "dino.head_n_prototypes=4096"]
    file = REPO / "dinov2" / "configs" / "train" / "vits14-quickstart.yaml"
    run = Run(resolve_config(str(file), overrides), tmp_path / "run")
    check = run.check()
    assert check.wrong == [], check.table()
    assert verdict(check, "weights: student.backbone")[1].startswith("100.00% loaded")
    assert verdict(check, "unchanged: student.backbone") == ("ok", "as it was loaded")
    assert "37x37 -> 8x8" in verdict(check, "resampled: pos_embed")[1]
    assert content_of(check, "first DINO loss")["ln_prototypes"] == pytest.approx(math.log(4096))
    run.student.blocks[11].mlp.fc2.bias.data[7] += 1e-3
    assert names(run.check().wrong) == {"unchanged: student.backbone", "teacher: backbone"}


def test_the_table_and_the_file_say_what_was_found(start, tmp_path, caplog):
    run = start()
    with caplog.at_level("INFO", logger="dinov2"):
        check = run.check()
    assert caplog.text.count("self-check before the first step") == 1
    content = json.loads((tmp_path / "run" / "self_check.json").read_text())
    assert [line["name"] for line in content["lines"]] == [line.name for line in check.lines]
    assert content["wrong"] == 0 and content["ok"] + content["note"] == len(check.lines)
    by_block = next(line for line in content["lines"] if line["name"] == "learning rate by block")
    table = by_block["values"]["table"]
    peak = 0.004 * math.sqrt(4 / 1024)
    assert table["block 0"]["lr"] == [pytest.approx(peak * 0.9**2)]
    assert table["block 1"]["lr"] == [pytest.approx(peak * 0.9)]
    assert table["tokens"]["lr"] == [pytest.approx(peak * 0.9**3)]
    assert table["patch embedding"]["lr"] == [pytest.approx(peak * 0.9**3 * 0.2)]
    assert table["dino_head last layer"]["lr"] == [pytest.approx(peak)]
    assert table["block 0"]["weight_decay"] == [0.0, pytest.approx(0.04)]
    assert verdict(check, "masks")[1].startswith(
        f"{int(content_of(check, 'masks')['masked'])} patches masked"
    )


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_run_is_the_same_with_and_without_the_check(tiny, tmp_path, centering):
    results = []
    for self_check in ("stop", "off"):
        out = tmp_path / self_check
        tiny.start(out, f"train.centering={centering}", f"train.self_check={self_check}")
        assert (out / "self_check.json").exists() == (self_check == "stop")
        rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
        timed = {"iter_time", "data_time", "images_per_second"}
        losses = [{key: value for key, value in row.items() if key not in timed} for row in rows]
        results.append((losses, read_state(out / "model_final")["model"]))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_it_leaves_no_trace(start):
    run = start()
    run.model.dino_loss.update_center(torch.ones(4, 32))  # pending, as in the middle of a run
    before, pending = copy.deepcopy(run.model.state_dict()), run.model.dino_loss.async_batch_center.clone()
    modes = [module.training for module in run.model.modules()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    seed_everything(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    seed_everything(3)
    run.check()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert torch.equal(run.model.dino_loss.async_batch_center, pending)
    assert not run.model.dino_loss.updated and run.model.ibot_patch_loss.updated
    assert modes == [module.training for module in run.model.modules()]
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert run.optimizer.state == {}
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in run.optimizer.param_groups]


def lose_decay(run):
    for group in run.optimizer.param_groups:
        group["lr_multiplier"] = 1.0


def reverse_decay(run):
    backbone = {id(parameter) for parameter in run.student.blocks.parameters()}
    for group in run.optimizer.param_groups:
        if any(id(parameter) in backbone for parameter in group["params"]):
            group["lr_multiplier"] = 0.9 * 0.81 / group["lr_multiplier"]


def drop_parameters(run):
    run.optimizer.param_groups[0]["params"].pop()


def zero_rates(run):
    for group in run.optimizer.param_groups:
        group["lr_multiplier"] = 0.0


def freeze_block(run):
    run.student.blocks[0].requires_grad_(False)
    run.optimizer = build_optimizer(run.cfg, run.model.get_params_groups())


def freeze_head(run):
    run.cfg.train.freeze_backbone_iterations = 3  # which says nothing about heads
    run.model.student["dino_head"].requires_grad_(False)
    run.optimizer = build_optimizer(run.cfg, run.model.get_params_groups())


def other_reference(run):
    run.cfg.optim.lr = run.cfg.optim.base_lr * math.sqrt(run.cfg.train.batch_size_per_gpu / 768)


def no_weight_decay(run):
    for group in run.optimizer.param_groups:
        group["wd_multiplier"] = 0.0


def dead_drop_path(run):
    for block in run.student.blocks:
        block.sample_drop_ratio = 0.0


def other_drop_path(run):
    run.student.blocks[0].sample_drop_ratio = 0.1


def ignore_masks(run):
    forward = run.student.forward

    def without(x, masks=None, **options):
        return forward(x, [None] * len(x) if isinstance(x, list) else None, **options)

    run.student.forward = without


def ignore_most_masks(run):
    prepare = run.student.prepare_tokens_with_masks

    def partly(x, masks=None):
        if masks is not None:
            masks = masks.clone()
            masks.flatten()[masks.flatten().nonzero()[1:]] = False
        return prepare(x, masks)

    run.student.prepare_tokens_with_masks = partly


def no_masks(run):
    run.cfg.ibot.mask_sample_probability = 0.0


def registers_as_patches(run):
    run.student.num_register_tokens = 0


def norm_twice(run):
    outputs = run.student._outputs
    run.student._outputs = lambda norm, before, masks: outputs(norm, norm, masks)


def leak_between_crops(run):
    forward = run.student.forward_features_list

    def mixed(x_list, masks_list):
        outputs = forward(x_list, masks_list)
        outputs[0]["x_norm_clstoken"] = outputs[0]["x_norm_clstoken"] + outputs[-1]["x_norm_clstoken"].sum(0)
        return outputs

    run.student.forward_features_list = mixed


def overwrite_teacher_head(run):
    for network, seed in (("student", 1), ("teacher", 2)):
        seed_everything(seed)
        for parameter in getattr(run.model, network)["dino_head"].parameters():
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        run.claim_loaded(f"{network}.dino_head")
    run.model.teacher["dino_head"].load_state_dict(run.model.student["dino_head"].state_dict())


def strange_teacher(run):
    run.model.teacher["backbone"].cls_token.data.add_(1.0)


def training_teacher(run):
    run.model.teacher["backbone"].blocks[1].train()


def learning_teacher(run):
    run.model.teacher["backbone"].norm.requires_grad_(True)


def changed_student(run):
    run.claim_loaded("student.backbone")
    for network in (run.model.student, run.model.teacher):
        network["backbone"].cls_token.data.add_(1.0)


def half_loaded(run):
    run.claim_loaded(
        "student.backbone",
        share=0.5,
        missing=dict.fromkeys(["mask_token", "blocks.1.attn.qkv.weight"], "zeros"),
    )


def nothing_loaded(run):
    run.cfg.student.pretrained_weights = "uni.bin"


def fresh_head(run):
    run.cfg.head.head_path = "eval/training_9"


def other_source(run):
    run.claim_loaded("student.backbone", normalisation=HOPTIMUS, normalisation_origin="stated")


def other_transform(run):
    run.dataset = dataset_with(run, mean=list(HOPTIMUS[0]), std=list(HOPTIMUS[1]))


def dataset_with(run, **crops):
    cfg = run.cfg.copy()
    for key, value in crops.items():
        cfg.crops[key] = value
    return build_dataset(cfg)


def other_crop_size(run):
    run.dataset = dataset_with(run, local_crops_size=24)


def indivisible_crops(run):
    run.cfg.crops.local_crops_size = 20
    run.dataset = build_dataset(run.cfg)


def other_patch(run):
    run.cfg.student.patch_size = 16


def one_picture(run):
    data = run.dataset.get_image_data(0)
    run.dataset.get_image_data = lambda index: data


def broken_head(run):
    for network in (run.model.student, run.model.teacher):
        network["dino_head"].mlp[0].bias.data.fill_(float("nan"))


def loud_head(run):
    for network in (run.model.student, run.model.teacher):
        network["dino_head"].last_layer.weight_g.data.fill_(100.0)


def flat_teacher(run):
    run.cfg.teacher.teacher_temp = 0.4


def other_bias(run):
    run.cfg.student.qkv_bias = False


FAULTS = {
    lose_decay: ("learning rate by block", "layerwise_decay 0.9 is lost"),
    reverse_decay: ("learning rate by block", "block 0 0.000225 instead of 0.0002025"),
    drop_parameters: (
        "optimizer: parameters",
        "1 parameters require a gradient but are not in the optimizer",
    ),
    zero_rates: ("learning rate", "zero for every parameter"),
    freeze_block: ("optimizer: frozen", "no key says so"),
    freeze_head: ("optimizer: frozen", "dino_head.mlp"),
    other_reference: ("learning rate", "sqrt_wrt_768"),
    no_weight_decay: ("weight decay", "0 of 43"),
    dead_drop_path: ("drop path", "identical although student.drop_path_rate is 0.2"),
    other_drop_path: ("drop path", "0.1 to 0.2 instead of 0.2 to 0.2"),
    ignore_masks: ("masks", "ignores the masks"),
    ignore_most_masks: ("masks", "leave the student's tokens as they are"),
    no_masks: ("masks", "no patch of the probe batch is masked"),
    norm_twice: ("tokens: before the norm", "normalised tokens"),
    leak_between_crops: ("crops in one call", "differ"),
    overwrite_teacher_head: ("teacher: dino_head", "the student's copy has overwritten it"),
    strange_teacher: ("teacher: backbone", "differs from the student's"),
    training_teacher: ("teacher: mode", "training mode"),
    learning_teacher: ("teacher: gradients", "norm"),
    changed_student: ("unchanged: student.backbone", "changed since"),
    half_loaded: ("weights: student.backbone", "only 50.00%"),
    nothing_loaded: ("weights: source", "uni.bin"),
    fresh_head: ("head: dino_head", "although head.head_path is eval/training_9"),
    other_source: ("normalisation: source", "0.707 0.579 0.704"),
    other_transform: ("normalisation: crops", "0.707 0.579 0.704"),
    other_crop_size: ("local crops", "24 x 24 px instead of crops.local_crops_size 16"),
    indivisible_crops: ("local crops", "no multiple of the patch size 8"),
    other_patch: ("patch size", "patches of 8 px"),
    one_picture: ("duplicate tiles", "all the same picture"),
    broken_head: ("first loss", "not finite: dino"),
    loud_head: ("first DINO loss", "a fresh head starts within"),
    flat_teacher: ("temperatures", "flatter"),
    other_bias: ("architecture", "qkv_bias is false and the model has true"),
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_a_fault_is_named(start, spoil):
    name, words = FAULTS[spoil]
    run = start()
    spoil(run)
    check = run.check()
    status, text = verdict(check, name)
    assert status == "wrong", check.table()
    assert words in text


def test_registers_that_count_as_patches(start):
    run = start("student.num_register_tokens=4")
    registers_as_patches(run)
    check = run.check()
    assert verdict(check, "tokens: patches") == (
        "wrong",
        "20 patch tokens instead of 16: registers or other prefix tokens are counted as patches",
    )
    assert verdict(check, "tokens: registers")[0] == "wrong"


def test_what_is_unusual_but_possible_is_a_note(start):
    run = start("teacher.teacher_temp=0.1", "dino.koleo_loss_weight=0", "head.on_missing=reinit")
    run.cfg.head.head_path = "eval/training_9"
    run.claim_loaded(
        "student.backbone", missing={"mask_token": "zeros"}, share=0.99, resampled={"pos_embed": "37 -> 4"}
    )
    run.claim_loaded("student.dino_head")
    run.claim_loaded("teacher.dino_head")
    run.initial.parts.pop("student.dino_head")
    twice = run.dataset.get_image_data
    run.dataset.get_image_data = lambda index: twice(index // 2 * 2)
    run.cfg.train.batch_size_per_gpu = 8
    run.cfg.optim.lr = run.cfg.optim.base_lr * math.sqrt(8 / 1024)
    check = run.check()
    assert check.wrong == []
    notes = {line.name: line.text for line in check.of("note")}
    assert "no sharper than the student" in notes["temperatures"]
    assert notes["loss terms"] == "off: KoLeo (dino.koleo_loss_weight)"
    assert "random weights although head.head_path" in notes["head: dino_head"]
    assert notes["resampled: pos_embed"] == "from file.pth: 37 -> 4"
    assert "does not state its constants" in notes["normalisation: source"]
    assert "equal another one" in notes["duplicate tiles"]
    assert "mask_token not in the file" in verdict(check, "weights: student.backbone")[1]


@pytest.mark.parametrize(("origin", "status"), [("stated", "wrong"), ("sizes", "note")])
def test_constants_that_only_the_sizes_suggest_stop_no_run(start, origin, status):
    run = start()
    run.claim_loaded("student.backbone", normalisation=HOPTIMUS, normalisation_origin=origin)
    found, text = verdict(run.check(), "normalisation: source")
    assert found == status and "0.707 0.579 0.704" in text
    assert ("has the sizes of" in text) == (origin == "sizes")


def test_a_dataset_of_another_kind_is_compared_by_its_pictures(start, tmp_path):
    class Plain(torch.utils.data.Dataset):
        def __init__(self, inner, picture):
            self.inner, self.picture = inner, picture

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            return self.inner[self.picture(index)]

    run = start()
    inner = run.dataset
    run.dataset = Plain(inner, lambda index: index)
    assert verdict(run.check(), "duplicate tiles")[0] == "ok"
    assert "not measured" in verdict(run.check(), "normalisation: crops")[1]
    run.dataset = Plain(inner, lambda index: 5)
    assert verdict(run.check(), "duplicate tiles")[0] == "wrong"


def test_a_resumed_run_raises_no_false_alarm(start):
    run = start()
    run.cfg.head.head_path = "eval/training_9"
    run.cfg.student.pretrained_weights = "uni.bin"
    run.claim_loaded("student.backbone")
    run.claim_loaded("teacher.dino_head")
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert run.check(start_iteration=2, continues=True).wrong == []
    changed = {"unchanged: student.backbone", "teacher: dino_head"}
    assert changed <= names(run.check(start_iteration=0).wrong)
    run.cfg.optim.start_iter = 2  # where the checkpoint happens to stand, too
    assert run.check(start_iteration=2, continues=True).wrong == []
    assert changed <= names(run.check(start_iteration=2).wrong)
    run.cfg.MODEL.WEIGHTS, run.cfg.optim.start_iter = "model_final", 0
    check = run.check(start_iteration=0)
    assert check.wrong == []
    assert "model_final" in verdict(check, "weights")[1]


def test_resuming_where_the_schedules_began_says_so(tiny, tmp_path):
    """A whole run: its checkpoint stands at iteration 3, at which it was also told to begin."""
    out = tmp_path / "run"
    tiny.start(out, "optim.max_iterations=3")
    export = f"head.head_path={out / 'eval' / 'training_2'}"
    tiny.start(out, export, "optim.start_iter=3", options=("--resume-anyway",))
    lines = json.loads((out / "self_check.json").read_text())["lines"]
    assert [line["text"] for line in lines if line["name"] == "weights"] == [
        "those of a checkpoint of this run, at iteration 3"
    ]


@pytest.mark.parametrize("on_missing", ["stop", "reinit"])
def test_a_run_that_goes_on_from_an_earlier_one(tiny, tmp_path, on_missing):
    """Real files: backbones and heads of an export; a head that it lacks is reported."""
    separate = on_missing == "reinit"
    tiny.start(tmp_path / "first", "optim.max_iterations=3")
    exports = tmp_path / "first" / "eval" / "training_2"
    cfg = tiny.resolve(
        *(f"head.head_path={exports}", f"head.on_missing={on_missing}", f"ibot.separate_head={separate}"),
        f"train.centering={'sinkhorn_knopp' if separate else 'centering'}",
    )
    cfg.optim.start_iter = 3
    run = Run(cfg, tmp_path / "run")
    check = run.check(start_iteration=3)
    assert check.wrong == [], check.table()
    loaded = ("unchanged: student.backbone", "unchanged: student.dino_head", "head: dino_head")
    assert {verdict(check, name)[0] for name in loaded} == {"ok"}
    for part in ("backbone", "dino_head"):
        assert "as it was loaded" in verdict(check, f"teacher: {part}")[1]
        assert any(
            not torch.equal(one, other)
            for one, other in zip(
                run.model.student[part].parameters(), run.model.teacher[part].parameters(), strict=True
            )
        )
    if separate:
        assert verdict(check, "head: ibot_head")[0] == "note"
    for name in ("backbone", "dino_head"):
        run.model.teacher[name].load_state_dict(run.model.student[name].state_dict())
    overwritten = {"teacher: backbone", "teacher: dino_head"}
    assert names(run.check(start_iteration=3).wrong) == overwritten


def test_what_the_config_freezes_is_no_alarm(start):
    run = start()
    for name, parameter in run.student.named_parameters():
        parameter.requires_grad_(not name.startswith(("blocks.0", "patch_embed", "pos_embed", "cls_token")))
    run.optimizer = build_optimizer(run.cfg, run.model.get_params_groups())
    assert verdict(run.check(), "optimizer: frozen")[0] == "wrong"
    for key, value in (("train.freeze_blocks", 1), ("train.freeze_backbone_iterations", 5)):
        cfg = run.cfg.copy()
        section, name = key.split(".")
        cfg[section][name] = value
        whole, run.cfg = run.cfg, cfg
        assert run.check().wrong == []
        assert verdict(run.check(), "optimizer: frozen")[0] == "note"
        run.cfg = whole
    run.cfg.train.freeze_blocks = 2
    assert "of those train (backbone.blocks.1" in verdict(run.check(), "optimizer: frozen")[1]


def test_low_rank_updates_are_no_alarm(start):
    pytest.importorskip("peft")
    run = start("student.lora_rank=2")
    run.claim_loaded("student.backbone")
    check = run.check()
    assert check.wrong == []
    assert verdict(check, "teacher: backbone")[0] == "ok"
    assert verdict(check, "optimizer: frozen")[0] == "note"
    assert verdict(check, "unchanged: student.backbone")[0] == "note"


def test_stop_warn_and_off(tiny, tmp_path, caplog, monkeypatch):
    sharp = "teacher.teacher_temp=0.4"
    with pytest.raises(SelfCheckError, match=r"temperatures: .*flatter.*train\.self_check=warn") as caught:
        tiny.start(tmp_path / "stop", sharp, "optim.max_iterations=3")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "stop" / "training_metrics.json").exists()
    tiny.start(tmp_path / "warn", sharp, "optim.max_iterations=3", "train.self_check=warn")
    log = (tmp_path / "warn" / "logs" / "log.txt").read_text()
    assert "self-check: temperatures: " in log and (tmp_path / "warn" / "self_check.json").exists()
    tiny.start(tmp_path / "off", sharp, "optim.max_iterations=3", "train.self_check=off")
    assert "self-check" not in (tmp_path / "off" / "logs" / "log.txt").read_text()
    assert not (tmp_path / "off" / "self_check.json").exists()


def test_the_worst_line_of_all_processes_counts():
    ours = [Line("masks", "ok", "fine"), Line("loss", "note", "odd"), Line("crops", "ok", "fine")]
    theirs = [
        Line("masks", "wrong", "none"),
        Line("loss", "note", "odd too"),
        Line("extra", "ok", "only here"),
    ]
    check = merge([ours, theirs])
    assert [(line.name, line.status, line.text) for line in check.lines] == [
        ("masks", "wrong", "process 1: none"),
        ("loss", "note", "odd"),
        ("crops", "ok", "fine"),
        ("extra", "ok", "process 1: only here"),
    ]
    enforce(SelfCheck([]), "stop")
    with pytest.raises(SelfCheckError, match="process 1: none"):
        enforce(check, "stop")


def test_numbers_that_json_lacks_are_written_as_words():
    check = SelfCheck([Line("loss", "wrong", "not finite", {"loss": float("nan"), "rates": (1.0, math.inf)})])
    assert json.loads(check.to_json())["lines"][0]["values"] == {"loss": "nan", "rates": [1.0, "inf"]}


def test_a_fingerprint_sees_every_bit_and_nothing_else():
    seed_everything(0)
    module = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    same = copy.deepcopy(module)
    assert fingerprint(module) == fingerprint(same)
    with torch.no_grad():
        same[0].weight[2, 1] = torch.nextafter(same[0].weight[2, 1], torch.tensor(9.0))
    assert fingerprint(module) != fingerprint(same)
    swapped = copy.deepcopy(module)
    with torch.no_grad():
        swapped[0].weight.copy_(module[0].weight[[1, 0, 2]])
    assert fingerprint(module) != fingerprint(swapped)
    assert fingerprint(module) != fingerprint(copy.deepcopy(module).half())


@pytest.mark.parametrize(
    "constants", [HOPTIMUS, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))], ids=["hoptimus", "half"]
)
def test_constants_are_measured_on_any_transform(start, constants):
    run = start()
    transform = dataset_with(run, mean=list(constants[0]), std=list(constants[1])).transform
    for got, expected in zip(measure_constants(transform, constants), constants, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert measure_constants(lambda image: None, constants) is None


def test_rates_agree_with_the_optimizer_itself(start):
    run = start("student.block_chunks=2", "optim.layerwise_decay=0.5")

    probed = find_start(run.cfg, run.model, run.optimizer, run.dataset, run.initial, 0, continues=False)
    rates = {rate.name: rate.lr for rate in peak_rates(probed)}
    assert rates["backbone.blocks.1.1.norm1.weight"] == pytest.approx(run.cfg.optim.lr * 0.5)
    assert rates["backbone.blocks.0.0.norm1.weight"] == pytest.approx(run.cfg.optim.lr * 0.25)
    assert len(rates) == sum(len(g["params"]) for g in run.optimizer.param_groups)


@pytest.mark.parametrize("bottleneck", [16, 64, 256])
@pytest.mark.parametrize("prototypes", [256, 16384])
def test_the_range_of_a_fresh_head_holds_for_simulated_ones(prototypes, bottleneck):
    """Targets from another network's logits, from the same, and from the same without temperature."""
    generator = torch.Generator().manual_seed(prototypes + bottleneck)
    directions = nn.functional.normalize(torch.randn(prototypes, bottleneck, generator=generator), dim=1)
    rows = nn.functional.normalize(torch.randn(2, 32, bottleneck, generator=generator), dim=2)
    logits = rows @ directions.T
    low, high = fresh_range(prototypes, bottleneck, 0.1, 0.04)
    log_probs = torch.log_softmax(logits[0] / 0.1, dim=1)
    for teacher in (logits[1], logits[0], torch.zeros_like(logits[0])):
        entropy = -(torch.softmax(teacher / 0.04, dim=1) * log_probs).sum(dim=1).mean().item()
        assert low < entropy < high
