"""A folder of captioned pictures, as kohya, OneTrainer and diffusers train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.captions import kohya_name
from ldm.data.dreambooth import PersonalizedBase


class CaptionedFolder(PersonalizedBase):
    """The pictures of one folder, each with its own captions. Sample k depends only on (`seed`, k).

    Items are those of `PersonalizedBase`, whose other arguments it takes too.

    captions: see `ldm.data.captions`; repeats: how often an epoch shows each picture (default: the number in a folder's
    name such as `10_sks dog`, else 1); templates: for pictures without a caption, with `{}` for the identifier and the
    class word. Raises `InputError` for a picture without a caption if there are no templates.
    """

    def __init__(
        self,
        data_root: str | Path,
        size: int = 512,
        captions: str | Mapping | None = "auto",
        repeats: int | None = None,
        templates: str | Sequence[str] | None = None,
        **more: Any,
    ) -> None:
        if repeats is None:
            repeats, _ = kohya_name(Path(data_root)) or (1, "")
        captions = "auto" if captions is None else captions
        super().__init__(data_root, size, captions=captions, repeats=repeats, templates=templates, **more)
