"""The `loss` section of a config and of the command line reaches the model."""

import pytest

from ldm.errors import InputError
from ldm.train.run_config import read_configs
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs/sd-mini/attn2o-ffni.yaml")


def test_it_becomes_part_of_the_model():
    config = read_configs([CONFIG], ["loss.weighting=min_snr", "loss.noise_offset=0.05"], None)
    assert dict(config.model.params.loss) == {"weighting": "min_snr", "noise_offset": 0.05}
    assert "loss" not in config


def test_misspelt_keys_are_refused():
    with pytest.raises(InputError, match="loss.noise_ofset is unknown; did you mean noise_offset"):
        read_configs([CONFIG], ["loss.noise_ofset=0.05"], None)
