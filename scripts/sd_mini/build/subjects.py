"""The held-out subjects as folders of PNG files, as a user of DreamBooth would bring them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.data.captioned import compose, draw_backgrounds, uniforms
from scripts.sd_mini.build.drawings import Drawing, read_picture
from scripts.sd_mini.build.packages import PACKAGES
from scripts.sd_mini.build.splits import SUBJECTS

SIZES = {"noto": 64, "twemoji": 64}  # these exist in no larger size; all others are drawn anew at 128


def write_subjects(folder: str | Path, chosen: Iterable[tuple[Drawing, str]]) -> None:
    """Write each subject's poses to `<folder>/<name>/*.png`, before varied backgrounds, with `subject.json` beside.

    chosen: drawings with their splits, as `split_drawings` returns them.
    """
    chosen = list(chosen)
    for subject in SUBJECTS:
        package, target = PACKAGES[subject.style], Path(folder) / subject.name
        target.mkdir(parents=True, exist_ok=True)
        poses = [drawing for drawing, split in chosen if split == f"subject:{subject.name}"]
        size = SIZES.get(subject.style, 128)
        uniform = uniforms(sum(subject.name.encode()), torch.arange(len(poses)), 16)
        backgrounds, _ = draw_backgrounds(uniform, size)
        for pose, background in zip(poses, backgrounds, strict=True):
            picture = compose(torch.from_numpy(read_picture(pose.path, size).copy()), background)
            pixels = ((picture + 1) * 127.5).round().numpy().astype(np.uint8)
            slug = "".join(c if c.isalnum() else "_" for c in pose.emoji.name)
            Image.fromarray(pixels).save(target / f"{slug}.png", optimize=True)
        about = {
            "class_word": subject.class_word,
            "style": subject.style,
            "licence": package.licence,
            "credit": package.credit,
            "source": f"npm {package.name} {package.version}; put before plain, graded and patterned backgrounds",
        }
        (target / "subject.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
