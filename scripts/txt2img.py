"""The published name of `ldm txt2img`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("txt2img")

if __name__ == "__main__":
    run_command(main)
