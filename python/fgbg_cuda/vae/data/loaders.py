"""Batches that several processes share and a resumed run goes on with, over a set in memory or any other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from ..errors import InputError

SPLITS = ("train", "val", "test")
SCORED_TOGETHER = 50


class Batches(DistributedSampler, SequentialSampler):
    """Batches of the indices below ``count``, in order; the last one may be short.

    With several processes each gets its part of every batch: together they see what one process would.
    (Being a DistributedSampler tells Lightning that this is taken care of; being a SequentialSampler, that
    ``overfit_batches`` need not put one in its place, which would give single images.)

    ``first`` is the batch at which the next pass, and only that, starts.
    """

    first = 0

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        several = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        if batch_size % world or count < world:
            raise InputError(
                f"{count} images in batches of {batch_size} cannot be shared out among {world} processes: "
                "batch_size has to be a multiple of their number, with an image for each"
            )
        super().__init__(range(count), world, rank, seed=seed)
        self.count, self.batch_size = count, batch_size
        self.bounds = [*range(0, count, batch_size), count]
        if count - self.bounds[-2] < world:  # fewer images than processes: they join the batch before
            del self.bounds[-2]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def order(self) -> Tensor:
        return torch.arange(self.count)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        start, self.first = self.first, 0
        for first, last in itertools.islice(itertools.pairwise(self.bounds), start, None):
            yield order[first:last].tensor_split(self.num_replicas)[self.rank].tolist()


class ShuffledBatches(Batches):
    """Full batches of indices, in an order that follows from ``seed`` and the epoch alone.

    Lightning calls ``set_epoch``.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        super().__init__(count, batch_size, seed)
        if count < batch_size:
            raise InputError(f"batch_size is {batch_size}, but there are only {count} training images")
        self.bounds = list(range(0, count + 1, batch_size))

    def order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch + 1):  # the order of epoch n is the n-th that the seed gives
            order = torch.randperm(self.count, generator=generator)
        return order


class ResumableLoader(DataLoader):
    """A loader over :class:`Batches` whose place in the epoch Lightning saves and restores."""

    batches = 0  # handed out in this epoch; the sampler does not know, as workers run ahead of it

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.first = state["batches"] % len(self)  # a finished epoch: the start of the next

    def __iter__(self) -> Iterator[Any]:
        self.batches = self.sampler.first
        for batch in super().__iter__():
            self.batches += 1
            yield batch


def overfits(data: L.LightningDataModule) -> bool:
    """Whether the trainer is to see the same few batches again and again: they are then not shuffled."""
    return data.trainer is not None and data.trainer.overfit_batches > 0


def in_memory_loader(images: NamedTuple, batch_size: int, *, shuffle: bool, seed: int) -> DataLoader:
    """Batches of ``images``, a NamedTuple of tensors, each a NamedTuple of the same type.

    Shuffled: full batches only, in an order fixed by ``seed``, resumable. Else in order, the last one short.
    """
    dataset = TensorDataset(*images)
    # The set lives in memory: one indexing call a batch beats collating single images.
    options = {"batch_size": None, "collate_fn": lambda parts: type(images)(*parts)}
    if shuffle:
        return ResumableLoader(dataset, sampler=ShuffledBatches(len(dataset), batch_size, seed), **options)
    return DataLoader(dataset, sampler=Batches(len(dataset), batch_size), **options)


class InMemorySplits(L.LightningDataModule):
    """Loaders for data that :meth:`setup` puts into ``splits``: a NamedTuple of tensors for each of SPLITS.

    The hyperparameters include ``batch_size`` and ``seed``. Validation and test batches are of
    :data:`SCORED_TOGETHER` images if that is more: no step depends on them, and fewer are faster.
    """

    def _loader(self, split: str) -> DataLoader:
        h, train = self.hparams, split == "train"
        batch_size = h.batch_size if train else max(h.batch_size, SCORED_TOGETHER)
        shuffle = train and not overfits(self)
        return in_memory_loader(self.splits[split], batch_size, shuffle=shuffle, seed=h.seed)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")
