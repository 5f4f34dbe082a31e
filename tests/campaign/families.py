"""The families of attack, a file each, in the order of the table."""

from tests.campaign import adapter_folders, configs, kills

FAMILIES = [module.FAMILY for module in (configs, adapter_folders, kills)]
