"""The summary of a sweep in words. Every sentence is made from the numbers; nothing is said that they do not say."""

from __future__ import annotations

from scipy import stats

from ldm.evaluate.intervals import Interval
from ldm.study.report.facts import Facts, less_is_better

UNITS = ((3600, "h"), (60, "min"), (1, "s"))


def sentences(facts: Facts) -> list[str]:
    """What a reader should know first."""
    found = [best(facts), size(facts), *lead(facts), *front(facts), *agreement(facts), *unfinished(facts), cost(facts)]
    return [sentence for sentence in found if sentence]


def size(facts: Facts) -> str:
    """How much was run."""
    counts = [
        plural(len(facts.last), "trial"),
        f"of {plural(len(facts.configs), 'config')}",
        f"on {plural(facts.last['subject'].nunique(), 'subject')}",
        f"with {plural(facts.last['seed'].nunique(), 'seed')}",
    ]
    text = f"{' '.join(counts)} ended with a score."
    if failed := facts.failed["key"].nunique():
        text += f" {plural(failed, 'trial')} failed; the table has the reasons."
    if stopped := int((facts.last["status"] == "stopped").sum()):
        text += f" {plural(stopped, 'trial')} {'was' if stopped == 1 else 'were'} stopped early."
    return text


def best(facts: Facts) -> str:
    """The first and the last config."""
    first, last, metric = facts.configs[0], facts.configs[-1], facts.fidelity
    way = "lowest" if less_is_better(metric) else "highest"
    text = f"{first.label} has the {way} {metric}: {value(first.means[metric])} over {plural(first.trials, 'trial')}"
    if first is last:
        return f"{text}."
    other = "highest" if less_is_better(metric) else "lowest"
    return f"{text}; {last.label} the {other}, {value(last.means[metric])}."


def lead(facts: Facts) -> list[str]:
    """Whether the best config is shown to be better than the next."""
    if len(facts.configs) < 2:
        return []
    first, second = facts.configs[:2]
    ahead = facts.paired(first, second)
    if ahead is None:
        return []
    what = f"Over the same subjects and seeds ({ahead.n}) {first.label} differs from {second.label} by {value(ahead)}"
    if ahead.low is None or ahead.high is None:
        return [f"{what}: one pair, from which nothing follows."]
    if ahead.low <= 0 <= ahead.high:
        return [f"{what}: the interval contains 0, so that neither is shown to be better."]
    warning = "" if len(facts.configs) == 2 else (
        f" It is the best of {len(facts.configs)} by these same numbers, so that its lead is likely to be smaller."
    )  # fmt: skip
    return [f"{what}.{warning}"]


def front(facts: Facts) -> list[str]:
    """The configs that no other one beats in both."""
    names = [one.label for one in facts.front]
    if len(facts.configs) < 2 or not names:
        return []
    if len(names) == 1:
        return [f"{names[0]} has both the best {facts.fidelity} and the lowest {facts.drift}."]
    return [
        f"No config is better in {facts.fidelity} and in {facts.drift} at once than {len(names)} of them: "
        f"{listed(names)}."
    ]


def agreement(facts: Facts) -> list[str]:
    """Whether other networks rank the configs alike."""
    kind = facts.fidelity.rpartition("_")[2]  # clip_i, efficientnet_i: one question to several networks
    others = [name for name in facts.metrics if name != facts.fidelity and "_prior_" not in name and
              (name.endswith(f"_{kind}") or kind == "i" and name == "dino")]  # fmt: skip
    found = []
    for other in others:
        both = [(one.means[facts.fidelity].mean, one.means[other].mean) for one in facts.configs if other in one.means]
        if len(both) < 4 or any(len(set(side)) < 2 for side in zip(*both, strict=True)):
            continue
        rank = stats.spearmanr(*zip(*both, strict=True)).statistic
        found.append(
            f"The order of the {len(both)} configs by {other}, another network, has a rank correlation of "
            f"{signed(rank)} with that by {facts.fidelity}."
        )
    return found


def unfinished(facts: Facts) -> list[str]:
    """Configs that were still improving."""
    rising, known = [], 0
    for one in facts.configs:
        steps = sorted(one.curves[facts.fidelity].items())
        if len(steps) > 1:
            known += 1
            (_, before), (_, after) = steps[-2:]
            change = before.mean - after.mean if less_is_better(facts.fidelity) else after.mean - before.mean
            rising += [one.label] if change > 0 else []
    if not known:
        return []
    return [f"Between the last two checkpoints {facts.fidelity} improved for {len(rising)} of {known} configs."]


def cost(facts: Facts) -> str:
    """Time, memory, what learns."""
    parts = []
    if facts.seconds is not None:
        median = duration(float(facts.last["seconds"].median()))
        parts.append(f"A trial took {median} (median), all of them {duration(facts.seconds)}")
    counts = sorted({one.parameters for one in facts.configs if one.parameters is not None})
    if counts:
        spread = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        parts.append(f"{spread} parameters learnt")
    return "; ".join(parts) + "." if parts else ""


def value(interval: Interval, digits: int = 3) -> str:
    """A mean with its interval, with a real minus sign."""
    text = signed(interval.mean, digits)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} [{signed(interval.low, digits)}, {signed(interval.high, digits)}]"


def signed(number: float, digits: int = 3) -> str:
    text = f"{number:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Seconds as people say them: `4.2 min`."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
