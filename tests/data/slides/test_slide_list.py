"""Lists of slides from folders, patterns and tables."""

import numpy as np
import pytest

from dinov2.data.datasets.path_map import PathMap
from dinov2.data.slides.slide_list import SlideEntry, list_slides
from dinov2.errors import DatasetError
from tests.eval.slides.dicom import write_dicom


@pytest.fixture
def folder(tmp_path):
    for name in ("b.svs", "a.tiff", "sub/c.NDPI", "sub/notes.txt", ".hidden/d.svs", "sub/.e.svs", "x.y.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


GLASS = np.full((64, 64, 3), 240, np.uint8)


def names(source):
    return [entry.name for entry in list_slides(str(source))]


def test_folder_pattern_and_file(folder):
    assert names(folder) == ["a", "b", "c", "x.y"]
    assert names(folder / "*.svs") == ["b", "x.y"]
    assert names(folder / "**" / "*.NDPI") == ["c"]
    assert list_slides(str(folder / "b.svs")) == [SlideEntry("b", str(folder / "b.svs"))]


def test_a_dicom_series_in_a_folder_is_one_slide_with_the_name_of_the_folder(folder):
    for series, name in enumerate(("sub/first", "second")):
        write_dicom(folder / name, GLASS, 0.5, series)
    (folder / "second" / "broken.dcm").write_bytes(b"no DICOM")
    found = {entry.name: entry.path for entry in list_slides(str(folder))}
    assert list(found) == [
        "a",
        "b",
        "broken",
        "c",
        "first",
        "second",
        "x.y",
    ]  # to be told of when it is opened
    assert found["first"] == str(folder / "sub" / "first" / "level0.dcm")


def test_two_dicom_series_in_one_folder_are_told_apart_by_a_table_alone(tmp_path):
    other = write_dicom(tmp_path / "other", GLASS, 0.5, series=7)
    write_dicom(tmp_path / "slides", GLASS, 0.5)
    other.rename(tmp_path / "slides" / "of_another.dcm")
    with pytest.raises(DatasetError, match='two slides would be stored as "slides".*column'):
        list_slides(str(tmp_path / "slides"))


def test_patterns_enter_links_but_no_loops_and_pass_hidden_files_over(folder, monkeypatch):
    (folder / "sub" / "loop").symlink_to(folder)
    assert names(folder / "**" / "*.NDPI") == ["c"]
    assert names(folder / "*" / "*.NDPI") == names(folder / "*" / "loop" / "*" / "*.NDPI") == ["c"]
    assert names(folder / "**" / "*.svs") == ["b", "x.y"]
    assert names(folder / "[ab].*") == ["a", "b"]
    assert names(folder / "sub" / ".*.svs") == [".e"]
    monkeypatch.chdir(folder)
    assert names("*.svs") == names("**/*.svs") == ["b", "x.y"]
    assert [entry.path for entry in list_slides("*.tiff")] == ["a.tiff"]
    for pattern, words in (
        ("**.svs", "is no pattern below root: write"),
        ("none/*.svs", "there is no slide"),
    ):
        with pytest.raises(DatasetError, match=words):
            list_slides(pattern)


def test_table(folder):
    table = folder / "slides.csv"
    table.write_text(
        "\ufeffslide, Path,mpp,mask,process,site,label,split\n"
        f"first,sub/c.NDPI,0.25,m/c.png,1,HE,tumour,train\n\n,{folder}/b.svs,,,0,,,\n,a.tiff,,,,\n",
        "utf-8",
    )
    assert list_slides(str(table)) == [
        SlideEntry("a", str(folder / "a.tiff")),
        SlideEntry("b", str(folder / "b.svs"), process=False),
        SlideEntry("first", str(folder / "sub/c.NDPI"), 0.25, str(folder / "m/c.png"), True, "m/c.png"),
    ]


def test_the_column_slide_alone_is_the_path(folder):
    (folder / "slides.csv").write_text("slide\nsub/c.NDPI\n")
    assert list_slides(str(folder / "slides.csv")) == [SlideEntry("c", str(folder / "sub/c.NDPI"))]


def test_recorded_folders_are_mapped(folder):
    (folder / "slides.csv").write_text("path,mask\n/old/sub/c.NDPI,/old/c.png\n/other/b.svs,\nrel.svs,\n")
    entries = list_slides(str(folder / "slides.csv"), path_map=PathMap.parse(f"/old={folder}"))
    assert [(entry.path, entry.mask, entry.mask_as_given) for entry in entries] == [
        ("/other/b.svs", None, None),
        (str(folder / "sub/c.NDPI"), str(folder / "c.png"), "/old/c.png"),
        (str(folder / "rel.svs"), None, None),
    ]


def test_lines_are_counted_as_editors_do(tmp_path):
    (tmp_path / "slides.csv").write_text('path,mpp,note\na.svs,,"two\nlines"\n\nb.svs,x,\n')
    with pytest.raises(DatasetError, match='line 5 of .* has "x" below mpp'):
        list_slides(str(tmp_path / "slides.csv"))


def test_a_table_in_another_encoding(tmp_path):
    (tmp_path / "slides.csv").write_bytes("path\nm\u00fcller.svs\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="is no CSV file in UTF-8"):
        list_slides(str(tmp_path / "slides.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\nx.svs\n", r"has the columns \['file'\]; path is needed"),
        ("path,mppp\nx.svs,1\n", 'column "mppp" \\(did you mean "mpp"'),
        ("path,mpp\nx.svs,fine\n", 'line 2 of .* has "fine" below mpp'),
        ("path,process\nx.svs,maybe\n", 'has "maybe" below process; 1 or 0'),
        ("path,mpp\nx.svs,\n,0.5\n", "line 3 of .* has no path"),
        ("path,slide\nx.svs,a/b\n", 'line 2 of .* has "a/b" below slide'),
        ("path\n", "there is no slide in"),
    ],
)
def test_mistakes_in_a_table(tmp_path, text, message):
    (tmp_path / "slides.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        list_slides(str(tmp_path / "slides.csv"))


def test_two_slides_of_one_name(folder):
    (folder / "sub" / "b.tif").touch()
    with pytest.raises(
        DatasetError, match=r'stored as "b": .*b\.svs" and .*sub/b\.tif".*CSV with the columns'
    ):
        list_slides(str(folder))


def test_nothing_there(tmp_path):
    with pytest.raises(DatasetError, match='nowhere" does not exist: correct the path'):
        list_slides(str(tmp_path / "nowhere"))


def test_nothing_found(tmp_path):
    with pytest.raises(DatasetError, match="there is no slide in"):
        list_slides(str(tmp_path))
