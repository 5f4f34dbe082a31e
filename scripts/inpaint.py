"""The published name of `ldm inpaint`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("inpaint")

if __name__ == "__main__":
    run_command(main)
