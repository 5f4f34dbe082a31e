"""Custom Diffusion's earlier name of `ldm compose` for models of diffusers."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("compose")

if __name__ == "__main__":
    run_command(main)
