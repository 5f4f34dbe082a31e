"""The published name of `ldm lora-add`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("lora-add")

if __name__ == "__main__":
    run_command(main)
