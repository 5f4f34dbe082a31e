"""The published name of `ldm cache-latents`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("cache-latents")

if __name__ == "__main__":
    run_command(main)
