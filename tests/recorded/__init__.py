"""Numbers that a change of the code must not change: losses, tuned weights and pictures of one seed.

    python -m tests.recorded.record              # record everything anew
    python -m tests.recorded.record plms lora    # record the cases whose names contain one of these words

`cases.py` says what is run, `machine.py` on what a recording was made, `compare.py` what counts as equal. A recording
is made anew only by a commit that means to change numbers and says so. Everything here uses commands, config targets
and files alone, so that the code behind them can move.
"""
