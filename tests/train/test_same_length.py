"""Two processes that see different numbers of samples: both stop before the first step."""

import pytest
from torch.utils.data import Subset

from dinov2 import distributed
from dinov2.errors import DatasetError
from dinov2.train.initialization import settle_config
from dinov2.train.input import build_dataset
from dinov2.train.train import SSLMetaArch, do_train, get_args_parser
from dinov2.utils.config import setup
from tests.distributed.launch import run_in_processes


def refusal(options: list[str]) -> str:
    """Train; the second process lacks one of the samples."""
    cfg = setup(get_args_parser().parse_args(options), write=False)
    settle_config(cfg)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    dataset = build_dataset(cfg)
    seen = Subset(dataset, range(len(dataset) - distributed.get_global_rank()))
    try:
        do_train(cfg, model, dataset=seen)
    except DatasetError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_sample_less_in_one_process_stops_both(tiny, tmp_path):
    options = ["--config-file", str(tiny.config), "--output-dir", str(tmp_path / "run")]
    options += [f"train.dataset_path={tiny.dataset}", "train.self_check=off", "train.device=cpu"]
    options += ["optim.max_iterations=2", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"]
    texts = run_in_processes(refusal, options)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the training set has 24 samples in process 0 and 23 in process 1: see that")
    assert not (tmp_path / "run" / "training_metrics.json").exists()
