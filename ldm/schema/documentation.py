"""The page of docs/ that lists all sections and their keys."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from ldm.schema.kinds import phrase
from ldm.schema.sections import (
    Adapter,
    AdapterConfig,
    Augment,
    Buckets,
    Captions,
    Checkpoint,
    CheckpointParams,
    Config,
    Data,
    DataParams,
    DreamBooth,
    Embedder,
    Lightning,
    Masks,
    Model,
    ModelCheckpoint,
    Monitor,
    Trainer,
    Training,
    Tuning,
)  # fmt: skip

PAGE = (
    (Config, "Top level"), (Model, "model"), (Tuning, "model.params.tuning"),
    (AdapterConfig, "adapter_config"), (Adapter, "entries of adapter_config"),
    (Embedder, "entries of emb_models"), (Data, "data"),
    (DataParams, "data.params"), (Captions, "captions of a dataset"), (Buckets, "buckets of a dataset"),
    (Masks, "masks of a dataset"), (Augment, "augment of a dataset"),
    (Lightning, "lightning"), (Trainer, "lightning.trainer"),
    (ModelCheckpoint, "lightning.modelcheckpoint"), (CheckpointParams, "lightning.modelcheckpoint.params"),
    (Monitor, "lightning.monitor"), (DreamBooth, "dreambooth"), (Training, "training"), (Checkpoint, "checkpoint"),
)  # fmt: skip

BEGINNING = """\
# Configuration

This page is generated from `ldm/schema/sections.py`: `python -m ldm.schema docs/configuration.md`.

A config is a YAML file. `defaults:` names files that are merged first; mappings are merged, lists are replaced. Then
come overrides of the command line: `model.base_learning_rate=1e-4 data.params.batch_size=2`. An entry of a list is
named by its number, from 0: `model.params.tuning.0.params.rank=8`. `tuning.0.params.rank=8` is short for the same.

A key that is not in these tables, and an argument that a `target` does not take, is refused with the nearest right one.
So is a value of another type. Keys of your own may stand at the top level if they begin with `x_` or `_`.
"""


def page() -> str:
    """`docs/configuration.md`."""
    parts = [BEGINNING]
    for section, title in PAGE:
        rows = [
            f"| `{name}` | {phrase(field.annotation, field.metadata)} | {_default(field)} | {field.description} |"
            for name, field in section.model_fields.items()
        ]
        text = " ".join((section.__doc__ or "").split())
        head = ["| key | value | default | |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"## {title}\n", text, "", *head, *rows]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.default
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"
