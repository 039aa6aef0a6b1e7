"""Starting, randomness and arithmetic of the loader's worker processes."""

import logging
import multiprocessing
import os
import signal
import threading
from typing import Any

import torch

from dinov2 import distributed
from dinov2.utils.seeding import derive_seed, seed_everything

logger = logging.getLogger("dinov2")

# What a fork server imports once, and its workers then share: each would need 280 MiB for torch alone.
PRELOADED = ("__main__", "torch", "torchvision.transforms", "dinov2.data", "dinov2.data.datasets")
PARENT_CHECK_SECONDS = 2.0


def worker_options(
    num_workers: int,
    *,
    timeout: float,
    prefetch_factor: int | None,
    start_method: str,
    persistent: bool = True,
) -> dict[str, Any]:
    """Return the arguments of a ``DataLoader`` that concern its workers.

    Args:
        num_workers: processes that read; 0 reads in this one, where none of the rest applies.
        timeout: seconds to wait for a batch; 0 waits for ever.
        prefetch_factor: batches that each worker prepares ahead; None is PyTorch's 2.
        start_method: ``default``, ``fork``, ``spawn`` or ``forkserver``.
        persistent: they stay as long as the loader, else for one iteration over it.
    """
    if num_workers == 0:
        if timeout:
            logger.info(
                "train.num_workers is 0: this process reads the images itself, and waits for storage that "
                "does not answer without train.worker_timeout"
            )
        return {"num_workers": 0}
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(list(PRELOADED))
    return {
        "num_workers": num_workers,
        "persistent_workers": persistent,
        "timeout": timeout,
        "prefetch_factor": prefetch_factor,
        "multiprocessing_context": None if start_method == "default" else start_method,
    }


def worker_generator(seed: int, advance: int = 0) -> torch.Generator:
    """Return the generator from which a loader draws the seeds of its workers, one set per iteration over it.

    Args:
        seed: of the run.
        advance: samples that this process has drawn already, so that a resumed run does not augment as its
            beginning did.
    """
    return torch.Generator().manual_seed(derive_seed(seed, distributed.get_global_rank(), advance))


def seed_worker(worker_id: int) -> None:
    """Prepare a worker: its signals, its seeds from what the loader gave it, and flush denormals.

    The seed that PyTorch gives a worker is the loader's draw plus ``worker_id``; mixing the two makes
    neighbouring workers unrelated. Narrow blur kernels hold denormal floats, which slow some blurs tenfold
    while contributing nothing to 8-bit pixels.
    """
    leave_signals_to_the_trainer()
    seed_everything(torch.initial_seed() - worker_id, worker_id)
    torch.set_flush_denormal(True)


def leave_signals_to_the_trainer() -> None:
    """Let only the trainer end this worker, and let the worker end with it.

    Slurm, torchrun and a terminal signal all processes of a job; the trainer needs its workers until it has
    finished its step. SIGTERM is how PyTorch ends a worker that does not end by itself, so it counts when it
    comes from the trainer.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is None or not hasattr(signal, "sigtimedwait"):  # not a worker process, or not Linux
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later inherit this
    threading.Thread(target=_await_the_end, args=(trainer,), daemon=True).start()


def _await_the_end(trainer: Any) -> None:
    while trainer.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_SECONDS)
        if received is not None and received.si_pid == trainer.pid:
            break
    os._exit(0)
