"""The README names what exists: two set-up commands, files, recipes, configs that resolve."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dinov2.configs import resolve_config
from tests.conftest import REAL_DATA, REPO

README = (REPO / "README.md").read_text("utf-8")
RECIPES = REPO / "dinov2" / "configs" / "train"
DOCUMENTS = [REPO / "README.md", REPO / "docs" / "quickstart.md", REPO / "scripts" / "data" / "README.md"]


def test_exactly_two_set_up_commands_on_the_first_screen():
    first_block = README.split("```")[1]
    assert README.index(first_block) < 1000
    assert re.findall(r"^\S+", first_block, re.MULTILINE)[1:] == [
        "./scripts/quickstart.sh",
        "./scripts/test.sh",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document):
    text = document.read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"(?:dinov2|scripts|docs|tests)/[\w/.-]+\.(?:py|yaml|sh|md|csv|svs|jpg)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (REPO / path).exists()]
    assert not missing


def test_every_recipe_is_listed():
    listed = set(re.findall(r"`(vit\w+(?:[-_]\w+)*)`", README.split("## Recipes")[1].split("##")[0]))
    shipped = {path.stem for path in RECIPES.glob("vit*.yaml")} - {"vit-digits"}
    assert listed == shipped


def test_configs_in_commands_resolve():
    for name in set(re.findall(r"--config-file (\S+)", README)):
        assert Path(REPO / name).is_file()
        resolve_config(str(REPO / name), ["train.dataset_path=ImageFolder:root=/data/tiles"])


@pytest.fixture
def after_a_run(real_vits14, tmp_path):
    """A checkout with a finished run in it and a real tile, as the section "Load the result" finds them."""
    for name in ("hubconf.py", "dinov2"):
        (tmp_path / name).symlink_to(REPO / name)
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        picture.crop((500, 400, 756, 656)).save(tmp_path / "tile.png")
    folder = tmp_path / "results" / "mine" / "eval" / "training_9999"
    folder.mkdir(parents=True)
    backbone = {f"backbone.{name}": tensor for name, tensor in load_file(real_vits14).items()}
    head = {"dino_head.last_layer.weight_v": torch.zeros(4, 8)}
    torch.save({"teacher": {**backbone, **head}}, folder / "teacher_checkpoint.pth")
    return tmp_path


@pytest.mark.slow
def test_the_lines_that_load_the_result_run_as_they_stand(after_a_run):
    section = README.split("## Load the result")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 5
    export = re.search(r"`python -m dinov2\.hub\.export ([^`]+)`", section)[1]
    opening = re.search(r"`(timm\.create_model[^`]+)`", section)[1]
    check = f"""
x = make_classification_eval_transform()(Image.open("tile.png").convert("RGB"))[None]
assert features.shape == (1, 384) and features.std() > 0.1
import timm, timm.data
exported = {opening}.eval()
assert exported.pretrained_cfg["input_size"] == (3, 518, 518)
x = torch.nn.functional.interpolate(x, size=518)
assert (exported(x) - model(x)).abs().max() < 1e-4
"""
    command = f"""
import runpy, sys
sys.argv = {["export", *shlex.split(export)]!r}
runpy.run_module("dinov2.hub.export", run_name="__main__", alter_sys=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", command + code + check], cwd=after_a_run, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
