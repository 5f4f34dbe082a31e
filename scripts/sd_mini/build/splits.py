"""The drawings that the base never sees: DreamBooth subjects, things known in another style, unknown things.

A design is held out as a whole: where one family draws it in several finishes, none of them is left in `train`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scripts.sd_mini.build.drawings import Drawing

GESTURES = r"{0}|{0} (frowning|pouting|bowing|facepalming|shrugging|(gesturing|tipping|raising|getting) \w+)"
CLOCKS = r".*(o'clock|thirty)"
MOON = r"(?!.*ceremony|moon cake).*\bmoon\b.*"
HANDS = r"hand-(fingers-.*|single-finger)"
# Signs, letters and groups of people: a caption hardly says what they look like.
SYMBOLS = (
    r"family|person.*|alphanum|keycap|arrow|geometric|.*-(symbol|sign)|punctuation|math|warning|gender|religion|zodiac"
)
CAT = r"cat|cat face|.*\bcat\b.*(?<!black cat)"


@dataclass(frozen=True)
class Subject:
    """One character of one vendor. `names` and `groups` are whole-match patterns; `tone` the words of its skin tone."""

    name: str
    class_word: str
    style: str
    names: str = ".*"
    groups: str = ".*"
    tone: str = ""

    def shows(self, drawing: Drawing) -> bool:
        """Whether the drawing is one of the subject's poses, apart from its style."""
        emoji = drawing.emoji
        return (
            emoji.tone == self.tone
            and re.fullmatch(self.names, emoji.name) is not None
            and re.fullmatch(self.groups, emoji.group) is not None
        )


SUBJECTS = (
    Subject("noto_cat", "cat", "noto", CAT, "cat-face|animal-mammal"),
    Subject("openmoji_cat", "cat", "openmoji", CAT, "cat-face|animal-mammal"),
    Subject("twemoji_monkey", "monkey", "twemoji", r".*monkey.*"),
    Subject("noto_woman", "woman", "noto", GESTURES.format("woman"), tone="dark"),
    Subject("twemoji_woman", "woman", "twemoji", GESTURES.format("woman"), tone="medium"),
    Subject("openmoji_woman", "woman", "openmoji", GESTURES.format("woman")),
    Subject("fluent_man", "man", "fluent", GESTURES.format("man"), tone="medium dark"),
    Subject("noto_hand", "hand", "noto", groups=HANDS, tone="dark"),
    Subject("openmoji_face", "face", "openmoji", groups=r"face-(?!costume).*"),
    Subject("fluent_clock", "clock", "fluent", CLOCKS),
    Subject("fluent_moon", "moon", "fluent", MOON, "sky & weather"),
    Subject("fluent_cloud", "cloud", "fluent", r".*\bcloud\b.*", "sky & weather"),
)


def split_drawings(
    drawings: Iterable[Drawing], subjects: Iterable[Subject] = SUBJECTS, known: int = 96, unseen: int = 32
) -> list[tuple[Drawing, str]]:
    """Each drawing with its split: `train`, `val_known`, `val_unseen` or `subject:<name>`.

    known: so many things have one family's drawing held out, while at least two others stay in training.
    unseen: so many things are held out in every style. Things of a subject's class take no part in either.
    A subject's pose in a further finish of its family belongs to no split and is left out.
    """
    drawings, subjects = list(drawings), list(subjects)
    family_of = {drawing.style: drawing.family for drawing in drawings}
    never, elsewhere = held_out(drawings, subjects, known, unseen)
    result = []
    for drawing in drawings:
        owner = next((s for s in subjects if family_of.get(s.style) == drawing.family and s.shows(drawing)), None)
        name = drawing.emoji.name
        if owner is not None and drawing.style != owner.style:
            continue
        if owner is not None:
            split = f"subject:{owner.name}"
        elif name in never:
            split = "val_unseen"
        else:
            split = "val_known" if elsewhere.get(name) == drawing.family else "train"
        result.append((drawing, split))
    return result


def held_out(
    drawings: Sequence[Drawing], subjects: Sequence[Subject], known: int, unseen: int
) -> tuple[set[str], dict[str, str]]:
    """The things of `val_unseen`, and those of `val_known` with the family whose drawings of them are held out.

    At least three families draw each of them, without skin tones; none is a flag or a sign. The choice depends on the
    names alone.
    """
    families: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        families[drawing.emoji.name].add(drawing.family)
    toned = {d.emoji.name for d in drawings if d.emoji.tone}
    posed = {d.emoji.name for d in drawings if any(subject.shows(d) for subject in subjects)}
    groups = {d.emoji.name: d.emoji.group for d in drawings}
    things = [n for n, g in groups.items() if "flag" not in g and re.fullmatch(SYMBOLS, g) is None]
    free = [n for n in things if len(families[n]) > 2 and n not in toned | posed]
    free.sort(key=_shuffled)
    elsewhere = {
        name: min(families[name], key=lambda family: _shuffled(f"{name} by {family}"))
        for name in free[unseen : unseen + known]
    }
    return set(free[:unseen]), elsewhere


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
