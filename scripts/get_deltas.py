"""The published name of `ldm deltas`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("deltas")

if __name__ == "__main__":
    run_command(main)
