"""The published name of `ldm sample`, and the place from which users import the loader of models."""

from ldm.cli import run_command
from ldm.commands import Program
from ldm.util import load_model_from_config

__all__ = ["load_model_from_config", "main"]
main = Program("sample")

if __name__ == "__main__":
    run_command(main)
