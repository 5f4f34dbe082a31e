"""Tell what is in a file or folder: kind, routes, layers, ranks, words, size, norms, base.

    ldm inspect logs/<run>/checkpoints/500-adapters some_lora.safetensors
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser, add_allow_family


def add_arguments(p: Parser) -> None:
    p.add_argument("paths", nargs="+", metavar="PATH")
    add_allow_family(p)
    p.add_argument("--json", action="store_true", help="one JSON object per file")


def run(options: argparse.Namespace) -> None:
    import json

    from ldm.interchange.inspection import describe

    for path in options.paths:
        about = describe(path)
        if options.json:
            print(json.dumps(about, default=str))
            continue
        print(about.pop("path"))
        for key, value in about.items():
            lines = value if isinstance(value, list) and key in ("routes", "families") else [value]
            if isinstance(value, dict):
                lines = [f"{name}: {told}" for name, told in value.items()]
            print("\n".join(f"  {key if i == 0 else '':24} {line}" for i, line in enumerate(lines)))
