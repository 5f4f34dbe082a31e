"""The sections of a config, each a typed description of its keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

UNUSED = "unused; accepted because older YAML files have it"
OWN_PREFIXES = ("x_", "_")  # top-level keys that begin so are the user's own

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def says(default: Any, text: str) -> Any:
    """A field with its default and its description."""
    return Field(default, description=text)


class Section(BaseModel):
    """A mapping that has these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class Entry(Section):
    """Something to build: a class and the arguments that it is called with."""

    target: str | None = says(None, "dotted name of a class or function")
    params: dict[str, Any] | None = says(None, "its arguments, by name; what it does not take is refused")


class Model(Entry):
    """`model`: the model, and how fast it learns."""

    base_learning_rate: Positive | None = says(None, "learning rate of what has none of its own")


AtLeast0Real = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Tuning(Entry):
    """An entry of `model.params.tuning`: a family of tuning."""

    family: str | None = says(None, "name of a shipped family, such as lora, instead of a target")
    learning_rate: Positive | None = says(None, "learning rate of this family (default: that of the model)")
    steps: list[AtLeast0 | None] | None = says(None, "[first, end]: the steps in which it learns; end: null for no end")
    weight_decay: AtLeast0Real | None = says(None, "weight decay of this family (default: that of the optimizer)")
    rate_from: list[float] | None = says(None, "[step, learning rate]: from that step on this rate, times the schedule")


class Loss(Section):
    """`loss`: what a training step draws and how it weighs errors, as docs/loss.md explains it."""

    type: Literal["l2", "l1", "huber", "smooth_l1"] | None = says(None, "measure of errors (default: the model's, l2)")
    huber_c: Annotated[float, Field(gt=0, lt=1)] = says(0.1, "where huber and smooth_l1 turn from square to straight")
    huber_schedule: Literal["constant", "exponential", "snr"] = says("snr", "how that falls with the time step")
    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased"] = says("none", "weights of the time steps")
    gamma: Positive = says(5.0, "gamma of min_snr and soft_min_snr")
    noise_offset: AtLeast0Real = says(0.0, "noise of a channel as a whole, so that brightness is learnt; usual: 0.05")
    pyramid_noise: Annotated[float, Field(gt=0, lt=1)] | None = says(None, "discount of coarser noise; usual: 0.3")
    pyramid_levels: AtLeast1 = says(6, "how many times the noise of pyramid_noise is coarsened")
    input_perturbation: AtLeast0Real = says(0.0, "noise that is added and not to be predicted; usual: 0.1")
    timesteps: list[AtLeast0 | None] | None = says(None, "[first, end]: the time steps that are drawn, end excluded")
    timestep_sampling: Literal["uniform", "logit_normal"] = says("uniform", "how time steps are drawn")
    logit_mean: Finite = says(0.0, "mean of logit_normal; below 0: earlier time steps, with less noise")
    logit_std: Positive = says(1.0, "standard deviation of logit_normal")
    prior_weights: list[list[AtLeast0Real]] | None = says(None, "[[step, weight], ...] of the class pictures, linear")


class Optimizer(Section):
    """`optimizer`: a name, or what is below. Names: docs/optimizers.md."""

    name: str | None = says(None, "adamw, adamw8bit, prodigy, lion, adafactor, schedulefree_adamw, muon, ...")
    params: dict[str, Any] | None = says(None, "arguments of the optimizer, beside the learning rate")
    rates: dict[str, Positive | str] | None = says(None, "{pattern of parameter names: learning rate, or x16: factor}")


class Schedule(Section):
    """`schedule`: how the learning rate goes over the steps; a name, or what is below."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = says(
        "constant", "the way down after the warm-up"
    )
    warmup: AtLeast0 = says(0, "steps over which the rate grows from 0")
    steps: AtLeast1 | None = says(None, "where the way down ends (default: max_steps)")
    cycles: AtLeast1 = says(1, "how often cosine_with_restarts goes down")
    power: Positive = says(1.0, "of polynomial")
    end: AtLeast0Real = says(0.0, "factor at the end")


class Embedder(Entry):
    """An entry of `emb_models` of a `GeneralConditioner`: an embedder and the key of the batch that it reads."""

    input_key: str | None = says(None, "key of the batch that it reads")
    input_keys: list[str] | None = says(None, "the same for an embedder of several")
    is_trainable: bool = says(False, "whether it learns")
    ucg_rate: Annotated[float, Field(ge=0, le=1)] = says(0.0, "how often its answer is dropped, for guidance")
    legacy_ucg_value: Any = says(None, "what then takes the place of its input (default: zeros in place of its answer)")


class Adapter(Section):
    """An entry of `adapter_config`: where an adapter reads and writes, and what it is."""

    type: Literal["inout"] = says("inout", "the only type there is")
    din: str | None = says(None, "position that it reads; required")
    dout: str | None = says(None, "position that it writes; required")
    mid_dim: AtLeast1 | None = says(None, "width of the bottleneck; required")
    method: str = says("default", "activation: default (relu), sig, silu, ident")
    scale: Finite = says(1.0, "factor of what it adds")
    init: str = says("zero", "zero: an untrained adapter changes nothing; default: the published random start")
    form: str | None = says(None, "what computes it (default: mlp in transformer blocks, conv in residual ones)")


class AdapterConfig(Section):
    """`model.params.unet_config.params.adapter_config`: one entry or a list of them for each kind of block."""

    transformer_adp_config: list[Adapter] | Adapter | None = says(None, "adapters of transformer blocks")
    resblock_adp_config: list[Adapter] | Adapter | None = says(None, "adapters of residual blocks")


class Data(Entry):
    """`data`: what shows the pictures; usually `ldm.train.datamodule.DataModuleFromConfig`."""


class DataParams(Section):
    """`data.params` of `ldm.train.datamodule.DataModuleFromConfig`: data sets, and how many pictures make a batch."""

    batch_size: AtLeast1 | None = says(None, "pictures per batch and process; required for training")
    num_workers: AtLeast0 | None = says(None, "processes that read (default: twice the batch size, at most all cores)")
    train: Entry | list[Entry] | None = says(None, "what is learnt; a list: concepts learnt together")
    train2: Entry | None = says(None, "a second concept (Custom Diffusion's name for it)")
    reg: Entry | None = says(None, "pictures of the class, for prior preservation; null for none")
    validation: Entry | None = says(None, "pictures for val/loss")
    test: Entry | None = says(None, "pictures for the loss at the end; --no-test leaves it out")
    num_val_workers: AtLeast0 | None = says(None, UNUSED)
    wrap: bool = says(False, UNUSED)
    seed: AtLeast0 = says(0, "seed of the order of draws; programs set that of the run")


class Trainer(Section):
    """`lightning.trainer`: options of Lightning's Trainer. Each is also an option of the command line."""

    accelerator: str = says("auto", "cpu, gpu, mps, auto")
    devices: int | str | list[int] = says("auto", "how many of them, or which: 2 or 0,3")
    num_nodes: AtLeast1 = says(1, "machines of a cluster")
    strategy: str = says("auto", "ddp, fsdp, ...")
    precision: int | str | None = says(None, "32, bf16-mixed, 16-mixed, ...")
    max_steps: Annotated[int, Field(ge=-1)] = says(-1, "optimizer steps")
    max_epochs: Annotated[int, Field(ge=-1)] | None = says(None, "passes over the data")
    accumulate_grad_batches: AtLeast1 = says(1, "batches per optimizer step")
    log_every_n_steps: AtLeast0 | None = says(None, "steps between logged losses (default 10)")
    min_epochs: AtLeast0 | None = says(None, "passes over the data before anything may stop the run")
    min_steps: AtLeast0 | None = says(None, "optimizer steps before anything may stop the run")
    max_time: str | dict[str, int] | None = says(None, "days:hours:minutes:seconds, or {hours: 2}")
    limit_train_batches: int | float | None = says(None, "batches of an epoch, or a share of them")
    limit_val_batches: int | float | None = says(None, "batches of a validation, or a share of them")
    limit_test_batches: int | float | None = says(None, "batches of the test, or a share of them")
    limit_predict_batches: int | float | None = says(None, UNUSED)
    overfit_batches: int | float = says(0.0, "train and validate on so many batches alone")
    val_check_interval: int | float | str | dict[str, int] | None = says(None, "batches between validations, or share")
    check_val_every_n_epoch: AtLeast1 | None = says(1, "epochs between validations")
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None = says(None, "validation before training (default 0)")
    gradient_clip_val: Annotated[float, Field(ge=0)] | None = says(None, "largest norm or value of gradients")
    gradient_clip_algorithm: Literal["norm", "value"] | None = says(None, "what gradient_clip_val bounds (norm)")
    deterministic: bool | Literal["warn"] | None = says(None, "deterministic kernels alone")
    benchmark: bool | None = says(None, "let cuDNN choose the fastest kernels")
    detect_anomaly: bool = says(False, "find the operation that gave NaN; slow")
    fast_dev_run: bool | int = says(False, "a few batches of everything, without saving")
    profiler: str | None = says(None, "simple, advanced, pytorch")
    inference_mode: bool = says(True, "validate under inference_mode instead of no_grad")
    sync_batchnorm: bool = says(False, "batch norms over all processes")
    reload_dataloaders_every_n_epochs: AtLeast0 = says(0, "make the loaders anew")
    enable_checkpointing: bool | None = says(None, "leave it out: runs save by themselves")
    enable_progress_bar: bool | None = says(None, "show progress")
    default_root_dir: str | None = says(None, "where Lightning writes what has no place of its own")
    barebones: bool = says(False, "Lightning without what costs time; refused together with callbacks")
    enable_autolog_hparams: bool = says(True, "let loggers record hyper-parameters")
    model_registry: str | None = says(None, "Lightning's registry of models")
    logger: Any = says(None, "set by the run; name one under lightning.logger")
    callbacks: Any = says(None, "set by the run; name them under lightning.callbacks")
    plugins: Any = says(None, "set by the run")
    enable_model_summary: Any = says(None, "set by the run")
    use_distributed_sampler: Any = says(None, "set by the run")
    gpus: int | str | list[int] | None = says(None, "these GPUs, with DDP if several, as --gpus: 0, or 0,3")


class CheckpointParams(Section):
    """`lightning.modelcheckpoint.params`."""

    every_n_train_steps: AtLeast1 | None = says(500, "optimizer steps between checkpoints")
    every_n_minutes: Positive | None = says(None, "minutes after which a checkpoint is due, too")
    total_limit: AtLeast1 | None = says(None, "how many <step>-adapters are kept, the newest (default: all)")
    monitor: Any = says(None, UNUSED)
    mode: Any = says(None, UNUSED)
    save_top_k: Any = says(None, UNUSED)
    save_last: Any = says(None, UNUSED)
    save_weights_only: Any = says(None, UNUSED)
    verbose: Any = says(None, UNUSED)
    dirpath: Any = says(None, UNUSED)
    filename: Any = says(None, UNUSED)
    auto_insert_metric_name: Any = says(None, UNUSED)
    every_n_epochs: Any = says(None, UNUSED)


class ModelCheckpoint(Section):
    """`lightning.modelcheckpoint`: how often a run saves."""

    params: CheckpointParams | None = says(None, "see below")
    target: str | None = says(None, UNUSED)


class Monitor(Section):
    """`lightning.monitor`: a metric of validation that stops the run or chooses its best weights."""

    metric: str = says("val/loss", "name of a logged value")
    mode: Literal["min", "max"] = says("min", "whether lower or higher values are better")
    min_delta: AtLeast0Real = says(0.0, "what counts as an improvement")
    early_stopping: AtLeast1 | None = says(None, "end the run after so many values without improvement")
    save_best: bool = says(False, "keep the best weights in checkpoints/best-adapters")


class Lightning(Section):
    """`lightning`: how the run goes."""

    trainer: Trainer | None = says(None, "options of Lightning's Trainer")
    callbacks: dict[str, Entry | None] | None = says(None, "{any name: {target, params}}; null takes one out again")
    modelcheckpoint: ModelCheckpoint | None = says(None, "how often a run saves")
    monitor: Monitor | None = says(None, "early stopping, and keeping the best weights")
    logger: Literal["tensorboard", "csv", "wandb", "mlflow"] | Entry | None = says(
        None, "where numbers and pictures go, by name or as a target (default: TensorBoard in the run's folder)"
    )
    find_unused_parameters: bool | None = says(None, UNUSED)


class Training(Section):
    """`training`: options of a run of `ldm fit`. An option of the command line wins."""

    seed: Seed = says(23, "seed of everything random")
    scale_lr: bool = says(False, "multiply the learning rate by processes, batch size and accumulation")
    keep_memory: bool = says(True, "on a CPU, keep what a step frees for the next one")


Probability = Annotated[float, Field(ge=0, le=1)]
CaptionSource = Literal["auto", "txt", "metadata", "filename", "folder", "template"]


class Captions(Section):
    """`captions` of a dataset: where captions are from, and how they vary; a source, or what is below. docs/data.md."""

    source: CaptionSource = says("auto", "auto takes the first that has any: txt, metadata, kohya's folder, template")
    ext: str | list[str] | None = says(None, "endings of caption files (default: .txt, .caption)")
    shuffle_tags: bool = says(False, "show the tags of a caption in another order each time")
    keep_tags: AtLeast0 = says(0, "so many tags stay in front, and are never dropped")
    tag_dropout: Probability = says(0.0, "how often each other tag is left out")
    separator: str = says(",", "what stands between tags")
    dropout: Probability = says(0.0, "how often a caption is empty, for guidance without a classifier")
    prefix: str = says("", "words before every caption that is read")
    suffix: str = says("", "words after every caption that is read")


class Buckets(Section):
    """`buckets` of a dataset: true, or what is below. docs/data.md."""

    step: AtLeast1 | None = says(None, "sides are multiples of it (default: 64, or a quarter of a smaller size)")
    min: AtLeast1 | None = says(None, "shortest side (default: half of size)")
    max: AtLeast1 | None = says(None, "longest side (default: twice the size)")
    upscale: bool = says(True, "false: smaller pictures are not enlarged, and have buckets of their own")


MaskSource = Literal["auto", "alpha", "label", "folder"]


class Masks(Section):
    """`masks` of a dataset: where masks that weigh the loss are from; a source, or what is below. docs/data.md."""

    source: MaskSource = says("auto", "label: dog-masklabel.png; folder: mask/dog.png; alpha: the picture's; auto: any")
    rest: Probability = says(0.1, "weight of the loss where the mask is black; white has 1")


class Augment(Section):
    """`augment` of a dataset: random changes of pictures at each draw. docs/data.md."""

    brightness: Probability = says(0.0, "largest change; usual: 0.1")
    contrast: Probability = says(0.0, "largest change; usual: 0.1")
    saturation: Probability = says(0.0, "largest change; usual: 0.1")
    hue: Annotated[float, Field(ge=0, le=0.5)] = says(0.0, "largest change, as a share of the circle; usual: 0.02")
    grey: Probability = says(0.0, "how often a picture has no colours")
    zoom: Annotated[float, Field(ge=1, le=8)] = says(1.0, "a random part of the picture, enlarged up to so many times")


class DreamBooth(Section):
    """`dreambooth`: options of a run of `ldm train`. An option of the command line wins."""

    class_word: str | None = says(None, "what the subject is, e.g. dog; needed with class pictures")
    class_scale: Finite = says(7.5, "guidance scale of sampled class pictures: the higher, the less varied")
    seed: Seed = says(23, "seed of everything random")
    scale_lr: bool = says(False, "multiply the learning rate by processes, batch size and accumulation")
    keep_memory: bool = says(True, "on a CPU, keep what a step frees for the next one")
    cache: str = says("memory", "encode pictures and captions once, before training: memory, off or a folder")
    base_precision: Literal["fp32", "bf16", "fp16"] = says("fp32", "of the frozen UNet; what learns is kept in fp32")
    base: str | None = says(None, "checkpoint of the base model (default: the one that the config names)")
    data_root: str | None = says(None, "folder with photographs of the subject")
    reg_data_root: str | None = says(None, "folder with pictures of its class, for prior preservation")
    captions: CaptionSource | Captions | None = says(None, "captions of the photographs, see data.*.params.captions")
    words: str | None = says(None, "file of learnt words to add to the text encoder")
    delta: str | None = says(None, "a Custom Diffusion delta to begin at (published: --delta-ckpt)")
    concepts: list[dict[str, str | None]] | None = says(None, "Custom Diffusion: datapath, caption, ... of each")


class Checkpoint(Section):
    """`checkpoint`: the base weights."""

    path: str | None = says(None, ".ckpt or .safetensors file of the base model")
    random_seed: AtLeast0 | None = says(None, "where that file is absent: start from random weights of this seed")
    vae: str | None = says(None, "file or folder of an autoencoder, instead of the base's own")
    text_encoder: str | list[str] | None = says(None, "file or folder of a text encoder, or several, as vae")
    ema: bool | None = says(None, "of a base with both: the average of its training, or its last weights")


class Config(Section):
    """The top level of a config. A key of your own begins with `x_` or `_`; any other is refused."""

    defaults: str | list[str] | None = says(None, "files to merge first, relative to this one; later ones win")
    model: Model | None = says(None, "the model")
    data: Data | None = says(None, "the pictures")
    lightning: Lightning | None = says(None, "how the run goes")
    checkpoint: Checkpoint | None = says(None, "the base weights")
    optimizer: str | Optimizer | None = says(None, "the optimizer, by name; the same as model.params.optimizer_config")
    schedule: str | Schedule | None = says(None, "the learning rate over the steps; as model.params.scheduler_config")
    loss: Loss | None = says(None, "what a step draws and how errors are weighed; the same as model.params.loss")
    concepts: list[dict[str, Any]] | None = says(None, "folders of pictures; as data.params.train.params.concepts")
    dreambooth: DreamBooth | None = says(None, "options of a run of ldm train")
    training: Training | None = says(None, "options of a run of ldm fit")


# Arguments of data sets that are sections.
OF_DATASETS: dict[str, Any] = {
    "captions": CaptionSource | Captions | None, "buckets": bool | Buckets | None,
    "masks": MaskSource | Masks | None, "augment": Augment | None,
}  # fmt: skip

# Sections below the parameters of a target.
DEEPER = {
    "model.params.tuning": list[Tuning] | Tuning | None,
    "model.params.unet_config.params.adapter_config": AdapterConfig | None,
    "model.params.loss": Loss | None,
    "model.params.network_config.params.adapter_config": AdapterConfig | None,
    "model.params.conditioner_config.params.emb_models": list[Embedder] | None,
    "data.params": DataParams | None,
    **{
        f"data.params.{dataset}.params.{name}": kind
        for dataset in ("train", "reg", "validation") for name, kind in OF_DATASETS.items()
    },
    # a list: the texts of `ldm.data.simple.TextOnly`
    "data.params.validation.params.captions": CaptionSource | Captions | list[str] | None,
}  # fmt: skip
DATA_TARGET = "ldm.train.datamodule.DataModuleFromConfig"
