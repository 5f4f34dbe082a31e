"""The families of attack, a file each, in the order of the table."""

from tests.campaign import adapter_folders, concurrent, configs, disks, hostile, kills, readers, run_folders, signals

FAMILIES = [
    module.FAMILY
    for module in (readers, hostile, configs, adapter_folders, run_folders, kills, disks, signals, concurrent)
]
