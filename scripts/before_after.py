"""The published name of `ldm before-after`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("before-after")

if __name__ == "__main__":
    run_command(main)
