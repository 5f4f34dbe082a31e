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
        described = describe(path)
        if options.json:
            print(json.dumps(described, default=str))
            continue
        print(described.pop("path"))
        for key, value in described.items():
            lines = value if isinstance(value, list) and key in ("routes", "families") else [value]
            if isinstance(value, dict):
                lines = [f"{name}: {text}" for name, text in value.items()]
            print("\n".join(f"  {key if i == 0 else '':24} {line}" for i, line in enumerate(lines)))
