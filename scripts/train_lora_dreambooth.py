"""The published name of `ldm lora-dreambooth`."""

from ldm.cli import run_command
from ldm.commands import Program

main = Program("lora-dreambooth")

if __name__ == "__main__":
    run_command(main)
