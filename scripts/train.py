"""The published name of `ldm fit`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("fit")

if __name__ == "__main__":
    run_command(main)
