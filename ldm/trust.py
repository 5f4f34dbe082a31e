"""Floor 0: what files that the user did not write may have imported.

A file is data: what it names is looked up in a table of ours. The user's own command line may add to it
(`--allow_family`), and so may packages that are installed (the entry points `ldm.families`).
"""

from __future__ import annotations

import site
import sysconfig
from functools import cache
from importlib import metadata
from pathlib import Path

GROUP = "ldm.families"

# Families that the command line names with --allow_family; `ldm.cli.Parser` sets it anew for each command.
allowed_families: list[str] = []


def installed_families() -> dict[str, str]:
    """The entry points `ldm.families` of installed packages: name -> dotted target.

    Only what lies in the interpreter's own folders of packages counts: a `*.dist-info` in the working directory, beside
    a script or on PYTHONPATH is not installed.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions(path=_package_folders()):
        for entry in distribution.entry_points.select(group=GROUP):
            found.setdefault(entry.name, entry.value.partition("[")[0].strip().replace(":", "."))
    return found


@cache
def _package_folders() -> list[str]:
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        named.append(site.getusersitepackages())
    return list(dict.fromkeys(str(Path(folder).resolve()) for folder in named))
