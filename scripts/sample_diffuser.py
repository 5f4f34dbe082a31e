"""Custom Diffusion's earlier name of `ldm sample` for models of diffusers."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("sample")

if __name__ == "__main__":
    run_command(main)
