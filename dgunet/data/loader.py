"""Batches in an order that a resumed run continues."""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableBatchSampler(Sampler):
    """Batches of (epoch, index) keys: this process's share of every global batch of an epoch.

    The order is a permutation drawn from (seed, epoch). The last batch is filled from the beginning of the order, with
    indices beyond the data set's length, which give other random crops. Set ``epoch`` and ``start`` (batches already
    done) before iterating.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, world: int = 1):
        self.size, self.batch, self.seed = size, batch, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 1, 0

    @property
    def steps(self) -> int:
        """Batches in a whole epoch."""
        return max(-(-self.size // self.batch), 1)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        rounds, places = np.divmod(np.arange(self.steps * self.batch), self.size)
        order = order[places] + self.size * rounds
        micro_batch = self.batch // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * micro_batch
            yield [(self.epoch, int(index)) for index in order[first : first + micro_batch]]


@contextlib.contextmanager
def make_dataloader(data: Dataset, workers: int, **options) -> Iterator[DataLoader]:
    """A DataLoader whose worker processes end with the block, also after an exception."""
    if workers:
        # Python 3.14's default has a server start the workers: they would outlive a training that is killed.
        options |= dict(persistent_workers=True, multiprocessing_context="fork")
    loader = DataLoader(data, num_workers=workers, worker_init_fn=_init_worker, **options)
    try:
        yield loader
    finally:
        if loader._iterator is not None:  # persistent workers would live until the interpreter ends
            loader._iterator._shutdown_workers()


def _init_worker(_):
    import cv2

    cv2.setNumThreads(0)  # the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A cluster's scheduler signals every process of a job, but the trainer needs its workers to finish the step before
    # it saves. A worker therefore outlives its first SIGTERM: until the trainer ends it, a second one, or a minute.
    signal.signal(signal.SIGTERM, _ignore_sigterm)


def _ignore_sigterm(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(60)
