"""The published name of `ldm merge`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("merge")

if __name__ == "__main__":
    run_command(main)
