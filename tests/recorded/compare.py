"""What counts as equal: every bit on the machine of the recording, and elsewhere what another order of sums leaves.

AVX2 in place of AVX-512 on one processor moved losses by 7e-7 at most, tensors by 2e-7 and no mean colour by a grey
level. The tolerances are some thirty times that, and one grey level, for other processors and libraries. A learning
rate or a weight of a loss that is off by a tenth, or a guidance scale that is off by a fifth, lies outside them. Two
kinds of cases need more, see `TOLERANCES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Tolerance(NamedTuple):
    """How far a number may be from the recorded one."""

    loss: float = 2e-5  # relative to the largest of its kind
    tensor: float = 1e-3  # of a tensor's mean and largest magnitude, relative to that magnitude
    floor: float = 1e-5  # of the same, absolute
    levels: int = 1  # of 255, of the mean colour of a sixty-fourth of a picture


EXACT = Tolerance(0, 0, 0, 0)
# Softmax takes no notice of the bias of its keys, whose gradient is rounding: AdamW makes whole steps of that.
KEY_BIASES = Tolerance(tensor=0.1, floor=1e-2)
TOLERANCES = {
    "train-autoencoder": KEY_BIASES,
    "train-clip": KEY_BIASES,
    "half-precision-base": Tolerance(loss=1e-2, tensor=0.1, floor=2e-3, levels=6),  # AVX2 moved a loss by 2e-3
}


def tolerance(name: str, exact: bool) -> Tolerance:
    """That of the case `name`."""
    return EXACT if exact else TOLERANCES.get(name, Tolerance())


def unequal(seen: dict, recorded: dict, allowed: Tolerance) -> list[str]:
    """What differs, a line each. Metadata may gain keys and runs may log more; nothing else may gain or lose."""
    found = [f"{key}: only one of both" for key in seen.keys() ^ recorded.keys()]
    for key in seen.keys() & recorded.keys():
        found += CHECKS[key](seen[key], recorded[key], allowed)
    return found


def losses(seen: dict, recorded: dict, allowed: Tolerance) -> Iterator[str]:
    for tag, theirs in sorted(recorded.items()):
        ours = seen.get(tag, [])
        if len(ours) != len(theirs):
            yield f"{tag}: {len(ours)} steps, recorded {len(theirs)}"
            continue
        limit = allowed.loss * max(map(abs, theirs), default=0)
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
            if not abs(one - other) <= limit:
                yield f"{tag}, step {step}: {one:.9g}, recorded {other:.9g}"
                break


def tensors(seen: dict, recorded: dict, allowed: Tolerance) -> Iterator[str]:
    for file in sorted(seen.keys() | recorded.keys()):
        ours, theirs = seen.get(file, {}), recorded.get(file, {})
        for name in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(name), theirs.get(name)
            if one is None or other is None:
                yield f"{file}: {name} is {'recorded alone' if one is None else 'new'}"
            elif one[0] != other[0] or (allowed == EXACT and one != other) or not near(one, other, allowed):
                yield f"{file}: {name}: {one}, recorded {other}"


def near(one: list, other: list, allowed: Tolerance) -> bool:
    """Whether means and largest magnitudes agree."""
    limit = allowed.tensor * abs(other[3]) + allowed.floor
    return all(abs(a - b) <= limit for a, b in zip(one[2:], other[2:], strict=True))


def metadata(seen: dict, recorded: dict, allowed: Tolerance) -> Iterator[str]:
    for key, value in (recorded if allowed == EXACT else without_digests(recorded)).items():
        if not holds(seen.get(key), value):
            yield f"metadata {key}: {seen.get(key)}, recorded {value}"


def without_digests(value: Any) -> Any:
    """Metadata without the digests of files, which tell every bit of their tensors."""
    if isinstance(value, dict):
        return {key: without_digests(inner) for key, inner in value.items() if key != "sha256"}
    return [without_digests(inner) for inner in value] if isinstance(value, list) else value


def holds(seen: object, recorded: object) -> bool:
    """Whether all that was recorded is there, at any depth: mappings may gain keys."""
    if isinstance(seen, dict) and isinstance(recorded, dict):
        return all(key in seen and holds(seen[key], value) for key, value in recorded.items())
    if isinstance(seen, list) and isinstance(recorded, list):
        return len(seen) == len(recorded) and all(map(holds, seen, recorded))
    return seen == recorded


def pictures(seen: list, recorded: list, allowed: Tolerance) -> Iterator[str]:
    if len(seen) != len(recorded):
        yield f"{len(seen)} pictures, recorded {len(recorded)}"
        return
    for number, (one, other) in enumerate(zip(seen, recorded, strict=True)):
        levels = max(abs(a - b) for a, b in zip(*(bytes.fromhex(p["means"]) for p in (one, other)), strict=True))
        if one["size"] != other["size"] or levels > allowed.levels or (allowed == EXACT and one != other):
            yield f"picture {number}: {one['size']}, {levels} grey levels away, recorded {other['size']}"


CHECKS = {"losses": losses, "tensors": tensors, "metadata": metadata, "pictures": pictures}
