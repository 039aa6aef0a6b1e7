"""The names of exported files are read as they are written."""

import pytest

from dinov2.models.checkpoint_names import FARM_NAME, PARTS, checkpoint_name, split_name


@pytest.mark.parametrize("prefix", ["", "dinov2_vits_NCT_10k_training_1999_"])
@pytest.mark.parametrize("part", PARTS)
def test_a_name_is_split_into_what_it_was_made_of(prefix, part):
    name = f"{prefix}{checkpoint_name(part)}"
    assert split_name(name) == (prefix, part)
    assert bool(FARM_NAME.fullmatch(name)) == (bool(prefix) and part != "centers")


@pytest.mark.parametrize("name", ["my_heads.pth", "mystudent_checkpoint.pth", "student_checkpoint.pt"])
def test_other_names_belong_to_no_export(name):
    assert split_name(name) is None
