"""Two processes train as one would: same batches, same noise, and so the same losses and weights."""

from __future__ import annotations

import multiprocessing
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

L = pytest.importorskip("lightning")
pytest.importorskip("skimage")

import numpy as np  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from fgbg_cuda.vae import ImagesDataModule, LayeredVAEModule, ObjectNetworks  # noqa: E402
from fgbg_cuda.vae.data.loaders import Batches, ShuffledBatches  # noqa: E402
from fgbg_cuda.vae.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]
EPOCHS, STEPS = 2, 4  # of 8 crops each


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.images: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.images.append(batch.image)


def train(movie: str, out: str, rank: int, world: int, port: int) -> None:
    """What each process does; it leaves its losses, batches, scores and weights in ``out``."""
    torch.set_num_threads(1)
    options = {"devices": 1}
    if world > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(world),
        }
        options |= {
            "num_nodes": world,  # two machines with a process each
            "strategy": DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=120)),
            "plugins": [LightningEnvironment()],
        }
    L.seed_everything(0)
    module = LayeredVAEModule(networks=ObjectNetworks(width=8)).double()
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=EPOCHS,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    sizes = {"val_fraction": 0.125, "test_fraction": 0.05}  # 33, 5 and 2 images
    data = ImagesDataModule(movie, crop=16, batch_size=8, crops_per_image=1, **sizes)
    trainer.fit(module, datamodule=data)
    torch.save(
        {
            "losses": record.losses,
            "images": record.images,
            "weights": module.state_dict(),
            "elbo": trainer.callback_metrics["val/elbo"].item(),
        },
        f"{out}/{world}-{rank}.pt",
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    np.save(folder / "movie.npy", np.random.default_rng(0).integers(0, 256, (40, 24, 24), np.uint8))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fgbg_cuda.vae", "pytest", "skimage.filters"])
    arguments = [
        (str(folder / "movie.npy"), str(folder), *process, port) for process in ((0, 1), (0, 2), (1, 2))
    ]
    processes = [context.Process(target=train, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


def test_each_process_gets_its_half_of_every_batch(results):
    alone, first, second = (result["images"] for result in results)
    assert len(alone) == EPOCHS * STEPS
    for whole, *halves in zip(alone, first, second, strict=True):
        assert [len(half) for half in halves] == [4, 4]
        assert torch.equal(torch.cat(halves), whole)


def test_losses_are_those_of_a_single_process(results):
    """To rounding: the noise is the same, and only the order of sums differs, in float64."""
    alone, first, second = (torch.tensor(result["losses"], dtype=torch.float64) for result in results)
    torch.testing.assert_close((first + second) / 2, alone, rtol=1e-9, atol=0)
    assert not torch.allclose(first, second, rtol=1e-4)  # the halves are different images


def test_weights_are_those_of_a_single_process(results):
    alone, first, second = (result["weights"] for result in results)
    for name, ours in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], ours, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_scores_are_those_of_a_single_process(results):
    alone, first, second = (result["elbo"] for result in results)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)


# ---- how batches are shared out ----


def shares(kind, monkeypatch, world, *arguments):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(list(kind(*arguments)))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("count", [8, 9, 23, 24, 25, 31])
def test_in_order_everything_is_seen_once_and_by_all_processes_equally_often(monkeypatch, count, world):
    found = shares(Batches, monkeypatch, world, count, 8)
    assert len({len(batches) for batches in found}) == 1  # else the one with more would wait forever
    assert all(batch for batches in found for batch in batches)
    seen = [i for parts in zip(*found, strict=True) for part in parts for i in part]
    assert seen == list(range(count))


@pytest.mark.parametrize("world", [2, 4])
def test_shuffled_halves_make_the_whole(monkeypatch, world):
    (alone,) = shares(ShuffledBatches, monkeypatch, 1, 27, 8, 5)
    found = shares(ShuffledBatches, monkeypatch, world, 27, 8, 5)
    assert [[i for part in parts for i in part] for parts in zip(*found, strict=True)] == alone
    assert len(alone) == 3


@pytest.mark.parametrize(("count", "batch_size"), [(24, 9), (1, 2)])
def test_what_cannot_be_shared_out(monkeypatch, count, batch_size):
    with pytest.raises(
        InputError, match=rf"{count} images in batches of {batch_size} cannot be shared out among 2"
    ):
        shares(Batches, monkeypatch, 2, count, batch_size)
