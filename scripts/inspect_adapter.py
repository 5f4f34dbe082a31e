"""The published name of `ldm inspect`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("inspect")

if __name__ == "__main__":
    run_command(main)
