"""A caption that is too long for the text encoder may not lose what is learnt."""

import logging

import pytest

from ldm.errors import InputError
from tests.runs import train

pytestmark = pytest.mark.slow
LONG = " ".join(f"word{i}" for i in range(30))


def test_a_lost_identifier_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not see 'sks' in it"):
        train(tmp_path, "run", "--max_steps", "1", f"data.params.train.params.templates='{LONG} {{}}'")


def test_other_lost_words_are_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    train(tmp_path, "run", "--max_steps", "1", f"data.params.train.params.templates='{{}} {LONG}'")
    assert "captions are too long for the text encoder" in caplog.text
