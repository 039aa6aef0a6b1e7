"""What the command says of a weight file, and that the config lines it suggests start a run from it."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dinov2.configs import resolve_config
from dinov2.errors import WeightsError
from dinov2.layers import DINOHead
from dinov2.models.inspect import inspect_weights, main
from dinov2.models.integrity import sha256_of
from dinov2.train import SSLMetaArch
from tests.conftest import REPO
from tests.models.vits import named, tiny, written

HEAD = {"hidden_dim": 20, "bottleneck_dim": 12, "nlayers": 2}


def test_the_real_weights(real_vits14):
    facts = inspect_weights(str(real_vits14)).facts
    assert facts["format"] == "safetensors, 84.1 MiB of tensors"
    assert facts["sha256"] == sha256_of(real_vits14)
    assert facts["numbers"] == "22,056,576 float32"
    assert facts["positions"] == "37 x 37 patches, for images of 518 px"
    assert facts["same sizes as"] == "DINOv2 ViT-S/14"
    assert facts["layout"] == "DINOv2"
    assert "patch 14 px, 0 registers" in facts["architecture"] and "6 heads" in facts["architecture"]
    assert "0.485, 0.456, 0.406" in facts["normalisation"]


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglufused"])
def test_the_suggested_lines_start_a_run_from_the_file(tmp_path, ffn_layer):
    model = tiny(
        img_size=56, patch_size=14, num_register_tokens=3, qkv_bias=False, ffn_layer=ffn_layer, mlp_ratio=3
    )
    heads = {part: DINOHead(24, 40 + n, **HEAD) for n, part in enumerate(("dino_head", "ibot_head"))}
    for network in ("teacher", "student"):
        content = named("backbone.", model)
        for part, head in heads.items():
            content |= named(f"{part}.", head)
        path = written(tmp_path / f"{network}_checkpoint.pth", {network: content})
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))

    findings = inspect_weights(path, "student")
    assert findings.facts["heads"].startswith("2 (")
    config = tmp_path / "run.yaml"
    config.write_text("\n".join(findings.config))
    stated = yaml.safe_load(config.read_text())
    assert stated["dino"]["head_n_prototypes"] == 40 and stated["ibot"]["head_n_prototypes"] == 41
    crops = ["crops.global_crops_size=56", "crops.local_crops_size=28"]
    cfg = resolve_config(str(config), [*crops, f"student.pretrained_weights={path}"])
    trained = SSLMetaArch(cfg)
    assert torch.equal(trained.student.backbone.register_tokens, model.register_tokens)
    assert len(trained.initial_weights.parts) == 5  # both pairs of heads, the student's backbone


def test_heads_alone(tmp_path):
    path = written(
        tmp_path / "h.pth", {"teacher_ibot_head": DINOHead(24, 40, **HEAD).state_dict(), "epoch": 3}
    )
    findings = inspect_weights(path)
    assert findings.facts["teacher ibot head"].endswith("head_n_prototypes 40")
    assert findings.facts["also holds"] == "epoch=3"
    assert yaml.safe_load("\n".join(findings.config))["ibot"]["separate_head"] is True


def test_a_bare_head_is_one_head_of_which_the_file_does_not_tell_whose(tmp_path):
    findings = inspect_weights(written(tmp_path / "h.pth", DINOHead(24, 40, **HEAD).state_dict()))
    assert findings.facts["a bare head"].endswith("head_n_prototypes 40")
    assert not [name for name in findings.facts if "dino head" in name or "ibot head" in name]
    config = yaml.safe_load("\n".join(findings.config))
    assert config["dino"]["head_n_prototypes"] == 40 and "ibot" not in config


def test_number_formats_and_what_is_not_known(tmp_path):
    state = {name: tensor.half() for name, tensor in tiny().state_dict().items() if name != "mask_token"}
    state["norm.weight"] = state["norm.weight"].float()
    save_file(state, tmp_path / "a.safetensors")
    facts = inspect_weights(str(tmp_path / "a.safetensors")).facts
    assert facts["numbers"].endswith(" float16, 24 float32")
    assert facts["heads"] == "not known, set num_heads"
    assert facts["normalisation"].startswith("not known")
    assert facts["mask token"] == "not in the file, starts as zeros"


def test_something_else_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="neither a backbone nor a projection head"):
        inspect_weights(written(tmp_path / "r.pth", {"layer1.conv.weight": torch.zeros(3)}))


def test_the_command(tmp_path, capsys):
    path = written(tmp_path / "a.pth", tiny().state_dict())
    main([path])
    assert "layout:        DINOv2" in capsys.readouterr().out
    main([path, "--json"])
    assert json.loads(capsys.readouterr().out)["facts"]["layout"] == "DINOv2"
    command = [sys.executable, "-m", "dinov2.models.inspect", str(tmp_path / "nothing.pth")]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"norm.bias": None}, "1 missing: norm.bias"),
        ({"fc_norm.weight": torch.zeros(24)}, "1 not known to the model: fc_norm.weight"),
        ({"norm.weight": torch.full((24,), torch.nan)}, "NaN or infinity"),
        ({"pos_embed": torch.zeros(1, 12, 24)}, "no positions for a square grid"),
    ],
)
def test_what_cannot_be_loaded_gets_no_config_but_the_reason(tmp_path, capsys, damage, words):
    state = {name: tensor for name, tensor in {**tiny().state_dict(), **damage}.items() if tensor is not None}
    path = written(tmp_path / "a.pth", state)
    findings = inspect_weights(path)
    assert words in findings.refusal and findings.config == []
    with pytest.raises(WeightsError, match=words):
        main([path])
    assert "layout:" in capsys.readouterr().out  # what it is, is said all the same


def test_an_export_can_be_continued(tmp_path):
    folder = tmp_path / "eval" / "training_9999"
    folder.mkdir(parents=True)
    for network in ("teacher", "student"):
        written(folder / f"{network}_checkpoint.pth", {network: named("backbone.", tiny())})
    assert f"#   head.head_path={folder} optim.start_iter=10000" in inspect_weights(str(folder)).config


def test_the_centres_of_an_export_are_known(tmp_path):
    path = written(tmp_path / "centers_checkpoint.pth", {"dino_loss.center": torch.zeros(1, 4)})
    assert inspect_weights(path).facts["holds"] == "running centres of a run's losses (dino_loss.center)"
