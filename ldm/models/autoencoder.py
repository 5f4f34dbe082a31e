"""First stages, LDM (arXiv 2112.10752) Sec. 3.1: [b, c, h, w] in -1 .. 1 to latents [b, d, h/f, w/f] and back.

`AutoencoderKL` encodes as a Gaussian, `VQModel` as entries of a codebook. `VQModelInterface` is a `VQModel` for
diffusion models, and `IdentityFirstStage` leaves pictures unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints import read_weights
from ldm.config import instantiate_from_config
from ldm.errors import InputError, explain
from ldm.lightning import module_class
from ldm.models.building import load_weights
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.losses.adversarial import from_taming
from ldm.modules.parts import refuse_sizes


class FirstStage(module_class()):
    """Encoder, decoder and the common training of first stages: an autoencoder against a discriminator.

    In every batch, two optimizers make a step each, with the same reconstruction. A subclass has `quant_conv` and
    `comparison`. The training run sets the attribute `learning_rate`. Raises `InputError` for an invalid `ddconfig`.
    """

    learning_rate = 4.5e-6
    betas: Sequence[float] = (0.5, 0.9)  # of both Adam optimizers, as published
    discriminator_factor = 1.0  # the discriminator's learning rate relative to the autoencoder's
    scheduler_config: Mapping | None = None

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ):
        super().__init__()
        refuse_sizes("the first stage", embed_dim=embed_dim)
        self.automatic_optimization = False
        self.image_key, self.embed_dim = image_key, embed_dim
        with explain("ddconfig of the first stage", TypeError, ValueError):
            self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.downsampling_factor = 2 ** (len(self.encoder.down) - 1)  # pixels per latent
        self.loss = instantiate_from_config(lossconfig)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    def comparison(self, inputs: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """Reconstruct, and return the loss as a function of (optimizer_idx, step, last_layer=, split=)."""
        raise NotImplementedError

    def init_from_ckpt(self, path: str, ignore_keys: Iterable[str] = ()) -> None:
        """Load the weights of a checkpoint, except names that begin with one of `ignore_keys`. The loss may be absent.

        Raises `InputError` for a file that cannot be read and for weights that are missing or of another shape.
        """
        ignored = tuple(ignore_keys)
        weights = {name: value for name, value in read_weights(path).items() if not name.startswith(ignored)}
        load_weights(self, weights, str(path), may_lack=lambda name: name.startswith(("loss.", *ignored)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents [b, embed_dim, h, w] to pictures [b, out_ch, fh, fw]."""
        return self.decoder(self.post_quant_conv(z))

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """The pictures of a batch, [b, h, w, c] or [b, h, w], as float32 [b, c, h, w]."""
        x = batch[k]
        x = x[..., None] if x.dim() == 3 else x
        return x.permute(0, 3, 1, 2).contiguous().float()

    def get_training_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The pictures of a batch as training sees them."""
        return self.get_input(batch, self.image_key)

    def get_last_layer(self) -> Tensor:
        """The weight whose gradients balance the discriminator's part of the loss."""
        return self.decoder.conv_out.weight

    @property
    def batches_seen(self) -> int:
        """The step for `disc_start`; Lightning's counter counts the steps of both optimizers."""
        return self.global_step // 2

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """One step of the autoencoder, then one of the discriminator."""
        inputs = self.get_training_input(batch)
        compare = self.comparison(inputs)
        for i, (name, optimizer) in enumerate(zip(("aeloss", "discloss"), self.optimizers(), strict=True)):
            loss, log = compare(i, self.batches_seen, last_layer=self.get_last_layer(), split="train")
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log(name, loss.detach(), prog_bar=True, batch_size=len(inputs))
            self.log_dict(log, batch_size=len(inputs))
        for scheduler in self.lr_schedulers() or []:
            scheduler.step()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Logs `val/rec_loss` and all other parts of the loss."""
        self.validate(batch, "val")

    def validate(self, batch: Mapping[str, Tensor], split: str) -> None:
        inputs = self.get_input(batch, self.image_key)
        compare = self.comparison(inputs)
        for i, name in enumerate(("aeloss", "discloss")):
            loss, log = compare(i, self.batches_seen, last_layer=self.get_last_layer(), split=split)
            self.log_dict({f"{split}/{name}": loss, **log}, batch_size=len(inputs), sync_dist=True)

    def configure_optimizers(self) -> tuple[list, list]:
        """One Adam for the autoencoder and one for the discriminator. Raises `InputError` if the loss cannot train."""
        if not hasattr(self.loss, "discriminator"):
            raise InputError(
                f"lossconfig {type(self.loss).__name__} cannot train a first stage: "
                "expected ldm.modules.losses.contperceptual.LPIPSWithDiscriminator or its VQ sister"
            )
        generator = [p for name, p in self.named_parameters() if not name.startswith("loss.")]
        lr, betas = self.learning_rate, tuple(self.betas)
        optimizers = [
            torch.optim.Adam(generator, lr=lr, betas=betas),
            torch.optim.Adam(self.loss.discriminator.parameters(), lr=self.discriminator_factor * lr, betas=betas),
        ]
        if self.scheduler_config is None:
            return optimizers, []
        schedule = instantiate_from_config(self.scheduler_config).schedule
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]

    @torch.no_grad()
    def to_rgb(self, x: Tensor) -> Tensor:
        """Map many channels, e.g. a segmentation, to random colours: [b, c, h, w] -> [b, 3, h, w] in -1 .. 1."""
        weight = getattr(self, "colorize", None)
        if weight is None:
            weight = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
        x = F.conv2d(x, weight.to(x))
        return 2 * (x - x.min()) / (x.max() - x.min()) - 1

    def shown(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures that can be shown; `to_rgb` converts those with more than three channels."""
        return {name: self.to_rgb(x) if x.shape[1] > 3 else x for name, x in pictures.items()}


class AutoencoderKL(FirstStage):
    """The first stage that encodes a picture as a diagonal Gaussian, with LDM's constructor arguments.
    New arguments: `scheduler_config` for both learning rates by batch, and the `betas` of both Adam optimizers.

    Raises `InputError` for an invalid `ddconfig` and for weights that do not fit.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping | None = None,
        betas: Sequence[float] = FirstStage.betas,
    ):
        super().__init__(ddconfig, lossconfig, embed_dim, image_key, colorize_nlabels, monitor)
        self.scheduler_config, self.betas = scheduler_config, betas
        if not ddconfig.get("double_z", True):
            raise InputError("AutoencoderKL needs ddconfig.double_z: true, its encoder gives means and log-variances")
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Pictures [b, c, h, w] to a Gaussian over latents [b, embed_dim, h/f, w/f]."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(reconstructions, posterior), from a sample of the posterior or from its mode."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def comparison(self, inputs: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        return partial(self.loss, inputs, *self(inputs))

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Tensor], only_inputs: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """`inputs`, their `reconstructions`, and `samples` decoded from N(0, 1) latents."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return self.shown({"inputs": x})
        reconstructions, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.mean))
        return self.shown({"inputs": x, "reconstructions": reconstructions, "samples": samples})


class VQModel(FirstStage):
    """The first stage that encodes a picture as entries of a codebook: VQGAN (arXiv 2012.09841), LDM's arguments.

    `batch_resize_range` (low, high): training pictures are resized to a random multiple of 16 in this range. As
    published, `lr_g_factor` multiplies the learning rate of the discriminator. Raises `InputError` if
    taming-transformers is missing, and as `AutoencoderKL` does.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Mapping | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ):
        super().__init__(ddconfig, lossconfig, embed_dim, image_key, colorize_nlabels, monitor)
        self.n_embed, self.batch_resize_range = n_embed, batch_resize_range
        self.scheduler_config, self.discriminator_factor = scheduler_config, lr_g_factor
        self.quantize = from_taming("vqvae.quantize", "VectorQuantizer2")(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Iterable[str] = ()) -> None:
        super().init_from_ckpt(path, ignore_keys)
        if self.use_ema and self.model_ema.num_updates == 0:  # the file has no averages, so start them at its weights
            self.model_ema = LitEma(self)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this context the model has its averaged weights, if averages are kept."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.parameters())
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(self.parameters())

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """As in all first stages; then update the averages, before any callback saves them."""
        super().training_step(batch, batch_idx)
        if self.use_ema:
            self.model_ema(self)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Pictures [b, c, h, w] to latents [b, embed_dim, h/f, w/f], not yet snapped to the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """(latents [b, embed_dim, h/f, w/f] from the codebook, codebook loss, (.., .., indices))."""
        return self.quantize(self.encode_to_prequant(x))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple:
        """(reconstructions, codebook loss), and the indices of the entries if asked for."""
        quantized, codebook_loss, (_, _, indices) = self.encode(input)
        reconstructions = self.decode(quantized)
        return (reconstructions, codebook_loss, indices) if return_pred_indices else (reconstructions, codebook_loss)

    def get_training_input(self, batch: Mapping[str, Tensor]) -> Tensor:
        x = super().get_training_input(batch)
        if self.batch_resize_range is None:
            return x
        low, high = self.batch_resize_range
        # The largest size first, so that missing memory shows at once.
        size = high if self.batches_seen <= 4 else low + 16 * int(torch.randint(0, (high - low) // 16 + 1, ()))
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")

    def comparison(self, inputs: Tensor) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        reconstructions, codebook_loss, indices = self(inputs, return_pred_indices=True)
        return partial(self.loss, codebook_loss, inputs, reconstructions, predicted_indices=indices)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Logs `val/rec_loss` and all other parts of the loss; `val_ema/...` with the averaged weights."""
        self.validate(batch, "val")
        if self.use_ema:
            with self.ema_scope():
                self.validate(batch, "val_ema")

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], only_inputs: bool = False, plot_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """`inputs` and their `reconstructions`; `reconstructions_ema` with the averaged weights if asked for."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return self.shown({"inputs": x})
        pictures = {"inputs": x, "reconstructions": self(x)[0]}
        if plot_ema:
            with self.ema_scope():
                pictures["reconstructions_ema"] = self(x)[0]
        return self.shown(pictures)


class VQModelInterface(VQModel):
    """VQModel for diffusion models: `encode` stops before the codebook, which `decode` then applies."""

    def encode(self, x: Tensor) -> Tensor:
        """Pictures [b, c, h, w] to latents [b, embed_dim, h/f, w/f], not yet snapped to the codebook."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents to pictures, through the codebook unless told otherwise."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class IdentityFirstStage(nn.Module):
    """The first stage for diffusion in pixels: pictures are their own latents. Takes any arguments."""

    replaces_weights = True  # the autoencoder's weights in a checkpoint of the whole model are left out

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple:
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
