"""The README names what exists: two set-up commands, files, recipes, configs that resolve."""

import re
from pathlib import Path

import pytest

from dinov2.configs import resolve_config
from tests.conftest import REPO

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
