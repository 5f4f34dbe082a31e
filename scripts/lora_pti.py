"""The published name of `ldm lora-pti`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("lora-pti")

if __name__ == "__main__":
    run_command(main)
