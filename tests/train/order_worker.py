"""Trains on tiles that write down when they are drawn; in a group or called in a process.

Usage: order_worker.py RECORD_FOLDER, then the options of the trainer
"""

import sys
from pathlib import Path

from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.train.initialization import settle_config
from dinov2.train.input import build_dataset
from dinov2.train.train import SSLMetaArch, do_train, get_args_parser
from dinov2.utils.config import setup


class Recorded(Dataset):
    """Appends every index that is read to a file of this process."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset = dataset
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank_{distributed.get_global_rank()}.txt"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        with self.path.open("a") as file:
            file.write(f"{index}\n")
        return self.dataset[index]


def train(record_folder: str, *options: str) -> None:
    """Train as the command line does, and continue what the output directory holds with any config."""
    cfg = setup(get_args_parser().parse_args(options), write=False)
    settle_config(cfg)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    dataset = Recorded(build_dataset(cfg), Path(record_folder))
    do_train(cfg, model, resume=True, dataset=dataset, resume_anyway=True)


if __name__ == "__main__":
    train(*sys.argv[1:])
