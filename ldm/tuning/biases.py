"""Bias-only tuning, BitFit (arXiv 2106.10199)."""

from ldm.tuning.full import ByName


class Biases(ByName):
    """The biases of all layers of the UNet, norms included."""

    def __init__(self) -> None:
        super().__init__(r"^model\..*\.bias$")
