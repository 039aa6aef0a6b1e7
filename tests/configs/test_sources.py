"""Reading YAML files and overrides: what is wrong is said in one sentence with its place."""

import pytest

from dinov2.configs import resolve_config
from dinov2.configs.sources import file_settings, override_settings
from dinov2.errors import ConfigError


def refusal(config_file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        resolve_config(str(config_file), list(overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "vits14.yaml").write_text("")
    text = refusal(tmp_path / "vits_14.yaml")
    assert text.startswith(f'the config file "{tmp_path}/vits_14.yaml" does not exist')
    assert f'did you mean "{tmp_path}/vits14.yaml"' in text


def test_missing_folder(tmp_path):
    assert "does not exist: check --config-file" in refusal(tmp_path / "no" / "such.yaml")


def test_folder_instead_of_file(tmp_path):
    assert "is a folder: name a YAML file" in refusal(tmp_path)


def test_file_in_another_encoding(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("# Größe\n".encode("latin-1"))
    assert "cannot be read" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("optim:\n  epochs: [1\n", "is not valid YAML: line 3: "),
        ("optim:\n\tepochs: 1\n", "is not valid YAML: line 2: "),
        ("optim:\n  epochs: 1\n  epochs: 2\n", "is not valid YAML: line 3: found duplicate key epochs"),
        ("optim:\n  epochs: ${x\n", "is not valid YAML: "),
        ("- optim\n", "holds a list: a mapping of sections"),
        ("optim.epochs=3\n", 'holds the text "optim.epochs=3": a mapping of sections'),
    ],
)
def test_files_that_are_no_config(tmp_path, content, text):
    (tmp_path / "c.yaml").write_text(content)
    assert text in refusal(tmp_path / "c.yaml")


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "head:\noptim:\n"])
def test_empty_files_and_empty_sections_state_nothing(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    assert resolve_config(str(tmp_path / "c.yaml"), []) == resolve_config("", [])


def test_settings_of_a_file_know_their_lines(tmp_path):
    (tmp_path / "c.yaml").write_text("# head\ntrain:\n  seed: 1\noptim: {base_lr: 1e-4}\n")
    settings = [(item.path, item.value, item.origin) for item in file_settings(tmp_path / "c.yaml")]
    assert settings == [("train.seed", 1, "c.yaml line 3"), ("optim.base_lr", 1e-4, "c.yaml line 4")]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.base_lr=1e-4", "optim.base_lr", 1e-4),
        ("student.qkv_bias=false", "student.qkv_bias", False),
        ("crops.global_crops_scale=[0.4,1]", "crops.global_crops_scale", [0.4, 1]),
        ("optim.max_images=null", "optim.max_images", None),
        ("student.pretrained_weights=", "student.pretrained_weights", None),
        ("train.dataset_path=A:root=/a b:extra=/x=y", "train.dataset_path", "A:root=/a b:extra=/x=y"),
        ("head={head_path: /h}", "head.head_path", "/h"),
        ("train.output_dir=2024", "train.output_dir", "2024"),
        ("train.output_dir='null'", "train.output_dir", "null"),
        ("head.head_path=null", "head.head_path", None),
        ("train.dataset_path=A:root=/x: [y", "train.dataset_path", "A:root=/x: [y"),
        ("train.sshid=13", "train.sshid", 13),
        ("train.dataset_path=['A:root=/a b', B]", "train.dataset_path", ["A:root=/a b", "B"]),
        ("student.arch=[a]", "student.arch", "[a]"),
        ("train.path_map={/a.b: /c}", "train.path_map", {"/a.b": "/c"}),
    ],
)
def test_override_values_are_yaml(override, path, value):
    settings, problems = override_settings([override])
    assert not problems
    assert [(item.path, item.value) for item in settings] == [(path, value)]


def test_double_dash_separator_is_skipped():
    assert override_settings(["--", "optim.epochs=3"])[1] == []


def test_option_after_the_first_override_is_refused_with_its_value():
    # Defect 3: upstream makes two null keys of `--output-dir out` and writes into the current directory.
    text = refusal("", ["optim.epochs=100", "--output-dir", "out"])
    assert text == (
        'the option "--output-dir" stands among the overrides: put options before the first key=value'
    )
    assert 'the option "--output-dir"' in refusal("", ["optim.epochs=100", "--output-dir=out"])
    assert 'the option "--no-resume"' in refusal("", ["optim.epochs=100", "--no-resume", "train.seed=1"])


def test_override_written_as_an_option():
    assert refusal("", ["--optim.base_lr=1"]) == (
        'the override "--optim.base_lr" is written without dashes: optim.base_lr=1'
    )
    assert "optim.base_lr=<value>" in refusal("", ["--optim.base_lr", "1"])


@pytest.mark.parametrize("override", ["optim.epochs", "=3", ""])
def test_override_without_key_or_value(override):
    assert f'the override "{override}" is not of the form key=value' in refusal("", [override])


@pytest.mark.parametrize("override", ["optim.epochs=[a", "optim.base_lr=${x"])
def test_override_with_broken_yaml(override):
    assert f'the override "{override}" cannot be read: ' in refusal("", [override])
