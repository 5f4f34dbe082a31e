"""The published name of `ldm train-many`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("train-many")

if __name__ == "__main__":
    run_command(main)
