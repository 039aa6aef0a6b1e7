"""Datasets of evaluations: labels they need, and how to come by them."""

import pytest
from PIL import Image

from dinov2.errors import DatasetError
from dinov2.eval.data import make_labelled_dataset
from tests.conftest import REAL_DATA


def refusal(dataset: str) -> str:
    with pytest.raises(DatasetError) as caught:
        make_labelled_dataset(dataset, transform=None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ("path,site\na.jpeg,HE\n", " (its columns are path, site), or use"),
        ("a.jpeg\n", " and a header line, or use"),
    ],
)
def test_a_table_of_images_without_labels_says_which_column_to_add(tmp_path, table, advice):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpeg")
    (tmp_path / "images.csv").write_text(table)
    text = refusal(f"CustomImageDataset:extra={tmp_path}/images.csv")
    assert (
        f'has no labels, which evaluation compares predictions with: give "{tmp_path}/images.csv" a' in text
    )
    assert f'column "label"{advice} a dataset with classes' in text


@pytest.mark.parametrize("with_table", [False, True])
def test_slides_without_labels_say_where_these_come_from(tmp_path, with_table):
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "a.svs").symlink_to(REAL_DATA / "cmu_small_region.svs")
    (tmp_path / "slides.csv").write_text("path\nslides/a.svs\n")
    source = f"manifest={tmp_path}/slides.csv" if with_table else f"root={slides}"
    text = refusal(f"Slides:{source}:extra={tmp_path}/extra")
    given = f'"{tmp_path}/slides.csv"' if with_table else "a CSV file as manifest=, with a column path and"
    assert f'give {given} a column "label", or use a dataset with classes' in text
