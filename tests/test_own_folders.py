"""What training here writes, on its way into the files of other programs: all of it arrives, or the command refuses."""

import pytest
import torch

from ldm.interchange import custom_diffusion, embeddings
from ldm.tuning import files
from ldm.util import InputError, instantiate_from_config, load_config
from tests.conftest import ROOT
from tests.test_interchange_scripts import run

torch.set_num_threads(1)


def test_a_concept_of_the_shipped_config_leaves_as_a_delta_and_as_a_word(tmp_path):
    """Its new token is `ModifierTokens`; the run has `<step>-adapters` and last.ckpt, and no other checkpoint."""
    model = instantiate_from_config(load_config(ROOT / "configs/sd-mini/custom-diffusion-addtoken.yaml").model)
    (tmp_path / "checkpoints").mkdir()
    files.save(model, tmp_path / "checkpoints/1-adapters")
    torch.save({"state_dict": model.learning()}, tmp_path / "checkpoints/last.ckpt")
    run("convert", tmp_path / "checkpoints/1-adapters", tmp_path / "delta", "--to", "delta")
    run("convert", tmp_path / "checkpoints/1-adapters", tmp_path / "word.safetensors", "--to", "words")
    run("get_deltas", "--path", tmp_path)
    one, two = (custom_diffusion.read(path) for path in (tmp_path / "delta", tmp_path / "checkpoints/delta_last.ckpt"))
    assert one.weights.keys() == two.weights.keys() and len(one.weights) == 14
    assert all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())
    word = embeddings.read(tmp_path / "word.safetensors")["<new1>"]
    assert torch.equal(word, one.tokens["<new1>"]) and torch.equal(word, two.tokens["<new1>"])
    with pytest.raises(InputError, match="delta_last.ckpt exists"):
        run("get_deltas", "--path", tmp_path)
