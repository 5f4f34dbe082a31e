"""The published name of `ldm convert`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("convert")

if __name__ == "__main__":
    run_command(main)
