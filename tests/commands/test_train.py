"""`ldm fit`, also as scripts/train.py: any model from its config, with a test set at the end."""

import pytest

from ldm.errors import InputError
from scripts.train import main
from tests.conftest import ROOT
from tests.runs import TINY, events, find_run, pictures

pytestmark = pytest.mark.slow


def arguments(work, *more):
    """The tiny model from scratch for one step, with a test set and no other validation."""
    photos = pictures(work / "photos", 2)
    sets = f"{{target: ldm.data.dreambooth.PersonalizedBase, params: {{data_root: {photos}, size: 32, set: test}}}}"
    words = ["--base", TINY, "--logdir", work / "logs", "--accelerator", "cpu", "--max_steps", 1]
    changes = [f"data.params.train.params.data_root={photos}", f"data.params.test={sets}"]
    return [str(word) for word in [*words, *changes, "data.params.reg=null", "data.params.validation=null", *more]]


def test_the_test_set_is_gone_through_unless_told_otherwise(tmp_path):
    main(arguments(tmp_path, "-t", "-n", "tested"))
    main(arguments(tmp_path, "-t", "-n", "untested", "--no-test"))
    tested, untested = (events(find_run(tmp_path, name)).Tags()["scalars"] for name in ("tested", "untested"))
    assert "val/loss_simple" in tested and "val/loss_simple" not in untested


def test_without_t_nothing_is_trained(tmp_path, capsys):
    main(arguments(tmp_path, "-n", "run"))
    assert "nothing trained: add -t to train in" in capsys.readouterr().out and not (tmp_path / "logs").exists()


def test_a_config_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="no training set: name its class with data.params.train.target="):
        main(["--base", str(ROOT / "configs/autoencoder/autoencoder_kl_32x32x4.yaml"), "-l", str(tmp_path)])


@pytest.mark.parametrize(
    "override,message",
    [
        ("model.params.ddconfig.bysitting=1", "unexpected keyword argument 'bysitting'"),
        ("model.params.lossconfig={atrget: torch.nn.Identity}", "lossconfig.atrget is unknown; did you mean target"),
        ("model.params.embed_dmi=4", "unknown embed_dmi; did you mean embed_dim"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_without_t(tmp_path, override, message):
    words = ["--base", "configs/autoencoder/autoencoder_kl_64x64x3.yaml", "--logdir", str(tmp_path), override]
    words += ["data.target=ldm.train.datamodule.DataModuleFromConfig", "data.params.batch_size=1"]
    words += ["data.params.train.target=ldm.data.dreambooth.PersonalizedBase", "data.params.train.params.data_root=x"]
    with pytest.raises(InputError, match=message):
        main(words)
    assert not list(tmp_path.iterdir())
