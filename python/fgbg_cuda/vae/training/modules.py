"""Training the models with Lightning."""

from __future__ import annotations

import warnings
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

import fgbg_cuda

from ..errors import InputError, NonFiniteLossError, at_least, positive, whole
from ..evaluation.metrics import truth_scores
from ..models.double_elbo import DoubleELBO, DoubleELBOOutput
from ..models.layered import Latent, LayeredOutput, LayeredVAE, Separation

ASSUMED_STEPS = 1000  # where the number of steps is not known, the warm-ups are those of so long a training


def path_of(instance: Any) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def images_of(batch: Any) -> Tensor:
    """The images [B, C, H, W] of a batch: the batch itself, or its first field.

    Raises:
        InputError: it is something else.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        what = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(
            f"a batch has images of type {what}, expected a tensor of floats [B, C, H, W], or a tuple whose "
            "first field is one"
        )
    return images


def check_range(images: Tensor) -> None:
    """Refuses images far outside [0, 1]. (Noise that was added may reach a little beyond.)"""
    least, most = (value.item() for value in images.aminmax())
    if least < -1 or most > 2:
        raise InputError(f"the images have values from {least:g} to {most:g}, expected 0 to 1")


class SeparationModule(L.LightningModule):
    """What training has in common for every model that separates images; not a model in itself.

    A batch is a tensor of images [B, C, H, W], or a tuple whose first field is one. A NamedTuple may have
    fields with the truth, which are used for scores alone: see
    :func:`~fgbg_cuda.vae.evaluation.metrics.truth_scores`.

    A subclass says what a batch costs (:meth:`objective`) and what is a bound on log p(x) (:meth:`elbo`).
    Logged are ``train/loss``, ``train/`` each term (every ``log_every_n_steps`` of the trainer), and ``val/``
    or ``test/`` ``elbo``, ``mask`` (its mean) and the scores.

    Of the hyperparameters of a subclass, two are read here: the KL's weight rises linearly from 0 to 1 over
    the first ``kl_warmup`` of the training, a fraction (default: 0); ``lr`` is the peak of a one-cycle one.

    Args:
        model: an ``nn.Module`` with ``forward(x, seed=, first=)``, where ``seed`` and ``first`` are those of
            :meth:`LayeredVAE.forward`, and ``separate(x)``. What ``forward`` returns has ``kl_fg``, ``kl_bg``
            ([B], nats) and ``z_fg``, ``z_bg``, tuples of ``Latent``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.noise_seed = torch.initial_seed()

    def objective(self, out: Any, batch: Any, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that training minimises, and its terms (scalars to be logged), of ``out = model(x)``."""
        raise NotImplementedError

    def elbo(self, out: Any, x: Tensor) -> Tensor:
        """The ELBO of each image, in nats: [B]."""
        raise NotImplementedError

    def suspects(self, out: Any, x: Tensor) -> dict[str, Tensor]:
        """What a loss that is not finite can come from, by name, in the order in which it would spread."""
        raise NotImplementedError

    def separate(self, x: Tensor) -> Separation:
        """The layers of x [B, C, H, W], in [0, 1]."""
        return self.model.separate(x)

    def forward(self, x: Tensor) -> Tensor:
        """The posterior mask of x [B, C, H, W]: [B, 1, H, W]."""
        return self.separate(x).mask

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = images_of(batch)
        if batch_idx == 0:
            check_range(x)
        out = self.model(x, **self._sampling(x, batch_idx))
        steps = self.hparams.get("kl_warmup", 0.0) * (self._planned_steps() or ASSUMED_STEPS)
        weight = min(1.0, (self.global_step + 1) / max(1.0, steps))
        loss, terms = self.objective(out, batch, weight)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.global_step}, batch {batch_idx} of epoch "
                f"{self.current_epoch}: {self._non_finite_term(out, x)}"
            )
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        # The terms only at the steps that the logger writes: Lightning takes as long over a few metrics as
        # a small network over a batch.
        every = self.trainer.log_every_n_steps
        if every > 0 and (self.global_step + 1) % every == 0:
            self.log_dict({f"train/{name}": value for name, value in terms.items()}, sync_dist=True)
        return loss

    def _planned_steps(self) -> int | None:
        """The number of steps of the whole training; None if nothing but a time limit or the user ends it."""
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if 0 < steps < float("inf") else None

    def _sampling(self, x: Tensor, batch_idx: int) -> dict[str, int]:
        """What ``forward`` gets beside x [B, C, H, W], this process's part of a batch: its part of the noise.

        It follows from the seed that torch had when the module was made, the epoch and the batch: not from
        how many processes there are, nor from what else draws random numbers. Validation has the same
        noise every time.
        """
        epoch = 1 + self.current_epoch if self.training else 0
        (seed,) = np.random.SeedSequence([self.noise_seed, epoch, batch_idx]).generate_state(1, np.uint64)
        first = self.global_rank * len(x)
        if not self.training and self.trainer.world_size > 1:  # the last batch may not divide evenly
            sizes = self.all_gather(torch.tensor(len(x), device=x.device))
            first = int(sizes[: self.global_rank].sum())
        return {"seed": int(seed) >> 2, "first": first}

    def _non_finite_term(self, out: Any, x: Tensor) -> str:
        for name, value in {"the image itself": x, **self.suspects(out, x)}.items():
            if not torch.isfinite(value).all():
                return f"{name} has NaN or infinite values"
        return "the reconstruction overflows, though all that it is computed from is finite"

    def _score(self, batch: Any, batch_idx: int, stage: str) -> None:
        x = images_of(batch)
        found = self.separate(x)
        scores = {
            "elbo": self.elbo(self.model(x, **self._sampling(x, batch_idx)), x),
            "mask": found.mask.flatten(1).mean(1),
            **truth_scores(found, batch),
        }
        self.log_dict(
            {f"{stage}/{name}": value.mean() for name, value in scores.items()},
            on_step=False,
            on_epoch=True,
            # A float: Lightning averages over processes, and an integer by integer division.
            batch_size=float(len(x)),
            sync_dist=True,
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._score(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._score(batch, batch_idx, "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what it takes to separate images with this checkpoint and nothing else."""
        describe = getattr(self.trainer.datamodule, "describe", dict)
        checkpoint["separation"] = {
            "class_path": path_of(self),
            **describe(),
        }
        checkpoint["noise_seed"] = self.noise_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noise_seed = checkpoint["noise_seed"]

    def configure_optimizers(self) -> dict:
        optimizer = self._adam()
        steps = self._planned_steps()
        if steps is None:
            warnings.warn(
                f"the number of steps is not known: the learning rate stays at {self.hparams.lr:g}, and the "
                f"warm-ups are those of {ASSUMED_STEPS} steps; trainer.max_steps gives a number",
                stacklevel=2,
            )
            return {"optimizer": optimizer}
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=0.15,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _adam(self) -> torch.optim.Adam:
        if self.dtype == torch.float16:
            raise InputError(
                "trainer.precision is 16-true, but Adam's squares of gradients are beyond float16's range: "
                "expected bf16-true, bf16-mixed, 16-mixed or 32-true"
            )
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


def free_bits_kl(latents: tuple[Latent, ...], free_bits: float) -> Tensor:
    """The KL of ``latents`` in nats per image, each dimension's batch mean raised to ``free_bits``: []."""
    return sum(fgbg_cuda.gaussian_kl(mu, logvar, free_bits=free_bits) for _, mu, logvar in latents)


class LayeredVAEModule(SeparationModule):
    """Maximises the ELBO of a :class:`LayeredVAE`; the truth in a batch is used for scores alone.

    Two warm-ups, both over before training ends, so that what is reported is the plain ELBO: the
    KL's weight rises from 0 to 1, and the foreground's scale falls from ``fg_scale_start`` to
    ``fg_scale`` (a tight scale from the start leaves no gradient towards the right tone).

    Args:
        lr: peak of the one-cycle learning rate (Adam).
        kl_warmup: for how much of the training, a fraction, the weight of the KL rises.
        scale_warmup: for how much of it the foreground's scale falls. A scale that is learned is so from then
            on.
        fg_scale_start: the foreground's scale in the first step.
        beta: weight of the KL of the latents after the warm-up (Higgins et al., "beta-VAE", 2017); 1 gives
            the ELBO.
        free_bits: as in :func:`fgbg_cuda.gaussian_kl`, per latent dimension, in nats. (Logged, and in the
            ELBO, is the plain KL.)
        prune: in the last third of the training, foreground latents that tell less than this many nats
            are switched off at the start of each epoch: :meth:`CellsEncoder.prune`. 0: none.
        supervised: learn from the true masks too, the field ``mask`` of a batch.
        model_options: those of :class:`LayeredVAE`.
    """

    def __init__(
        self,
        lr: float = 2e-3,
        kl_warmup: float = 0.2,
        scale_warmup: float = 0.5,
        fg_scale_start: float = 0.07,
        beta: float = 1.0,
        free_bits: float = 0.0,
        prune: float = 0.0,
        supervised: bool = False,
        **model_options: Any,
    ) -> None:
        at_least(
            0, kl_warmup=kl_warmup, scale_warmup=scale_warmup, beta=beta, free_bits=free_bits, prune=prune
        )
        positive(lr=lr, fg_scale_start=fg_scale_start)
        super().__init__(LayeredVAE(**model_options))
        if prune > 0 and not hasattr(self.model.fg_encoder, "prune"):
            raise InputError(f"prune is {prune}, but {type(self.model.fg_encoder).__name__} cannot be pruned")
        self.save_hyperparameters()
        if is_dataclass(networks := self.model.networks):
            # As the command line notes them: it takes no pickled class to load a checkpoint.
            self.hparams["networks"] = {"class_path": path_of(networks), "init_args": asdict(networks)}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        h = self.hparams
        if self.global_step == 0 and batch_idx == 0 and not self.model.additive:
            self.model.networks.start(self.model, images_of(batch), self.trainer.strategy.reduce)
        done = self.global_step / (self._planned_steps() or ASSUMED_STEPS)
        if h.prune > 0 and batch_idx == 0 and done >= 2 / 3:
            self.model.fg_encoder.prune(h.prune)
        warm = done >= h.scale_warmup
        if not self.model.has_scales or (self.model.learn_fg_scale and warm):
            return
        progress = 1.0 if warm else done / h.scale_warmup
        final = self.model.target_fg_scale
        self.model.set_fg_scale(h.fg_scale_start * (final / h.fg_scale_start) ** progress)

    def objective(self, out: LayeredOutput, batch: Any, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        h, x = self.hparams, images_of(batch)
        if h.supervised:
            if not hasattr(batch, "mask"):
                raise InputError(f"supervised: a batch needs a field mask, got a {type(batch).__name__}")
            reconstruction = self.model.supervised_reconstruction(out, x, batch.mask).mean()
        else:
            reconstruction = self.model.reconstruction(out, x).mean()
        kl_fg, kl_bg = out.kl_fg.mean(), out.kl_bg.mean()
        terms = {"reconstruction": reconstruction, "kl_fg": kl_fg, "kl_bg": kl_bg}
        if h.free_bits > 0:
            kl_fg, kl_bg = (free_bits_kl(latents, h.free_bits) for latents in (out.z_fg, out.z_bg))
        loss = reconstruction + kl_weight * h.beta * (kl_fg + kl_bg)
        if (mask_kl := self.model.mask_kl(out)) is not None and not h.supervised:
            terms["kl_mask"] = mask_kl.mean()
            loss = loss + kl_weight * terms["kl_mask"]
        if self.model.has_scales:
            terms |= {"fg_scale": self.model.fg_scale.mean(), "bg_scale": self.model.bg_scale.mean()}
        return loss, terms

    def elbo(self, out: LayeredOutput, x: Tensor) -> Tensor:
        nats = self.model.reconstruction(out, x) + out.kl_fg + out.kl_bg
        mask_kl = self.model.mask_kl(out)
        return -(nats if mask_kl is None else nats + mask_kl)

    def suspects(self, out: LayeredOutput, x: Tensor) -> dict[str, Tensor]:
        found = {
            "the KL of the foreground latents": out.kl_fg,
            "the KL of the background latents": out.kl_bg,
            "the foreground": out.foreground,
            "the background": out.background,
            "the mask (mask_logits)": out.mask_logits,
        }
        if self.model.has_scales:
            found |= {
                "the foreground scale": self.model.fg_scale,
                "the background scale": self.model.bg_scale,
            }
        return found


class DoubleELBOModule(SeparationModule):
    """Minimises the loss of a :class:`DoubleELBO`, -(ELBO1 + lam ELBO2) + decay * |decoder weights|^2.

    Args:
        lam: lambda, the weight of the background's ELBO (the thesis: 450; 100 to 1000 do alike).
        lam_weighs_kl: True: lambda weighs all of ELBO2, as the thesis writes it. One bit in z2 (0.69 nats)
            then costs 312, which on the thesis's sets is more than its use: z2 collapses to its prior, and
            what it should tell, z1 does. False: its reconstruction alone.
        decay: of the decoders' weights.
        inactive_weight: how many times an image with an inactive background counts; the thesis proposes
            more than 1, see :meth:`DoubleELBO.image_weights`.
        lr: learning rate (Adam), constant; chosen on seeds 10 and 11.
        lr_warmup: number of first steps in which the learning rate rises linearly from a hundredth of that;
            0 in the thesis.
        kl_warmup: 0 in the thesis.
        model_options: those of :class:`DoubleELBO`.
    """

    def __init__(
        self,
        lam: float = 450.0,
        lam_weighs_kl: bool = False,
        decay: float = 0.01,
        inactive_weight: float = 1.0,
        lr: float = 3e-3,
        lr_warmup: int = 0,
        kl_warmup: float = 0.0,
        **model_options: Any,
    ) -> None:
        at_least(0, lam=lam, decay=decay, kl_warmup=kl_warmup)
        whole(0, lr_warmup=lr_warmup)
        positive(inactive_weight=inactive_weight, lr=lr)
        super().__init__(DoubleELBO(**model_options))
        self.save_hyperparameters()

    def objective(
        self, out: DoubleELBOOutput, batch: Any, kl_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h, x = self.hparams, images_of(batch)
        counts = self.model.image_weights(x, h.inactive_weight)
        nats = {
            "reconstruction": self.model.reconstruction(out, x),
            "pooled_reconstruction": self.model.pooled_reconstruction(out, x),
            "kl_fg": out.kl_fg,
            "kl_bg": out.kl_bg,
        }
        terms = {name: (counts * value).mean() for name, value in nats.items()}
        loss = terms["reconstruction"] + kl_weight * terms["kl_fg"]
        loss = loss + h.lam * terms["pooled_reconstruction"]
        loss = loss + (h.lam if h.lam_weighs_kl else 1.0) * kl_weight * terms["kl_bg"]
        terms["decay"] = h.decay * self.model.decoder_weights_squared()
        return loss + terms["decay"], terms

    def elbo(self, out: DoubleELBOOutput, x: Tensor) -> Tensor:
        """log p(x | z) - KL(z1) - KL(z2): what the model bounds log p(x) by, which is not its objective."""
        return -(self.model.reconstruction(out, x) + out.kl_fg + out.kl_bg)

    def suspects(self, out: DoubleELBOOutput, x: Tensor) -> dict[str, Tensor]:
        return {
            "the KL of the foreground latents": out.kl_fg,
            "the KL of the background latents": out.kl_bg,
            "the foreground": out.foreground,
            "the background": out.background,
        }

    def configure_optimizers(self) -> dict:
        optimizer = self._adam()
        steps = self.hparams.lr_warmup
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, 0.01 + 0.99 * step / steps) if steps else 1.0
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
