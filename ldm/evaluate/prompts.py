"""Prompts for subjects: DreamBooth's two lists of 25 prompts, and the user's own lists.

`{}` stands for the subject ("sks dog"); in the captions that pictures are compared with, it stands for its class
("dog").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError
from ldm.files import read_text

# The prompts of the DreamBooth data set (github.com/google/dreambooth, dataset/prompts_and_classes.txt;
# arXiv 2208.12242, Sec. 4.1): ten scenes and five properties for all subjects, ten more for each of two kinds.
SCENES = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
OF_OBJECTS = (
    "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road",
    "a {} on top of a white rug",
)  # fmt: skip
OF_LIVE_SUBJECTS = (
    "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
)  # fmt: skip
PROPERTIES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")

# For SD-mini, which was trained on captions of two kinds.
MINI = (
    "an emoji of a {}", "an emoji of a {} with sunglasses", "an emoji of a {} on a red background",
    "an emoji of a blue {}", "an emoji of an angry {}", "an emoji of a {} with a santa hat", "a photo of a {}",
    "an emoji of a crying {}",
)  # fmt: skip

LISTS = {
    "object": SCENES + OF_OBJECTS + PROPERTIES,
    "live": SCENES + OF_LIVE_SUBJECTS + PROPERTIES,
    "mini": MINI,
}

# Words that mark a class as living; among DreamBooth's classes "cat" and "dog".
LIVING = frozenset(
    "animal baby bear bird boy cat chicken child cow cub deer dog duck elephant face fish fox frog girl goat goose "
    "hamster hen horse human kid kitten lamb lion lizard man monkey mouse owl panda parrot penguin person pet pig pony "
    "pup puppy rabbit rat rooster sheep snake squirrel tiger turtle wolf woman zebra".split()
)
NOT_LIVING = frozenset("cartoon doll figurine plush plushie statue stuffed toy".split())  # a "stuffed animal"


def is_living(class_word: str) -> bool:
    """Whether a class is living, by its words; "stuffed animal" and "toy dog" are objects, as in the data set."""
    words = set(class_word.lower().replace("-", " ").split())
    return bool(words & LIVING) and not words & NOT_LIVING


def choose_templates(given: str | Sequence[str], class_word: str) -> tuple[str, ...]:
    """The templates for `given`: `auto` (the class decides), a name of `LISTS`, a text file, or templates.

    Raises `InputError` for a file without templates, and for templates without `{}`.
    """
    if not isinstance(given, str):
        return _checked(given, "prompts")
    name = ("live" if is_living(class_word) else "object") if given == "auto" else given
    if name in LISTS:
        return LISTS[name]
    if not Path(name).is_file():
        raise InputError(f"--prompts {name} is no file: expected auto, {', '.join(LISTS)}, or a file of templates")
    return _checked([line.strip() for line in read_text(name).splitlines()], f"--prompts {name}")


def _checked(templates: Sequence[str], source: str) -> tuple[str, ...]:
    found = tuple(template for template in templates if template)
    wrong = [template for template in found if template.count("{}") != 1]
    if not found or wrong:
        what = f"got {wrong[0]!r}" if wrong else "it holds none"
        raise InputError(f"{source}: expected a template per line with {{}} once, for the subject; {what}")
    return found


def filled(templates: Sequence[str], words: str) -> list[str]:
    """The prompts of templates."""
    return [template.replace("{}", words) for template in templates]
