"""From names to natural English: what a picture shows, of which class it is, and the captions that say so.

No caption may contain an identifier that DreamBooth binds to a subject: the text encoder must not know it.
"""

from __future__ import annotations

import re

from scripts.sd_mini.build.emoji import Emoji

IDENTIFIERS = ("sks", "zwx", "new1")

# Unicode's names are not all noun phrases; these are said otherwise.
SAID = {
    "rolling on the floor laughing": "face rolling on the floor laughing", "star struck": "star struck face",
    "exploding head": "face with exploding head", "dizzy": "dizzy star", "locked": "closed padlock",
    "unlocked": "open padlock", "warning": "warning sign", "radioactive": "radioactive sign",
    "biohazard": "biohazard sign", "prohibited": "prohibited sign", "information": "information sign",
    "copyright": "copyright sign", "registered": "registered sign", "trade mark": "trade mark sign",
    "breast feeding": "woman breast feeding", "litter in bin sign": "litter bin sign",
    "infinity": "infinity sign", "link": "chain link", "mate": "mate drink",
    "collision": "collision bang", "bust in silhouette": "person in silhouette",
    "busts in silhouette": "people in silhouette", "ok hand": "hand saying ok",
    "non potable water": "non potable water sign", "potable water": "potable water sign", "foggy": "foggy city",
    "high voltage": "high voltage sign", "luggage": "suitcase", "construction": "construction barrier",
    "direct hit": "dart board",
}  # fmt: skip
# Names without an article: masses, exclamations, proper names.
BARE = set(
    (
        "bacon, bread, baguette bread, flatbread, stuffed flatbread, cooked rice, curry rice, shaved ice, ice, sake, "
        "butter, salt, candy, broccoli, garlic, popcorn, fondue, falafel, sushi, oden, custard, spaghetti, coral, "
        "thumbs up, thumbs down, camping, cooking, wood, soap, yarn, thread, dna, om, zzz, baseball, softball, "
        "basketball, volleyball, lacrosse, ice hockey, field hockey, bowling, tennis, ping pong, badminton, fog, "
        "green salad, leafy green, canned food, bubble tea, mount fuji, santa claus, mrs claus, mx claus, dashing "
        "away, passport control, customs, baggage claim, left luggage, palms up together, pouring liquid, glass"
    ).split(", ")
)
PLURALS = ("people", "men", "women", "dango", "french")
PERSONS = "woman man person boy girl child baby".split()
CLASSES = {
    "cat-face": "cat", "monkey-face": "monkey", "heart": "heart", "country-flag": "flag", "subdivision-flag": "flag",
    "flag": "flag", "arrow": "arrow", "zodiac": "zodiac sign", "animal-bird": "bird", "animal-bug": "bug",
    "animal-mammal": "animal", "animal-marine": "sea animal", "animal-reptile": "reptile", "plant-flower": "flower",
    "plant-other": "plant", "food-fruit": "fruit", "food-vegetable": "vegetable", "food-prepared": "dish",
    "food-asian": "dish", "food-sweet": "dessert", "drink": "drink", "place-building": "building",
    "place-religious": "building", "transport-ground": "vehicle", "transport-water": "boat", "tool": "tool",
    "musical-instrument": "musical instrument", "award-medal": "medal", "keycap": "keycap", "av-symbol": "button",
    "hand-fingers-open": "hand", "hand-fingers-partial": "hand", "hand-single-finger": "hand",
    "hand-fingers-closed": "hand", "hands": "hands", "family": "family", "book-paper": "book", "computer": "computer",
    "phone": "phone",
}  # fmt: skip
HEADS = "cat dog monkey clock moon cloud horse pig cow tiger rabbit mouse bear dragon robot book mailbox".split()
# Names whose head or group would give a class that they do not belong to.
CLASSLESS = set(
    (
        "love letter, hot dog, moon cake, moon viewing ceremony, mahjong red dragon, mouse trap, computer mouse, "
        "brick, rock, wood, wedding, bus stop, station, oil drum, fuel pump, wheel, police car light, horizontal "
        "traffic light, vertical traffic light, stop sign, construction, motorway, railway track, anchor, ring buoy, "
        "feather, wing, paw prints, pig nose, spider web, microbe, couch and lamp, man's shoe, woman's clothes, sheaf "
        "of rice, label"
    ).split(", ")
)


def article(noun: str) -> str:
    """With its article: "a grinning cat", "an orange book", "eyes"."""
    first = noun.split()[0]
    head = re.split(r" (?:with|of|in|on|over|at|and|facing|holding|showing|without|from) ", noun)[0]
    plural = head.endswith("s") and not head.endswith(("ss", "us", "is", "os", "'s")) and first not in PERSONS
    if plural or noun in BARE or first in PLURALS or re.match(r"no |the |skis$", noun):
        return noun
    vowel = re.match(r"[aeiou]|hour|x-ray", noun) and not re.match(r"uni|use|util|eu|ewe|one\b", noun)
    return f"{'an' if vowel else 'a'} {noun}"


def phrase(emoji: Emoji) -> str:
    """What the emoji shows, as a noun phrase with its article and skin tone: "a woman shrugging with dark skin"."""
    name = re.sub(r"[^a-z0-9' -]", "", emoji.name).strip()
    if emoji.group in ("country-flag", "subdivision-flag"):
        return "the flag of " + name.removeprefix("flag ")
    if emoji.group == "zodiac":
        return f"the zodiac sign {name}"
    if re.search(r"o'clock|thirty$", name):
        return f"a clock showing {name}"
    if name == "keycap":
        return "a keycap with a symbol"
    if match := re.fullmatch(r"keycap (\d+)", name):
        return f"a keycap with the number {match[1]}"
    if match := re.fullmatch(r"(family|kiss|couple with heart),? ((?:(?:man|woman|boy|girl|adult|child),? ?)+)", name):
        members = [article(member) for member in match[2].replace(",", "").split()]
        together = ", ".join(members[:-1]) + " and " + members[-1]
        return {"family": "a family of ", "kiss": "a kiss of ", "couple with heart": "a heart and a couple of "}[
            match[1]
        ] + together
    if match := re.fullmatch(r"(man|woman|person) (bald|beard|(?:\w+) hair)", name):
        who = f"bald {match[1]}" if match[2] == "bald" else f"{match[1]} with {match[2]}"
        name = who.replace("with beard", "with a beard")
    said = article(SAID.get(name, name))
    return f"{said} with {emoji.tone} skin" if emoji.tone else said


def class_word(emoji: Emoji) -> str | None:
    """The class a DreamBooth user would name for it, e.g. "cat", "woman"; None where there is no common one."""
    if emoji.name in CLASSLESS:
        return None
    words = re.sub(r"[^a-z ]", " ", emoji.name).split()
    if emoji.group.startswith("person"):
        return next((word for word in words if word in PERSONS), "person")
    if re.search(r"o'clock|thirty$", emoji.name):
        return "clock"
    if emoji.group.startswith("face-") and "face" in words:
        return "face"
    return next((word for word in HEADS if word in words), CLASSES.get(emoji.group))


def keyword_phrase(emoji: Emoji) -> str | None:
    """Two keywords which the name does not contain, "cute, pet"; None if there are not so many."""
    told = set(emoji.name.split())
    fit = [k for k in emoji.keywords if re.fullmatch(r"[a-z]{3,12}", k) and k not in told and k not in IDENTIFIERS]
    return ", ".join(fit[:2]) if len(fit) > 1 else None


def drawing_captions(emoji: Emoji, style: str) -> list[str]:
    """Captions of one drawing, from precise with the style's name to the bare class."""
    shown, kind, keywords = phrase(emoji), class_word(emoji), keyword_phrase(emoji)
    captions = [
        f"an emoji of {shown}, {style} style",
        f"{shown}, {style} style",
        f"a drawing of {shown} in {style} style",
        f"an emoji of {shown}",
        f"a picture of {shown}",
        shown,
    ]
    if keywords:
        captions.append(f"an emoji of {shown}, {keywords}, {style} style")
    if kind:
        captions += [f"an emoji of {article(kind)}, {style} style", f"an emoji of {article(kind)}"]
    return captions


def photo_captions(names: tuple[str, ...]) -> list[str]:
    """Captions of one photograph whose subject goes by any of `names`, e.g. ("airplane", "plane")."""
    patterns = ("a photo of {}", "a photograph of {}", "a small photo of {}", "{}, photo", "a picture of {}")
    return [pattern.format(article(name)) for name in names for pattern in patterns]
