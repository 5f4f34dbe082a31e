"""Several concepts of one tuned model, each scored alone: Custom Diffusion's evaluation (2212.04488, section 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.data.custom import read_concepts
from ldm.errors import InputError
from ldm.evaluate.prompts import choose_templates
from ldm.evaluate.runs import Question


def questions(question: Question, path: str | Path) -> list[Question]:
    """A question for each concept of a `concepts_list` file, with its photographs, words and prompts.

    Besides the keys of training, an entry may have `prompts`: a file of templates, a name of `prompts.LISTS`, or a list
    of templates. Raises `InputError`, also for prompts that cannot be read, before anything is drawn.
    """
    return [_of_concept(question, entry, number) for number, entry in enumerate(read_concepts(path, ("prompts",)), 1)]


def _of_concept(question: Question, entry: Mapping[str, Any], number: int) -> Question:
    class_word, caption = entry.get("reg_caption"), str(entry["caption"])
    found = re.search(rf"(\S+)\s+{re.escape(class_word)}\b", caption) if isinstance(class_word, str) else None
    if found is None:
        raise InputError(
            f"concept {number}: its class must be named (reg_caption or class_prompt) and stand in its caption behind "
            f"its word, as in '<new1> cat' and cat; got {caption!r} and {class_word!r}"
        )
    prompts = entry.get("prompts", question.protocol.prompts)
    prompts = tuple(map(str, prompts)) if isinstance(prompts, list) else str(prompts)
    protocol = replace(question.protocol, prompts=choose_templates(prompts, class_word), identifier=found[1])
    keep = question.keep and question.keep / f"{number}-{class_word.replace(' ', '-')}"
    return replace(
        question, protocol=protocol, data_root=entry["datapath"], class_word=class_word, identifier=found[1], keep=keep
    )
