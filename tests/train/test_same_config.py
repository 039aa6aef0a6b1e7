"""Which configs may continue a run."""

import pytest
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from dinov2.configs.schema import KEYS
from dinov2.errors import ConfigError
from dinov2.train.same_config import FREE, MATTERS, matches, require_same_config, settings_of


def config(**changes):
    cfg = OmegaConf.create(OmegaConf.to_container(dinov2_default_config))
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_exactly_one_class(key):
    assert len(matches(key, MATTERS)) + len(matches(key, FREE)) == 1


def test_every_pattern_names_a_key():
    for pattern in (*MATTERS, *FREE):
        assert any(matches(key, (pattern,)) for key in KEYS), pattern


def test_the_same_config_and_what_does_not_matter_pass():
    stored = settings_of(config(), 2)
    require_same_config(config(), 2, stored)
    require_same_config(config(train__num_workers=3, checkpointing__period=7, optim__lr=0.5), 2, stored)


def test_a_learning_rate_that_is_taken_as_it_is_matters():
    stored = settings_of(config(optim__scaling_rule="none", optim__lr=0.002), 1)
    require_same_config(config(optim__scaling_rule="none", optim__lr=0.002), 1, stored)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.002 and is 0.001"):
        require_same_config(config(optim__scaling_rule="none", optim__lr=0.001), 1, stored)


def test_every_difference_is_named_with_both_values(caplog):
    stored = settings_of(config(), 1)
    cfg = config(train__seed=5, dino__loss_weight=0.5)
    with pytest.raises(ConfigError, match="--resume-anyway") as caught:
        require_same_config(cfg, 1, stored)
    assert "train.seed was 0 and is 5" in str(caught.value)
    assert "dino.loss_weight was 1.0 and is 0.5" in str(caught.value)
    require_same_config(cfg, 1, stored, anyway=True)
    assert "train.seed was 0 and is 5" in caplog.text


def test_a_key_that_the_checkpoint_lacks_meant_its_default():
    stored = settings_of(config(), 1)
    del stored["config"]["dino"]["koleo_scope"]
    require_same_config(config(), 1, stored)
    with pytest.raises(ConfigError, match="koleo_scope was 'rank' and is 'global'"):
        require_same_config(config(dino__koleo_scope="global"), 1, stored)


def test_processes_may_be_exchanged_for_accumulation():
    stored = settings_of(config(optim__lr=0.002), 4)
    require_same_config(config(optim__accumulate_steps=2, optim__lr=0.002), 2, stored)
    with pytest.raises(ConfigError) as caught:
        require_same_config(config(optim__lr=0.001), 2, stored)
    text = str(caught.value)
    assert "1 x 4 batches" in text and "is 1 x 2" in text
    assert "optim.lr was 0.002 and is 0.001" in text and "optim.accumulate_steps=2 keeps both" in text


def test_a_checkpoint_without_a_config_passes_with_a_warning(caplog):
    require_same_config(config(), 1, {"iteration": 3})
    assert "does not tell its config" in caplog.text


def test_a_run_is_not_continued_with_another_seed_and_keeps_its_config(tiny, tmp_path):
    tiny.start(tmp_path, "optim.max_iterations=3", "train.self_check=off")
    before = (tmp_path / "config.yaml").read_text()
    changed = ("optim.max_iterations=3", "train.self_check=off", "train.seed=1")
    with pytest.raises(ConfigError, match="train.seed was 0 and is 1"):
        tiny.start(tmp_path, *changed)
    assert (tmp_path / "config.yaml").read_text() == before
    tiny.start(tmp_path, *changed, options=("--resume-anyway",))


def test_the_rows_of_iterations_that_are_done_again_are_dropped(tmp_path):
    from dinov2.train.run_state import drop_rows_from

    path = tmp_path / "training_metrics.json"
    path.write_text('{"iteration": 0}\n{"iteration": 5}\n{"iteration": 6}\n{"itera')
    drop_rows_from(path, 6)
    assert path.read_text() == '{"iteration": 0}\n{"iteration": 5}\n'
    drop_rows_from(tmp_path / "none.json", 1)
