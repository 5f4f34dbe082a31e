"""An earlier name of `ldm custom-diffusion`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("custom-diffusion")

if __name__ == "__main__":
    run_command(main)
