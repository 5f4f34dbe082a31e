"""Attacks on the programs: hostile files, mutated configs and folders, kills, full disks, signals, concurrent runs.

`python -m tests.campaign` runs all of them and prints a table; `test_campaign.py` runs a few with every `make test`.
"""
