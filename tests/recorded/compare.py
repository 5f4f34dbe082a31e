"""What counts as equal: every bit on the machine of the recording, and elsewhere what another order of sums leaves.

Elsewhere the tolerances are a few times what AVX2 in place of AVX-512 gives on one processor. They are as
narrow as 20 steps allow. AdamW's first steps have the length of the learning rate whatever the size of the gradient: a
weight whose gradient is nothing but rounding goes elsewhere, and so tensors are compared by their largest magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator

LOSS = 2e-3  # of a loss, relative to the largest of its kind
MAGNITUDE = 0.1  # of a tensor's largest magnitude, relative
FLOOR = 2e-3  # of a tensor, absolute: two steps at the usual learning rate
LEVELS = 6  # of 255, of the mean colour of a sixty-fourth of a picture


def unequal(seen: dict, recorded: dict, exact: bool) -> list[str]:
    """What differs, a line each. Metadata may gain keys; nothing else may gain or lose anything."""
    found = [f"{key}: only one of both" for key in seen.keys() ^ recorded.keys()]
    for key in seen.keys() & recorded.keys():
        found += CHECKS[key](seen[key], recorded[key], exact)
    return found


def losses(seen: dict, recorded: dict, exact: bool) -> Iterator[str]:
    for tag in sorted(seen.keys() | recorded.keys()):
        ours, theirs = seen.get(tag, []), recorded.get(tag, [])
        if len(ours) != len(theirs):
            yield f"{tag}: {len(ours)} steps, recorded {len(theirs)}"
            continue
        allowed = 0 if exact else LOSS * max(map(abs, theirs))
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
            if not abs(one - other) <= allowed:
                yield f"{tag}, step {step}: {one:.9g}, recorded {other:.9g}"
                break


def tensors(seen: dict, recorded: dict, exact: bool) -> Iterator[str]:
    for file in sorted(seen.keys() | recorded.keys()):
        ours, theirs = seen.get(file, {}), recorded.get(file, {})
        for name in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(name), theirs.get(name)
            if one is None or other is None:
                yield f"{file}: {name} is {'recorded alone' if one is None else 'new'}"
            elif one[0] != other[0] or (exact and one != other) or not same_size(one[3], other[3]):
                yield f"{file}: {name}: {one}, recorded {other}"


def same_size(one: float, other: float) -> bool:
    return abs(one - other) <= MAGNITUDE * abs(other) + FLOOR


def metadata(seen: dict, recorded: dict, exact: bool) -> Iterator[str]:
    for key, value in recorded.items():
        if not holds(seen.get(key), value):
            yield f"metadata {key}: {seen.get(key)}, recorded {value}"


def holds(seen: object, recorded: object) -> bool:
    """Whether all that was recorded is there, at any depth: mappings may gain keys."""
    if isinstance(seen, dict) and isinstance(recorded, dict):
        return all(key in seen and holds(seen[key], value) for key, value in recorded.items())
    if isinstance(seen, list) and isinstance(recorded, list):
        return len(seen) == len(recorded) and all(map(holds, seen, recorded))
    return seen == recorded


def pictures(seen: list, recorded: list, exact: bool) -> Iterator[str]:
    if len(seen) != len(recorded):
        yield f"{len(seen)} pictures, recorded {len(recorded)}"
        return
    for number, (one, other) in enumerate(zip(seen, recorded, strict=True)):
        levels = max(abs(a - b) for a, b in zip(*(bytes.fromhex(p["means"]) for p in (one, other)), strict=True))
        if one["size"] != other["size"] or levels > (0 if exact else LEVELS) or (exact and one != other):
            yield f"picture {number}: {one['size']}, {levels} grey levels away, recorded {other['size']}"


CHECKS = {"losses": losses, "tensors": tensors, "metadata": metadata, "pictures": pictures}
