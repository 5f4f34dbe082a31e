"""What training here writes, on its way into the files of other programs: all of it arrives, or the command refuses."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights
from ldm.config import instantiate_from_config, load_config
from ldm.errors import InputError
from ldm.interchange import custom_diffusion, embeddings
from ldm.interchange.formats import open_file
from ldm.tuning import files
from tests.conftest import ROOT
from tests.interchange_models import run

torch.set_num_threads(1)
MINI = ROOT / "configs/sd-mini"
LORA = {"target": "ldm.tuning.lora.LoRA", "params": {"rank": 2}}
KEYS = {"target": "ldm.tuning.cross_attention.CrossAttention"}
WORD = {"target": "ldm.tuning.textual_inversion.TextualInversion", "params": {"words": "<sks>"}}
NORMS = {"target": "ldm.tuning.norms.Norms"}


def test_a_concept_of_the_shipped_config_leaves_as_a_delta_and_as_a_word(tmp_path):
    """Its new token is `ModifierTokens`; the run has `<step>-adapters` and last.ckpt, and no other checkpoint."""
    model = instantiate_from_config(load_config(MINI / "custom-diffusion-addtoken.yaml").model)
    (tmp_path / "checkpoints").mkdir()
    files.save(model, tmp_path / "checkpoints/1-adapters")
    torch.save({"state_dict": model.trainable_parameters()}, tmp_path / "checkpoints/last.ckpt")
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


def written(folder, *families, config="inference"):
    """A folder that holds these families beside the position adapters of a config."""
    config = load_config(MINI / f"{config}.yaml")
    config.model.params.tuning = list(families)
    files.save(instantiate_from_config(config.model), folder)
    return folder


@pytest.mark.parametrize(
    ("config", "families", "to", "message"),
    [
        ("attn2o-ffni", [LORA], "kohya", "holds 1 position adapters, which no LoRA file can hold"),
        ("attn2o-ffni", [KEYS], "delta", "holds 1 position adapters, which no delta can hold"),
        ("inference", [LORA, WORD, NORMS], "kohya", r"tunes more than LoRA and words \(ldm.tuning.norms.Norms\)"),
        ("inference", [WORD], "kohya", "holds words and no LoRA; write them with --to words"),
        ("inference", [KEYS, WORD, LORA], "delta", r"tunes more than weights of the cross-attention \(.*lora_A"),
    ],
)
def test_nothing_is_left_out_without_a_word(tmp_path, config, families, to, message):
    pytest.importorskip("peft", reason="peft, which trains LoRA here, is not installed")
    folder, output = written(tmp_path / "own", *families, config=config), tmp_path / "x"
    with pytest.raises(InputError, match=message):
        run("convert", folder, output, "--to", to, "--config", MINI / "inference.yaml")
    assert not output.exists()


def test_merged_adapters_do_not_lose_the_words_beside_them(tmp_path):
    folders = [written(tmp_path / name, WORD, config="attn2o-ffni") for name in "ab"]
    for given in (folders, folders[:1]):
        with pytest.raises(InputError, match=r"more than position adapters \(textual-inversion\), .* --adapter_scale"):
            run("merge_adapters", *given, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("shape", [(), (3,), (2, 128), (1, 1, 128)])
def test_vectors_of_words_of_another_shape_are_refused(tmp_path, shape):
    from ldm.modules.folders import read_folder, write_folder

    held = read_folder(written(tmp_path / "own", WORD, config="inference"))
    told = {name: value for name, value in held.config.items() if name != "files"}
    write_folder(tmp_path / "other", told, held.adapters, {name: torch.zeros(shape) for name in held.tuned})
    with pytest.raises(InputError, match="other is damaged: its 1 tensors are not the 1 vectors of its words"):
        run("inspect_adapter", tmp_path / "other")


def test_the_config_of_the_run_serves(tmp_path):
    """Without --config, of the saved folder and of the run itself, whose latest step it is then."""
    pytest.importorskip("peft", reason="peft, which trains LoRA here, is not installed")
    folder = tmp_path / "run"
    saved = written(folder / "checkpoints/10-adapters", LORA)
    shutil.copytree(saved, folder / "checkpoints/2-adapters")
    (folder / "configs").mkdir()
    OmegaConf.save(load_config(MINI / "lora-attention.yaml"), stored := folder / "configs/project.yaml")
    assert open_file(folder).path == saved
    for source, to in ((saved, "kohya"), (folder, "kohya"), (folder, "diffusers")):
        run("convert", source, tmp_path / f"{source.name}-{to}", "--to", to)
    one, two = (read_weights(tmp_path / name) for name in ("10-adapters-kohya", "run-kohya"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    # a run from elsewhere chooses no code
    stored.write_text(stored.read_text().replace("ldm.models.diffusion.ddpm.LatentDiffusion", "os.system"))
    with pytest.raises(InputError, match="asks for 'os.system'"):
        run("convert", folder, tmp_path / "x", "--to", "kohya")
    shutil.rmtree(folder / "configs")
    for to in ("kohya", "diffusers"):
        with pytest.raises(InputError, match="config's model has no layer .* name the config of the base .* --config"):
            run("convert", saved, tmp_path / "x", "--to", to)
    run("convert", saved, tmp_path / "x", "--to", "kohya", "--config", MINI / "inference.yaml")
    with pytest.raises(InputError, match="10-adapters is no whole model; ldm lora-add"):
        run("convert", saved, tmp_path / "y", "--to", "checkpoint")


def test_a_whole_model_tells_its_base(tmp_path):
    run("convert", ROOT / "models/sd-mini/model.safetensors", tmp_path / "folder", "--to", "diffusers-model")
    run("convert", tmp_path / "folder", tmp_path / "back.safetensors", "--to", "checkpoint")
    one, two = read_weights(ROOT / "models/sd-mini/model.safetensors"), read_weights(tmp_path / "back.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
