"""The published name of `ldm sample-diffusion`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("sample-diffusion")

if __name__ == "__main__":
    run_command(main)
