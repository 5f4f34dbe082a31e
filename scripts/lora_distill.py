"""The published name of `ldm distill`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("distill")

if __name__ == "__main__":
    run_command(main)
