"""The published name of `ldm img2img`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("img2img")

if __name__ == "__main__":
    run_command(main)
