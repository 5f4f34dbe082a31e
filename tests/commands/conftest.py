"""A short run, which the tests of training and of sampling look at."""

from types import SimpleNamespace

import pytest

from tests.runs import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of 24 steps, the command that made it, and its adapters."""
    work = tmp_path_factory.mktemp("trained")
    every = [
        "lightning.modelcheckpoint.params.every_n_train_steps=12",
        "lightning.callbacks.image_logger.params.batch_frequency=24",
    ]
    run = train(work, "run", "--max_steps", 24, "data.params.batch_size=2", "model.base_learning_rate=0.03", *every)
    return SimpleNamespace(work=work, run=run, adapters=run / "checkpoints" / "24-adapters")
