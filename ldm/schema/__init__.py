"""Floor 0: what a config may hold, one typed description per section.

The refusals of misspelt keys and wrong types, the texts of `--help` and `docs/configuration.md` come from here.
`python -m ldm.schema docs/configuration.md` writes that page.
"""

from ldm.schema.checking import check, check_part, fits, is_own, select, unused
from ldm.schema.documentation import page
from ldm.schema.kinds import phrase
from ldm.schema.sections import (
    OF_DATASETS,
    Adapter,
    Augment,
    Buckets,
    Captions,
    CaptionSource,
    CheckpointParams,
    Config,
    DreamBooth,
    Embedder,
    Entry,
    Loss,
    Masks,
    Model,
    Monitor,
    Optimizer,
    Schedule,
    Section,
    Trainer,
    Training,
    Tuning,
    says,
)

__all__ = [
    "OF_DATASETS", "Adapter", "Augment", "Buckets", "CaptionSource", "Captions", "CheckpointParams", "Config",
    "DreamBooth", "Embedder", "Entry", "Loss", "Masks", "Model", "Monitor", "Optimizer", "Schedule", "Section",
    "Trainer", "Training", "Tuning", "check", "check_part", "fits", "is_own", "page", "phrase", "says", "select",
    "unused",
]  # fmt: skip
