"""Print a config as it is resolved and checked, or the page of all keys that a config may have.

    ldm config configs/sd-mini/attn2o-ffni.yaml data.params.batch_size=2
    ldm config --keys

Later files win over earlier ones, and overrides over all. A misspelt key, a value of another type and an argument that
a target does not take are refused; a key without effect is named on stderr.
"""

from __future__ import annotations

import argparse
import logging

from ldm.cli import Parser
from ldm.errors import InputError

log = logging.getLogger(__name__)


def add_arguments(p: Parser) -> None:
    p.add_argument("words", nargs="*", metavar="YAML | a.b.c=value", help="files, and overrides of what is in them")
    p.add_argument("--keys", action="store_true", help="the page of all keys, docs/configuration.md, instead")


def run(options: argparse.Namespace) -> None:
    from ldm import schema

    if options.keys == bool(options.words):
        raise InputError("name a config, as in ldm config configs/sd-mini/attn2o-ffni.yaml, or ask for --keys alone")
    if options.keys:
        print(schema.page(), end="")
        return
    from omegaconf import OmegaConf

    from ldm.config import check, check_entries, find_file, load_config, merged, override, plain

    overrides = [word for word in options.words if "=" in word and not word.endswith((".yaml", ".yml"))]
    files = [word for word in options.words if word not in overrides]
    if not files:
        raise InputError(f"no config to put {overrides[0]} into: name its file")
    config = override(merged(*(load_config(find_file(file)) for file in files)), overrides)
    content = plain(config)
    check(content)
    check_entries(content)
    for dotted in schema.unused(content):
        log.info("%s has no effect", dotted)
    print(OmegaConf.to_yaml(OmegaConf.create(content)), end="")
