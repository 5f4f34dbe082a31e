"""Custom Diffusion's name of `ldm class-pictures`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("class-pictures")

if __name__ == "__main__":
    run_command(main)
