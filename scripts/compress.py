"""The published name of `ldm compress`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("compress")

if __name__ == "__main__":
    run_command(main)
