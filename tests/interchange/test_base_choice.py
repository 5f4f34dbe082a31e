"""Bases without autoencoder or text encoders, whose parts are given; averaged weights or not, where a base has both."""

import itertools
import json
import logging
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_object, read_weights, save_json, save_safetensors, save_torch
from ldm.commands import Program
from ldm.config import load_config
from ldm.errors import InputError
from ldm.interchange import diffusers_model, diffusers_weights, read_lora
from ldm.interchange.base_choice import Choice
from ldm.interchange.base_files import base_weights, reader
from ldm.interchange.command import skeleton
from ldm.interchange.lora import delta
from ldm.models.bases import EMA, FIRST_STAGE, UNET, is_ignored
from ldm.models.building import build_model
from tests import runs
from tests.conftest import ROOT
from tests.interchange.whole_bases import TEXT

CKPT, CONFIG = ROOT / "models/sd-mini/model.safetensors", ROOT / "configs/sd-mini/inference.yaml"


@pytest.fixture(scope="module", params=TEXT)
def case(request, made):
    return made(request.param)


@pytest.fixture(scope="module")
def v1(made):
    return made("v1")


def autoencoders(case):
    """An autoencoder in every layout in circulation."""
    own, theirs = case.below(FIRST_STAGE), read_weights(case.whole / "vae/diffusion_pytorch_model.safetensors")
    save_torch(case.folder / "kl.ckpt", {"state_dict": {**own, "loss.logvar": torch.ones(1)}})
    return {
        "bare": case.file("bare.safetensors", own),
        "with a loss": str(case.folder / "kl.ckpt"),
        "ldm": case.file("ldm.safetensors", {FIRST_STAGE + name: value for name, value in own.items()}),
        "comfyui": case.file("vae.safetensors", {f"vae.{name}": value for name, value in own.items()}),
        "file of diffusers": case.file("theirs.safetensors", theirs),
        "folder": str(case.whole / "vae"),
        "whole folder": str(case.whole),
        "whole file": case.file("whole.safetensors", case.state),
    }


def texts(case):
    """Text encoders in every layout in circulation: one file or folder for each of them, or one with all."""
    prefixes, folders = TEXT[case.base], ["text_encoder", "text_encoder_2"][: len(TEXT[case.base])]
    return {
        "bare": [case.file(f"{i}.safetensors", case.below(prefix)) for i, prefix in enumerate(prefixes)],
        "ldm": [case.file("all.safetensors", {n: v for n, v in case.state.items() if n.startswith(tuple(prefixes))})],
        "folders": [str(case.whole / name) for name in folders],
        "whole folder": [str(case.whole)],
        "files of transformers": [str(case.whole / name / "model.safetensors") for name in reversed(folders)],
    }


def test_parts_of_every_layout(case, caplog):
    caplog.set_level(logging.INFO)
    vaes, encoders = list(autoencoders(case).values()), list(texts(case).values())
    vaes = vaes if case.base == "v1" else vaes[: len(encoders)]  # they are alike for all bases
    for vae, text in itertools.zip_longest(vaes, encoders, fillvalue=encoders[0]):
        caplog.clear()
        case.assert_whole(case.read(case.unet, vae=vae, text_encoders=tuple(text)))
        assert f"vae of {vae}" in caplog.text and f"of {text[-1]}" in caplog.text


def test_what_transformers_writes(case, tmp_path):
    """The installed version, whose names differ from those of released checkpoints."""
    transformers = pytest.importorskip("transformers")
    for number, name in enumerate(["text_encoder", "text_encoder_2"][: len(TEXT[case.base])]):
        cls = "CLIPTextModelWithProjection" if number else "CLIPTextModel"
        getattr(transformers, cls).from_pretrained(case.whole / name).save_pretrained(tmp_path / name)
    given = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    case.assert_whole(case.read(case.unet, vae=str(case.whole), text_encoders=given))


def test_a_folder_without_parts(case, tmp_path, caplog):
    """As some are published: a UNet with its JSON."""
    shutil.copytree(case.whole, tmp_path / "x", ignore=shutil.ignore_patterns("vae", "text_encoder*"))
    with pytest.raises(InputError, match="x has no autoencoder: give one with --vae FILE_OR_FOLDER"):
        build_model(case.config, tmp_path / "x", read=reader(case.config))
    case.assert_whole(case.read(tmp_path / "x", vae=str(case.whole), text_encoders=(str(case.whole),)))


def test_a_missing_part_is_named_with_its_option(case, tmp_path):
    config = Choice(vae=str(case.whole / "vae")).into(case.config.copy())
    told = "first text encoder" if case.base == "sdxl" else "text encoder"
    with pytest.raises(InputError, match=f"unet.safetensors has no {told}.*: give one with --text_encoder"):
        build_model(config, case.unet, read=reader(config))
    if case.base == "sdxl":
        config = Choice(str(case.whole / "vae"), (str(case.whole / "text_encoder"),)).into(case.config.copy())
        with pytest.raises(InputError, match=r"has no second text encoder \(OpenCLIP bigG\): give one with --text"):
            build_model(config, case.unet, read=reader(config))
    with pytest.raises(InputError, match="it lacks vae, text_encoder.*; give --vae FILE_OR_FOLDER and --text_encoder"):
        diffusers_weights.refuse_parts(read_weights(case.unet), diffusers_model.base_of_layout(case.state), "x")


def test_a_given_part_replaces_the_own_one(v1, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    other = {name: value + 1 for name, value in v1.below(FIRST_STAGE).items()}
    file = v1.file("other.safetensors", other)
    found = v1.read(v1.whole, vae=file)
    assert all(torch.equal(found[FIRST_STAGE + name], value) for name, value in other.items())
    assert "instead of its own" in caplog.text


def test_parts_that_do_not_fit(v1, tmp_path):
    damaged = {**v1.below(FIRST_STAGE), "encoder.conv_in.bias": torch.tensor([torch.nan])}
    small = {name: value[:1] for name, value in v1.below(FIRST_STAGE).items()}
    not_whole = {name: value for name, value in v1.below(FIRST_STAGE).items() if "mid.attn_1.q" not in name}
    for choice, told in (
        ({"vae": v1.file("a.safetensors", small)}, r"does not fit as the vae of this config \(vae: .* has shape \[1"),
        ({"vae": v1.file("b.safetensors", not_whole)}, r"encoder.mid.attn_1.q.weight is not in it, 4 such"),
        ({"vae": str(v1.unet)}, "unet.safetensors holds no autoencoder"),
        ({"vae": v1.file("c.safetensors", damaged)}, "c.safetensors: 1 of .* not finite, e.g. encoder.conv_in.bias"),
        ({"text_encoders": (str(v1.whole / "vae"),)}, "vae holds none of model.safetensors"),
        ({"text_encoders": (v1.file("d.safetensors", small),)}, "d.safetensors holds no text encoder of CLIP"),
        ({"text_encoders": (str(v1.whole), str(v1.whole))}, "it has no text encoder with weights, or all .* already"),
        ({"vae": str(tmp_path / "absent.safetensors")}, "absent.safetensors does not exist"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            v1.read(v1.unet, **choice)


def test_the_json_of_a_part_counts(v1, tmp_path):
    shutil.copytree(v1.whole / "vae", tmp_path / "vae")
    said = json.loads((tmp_path / "vae/config.json").read_text())
    save_json(tmp_path / "vae/config.json", {**said, "scaling_factor": 0.13025})
    with pytest.raises(InputError, match="vae says scaling_factor 0.13025 in vae, and the model of this config has"):
        v1.read(v1.whole, vae=str(tmp_path / "vae"))
    # what the base's own JSON says of a part that is replaced does not count
    shutil.copytree(v1.whole, tmp_path / "base")
    save_json(tmp_path / "base/vae/config.json", {**said, "scaling_factor": 0.13025})
    v1.assert_whole(v1.read(tmp_path / "base", vae=str(v1.whole / "vae")))


# --- averages


def averaged(case):
    """A checkpoint with averages, as CompVis' code writes it."""
    names = [name for name in case.state if name.startswith(UNET)]
    shadows = {EMA + name.removeprefix("model.").replace(".", ""): case.state[name] + 1 for name in names}
    return {**case.state, **shadows, f"{EMA}decay": torch.tensor(0.9), f"{EMA}num_updates": torch.tensor(3)}


@pytest.mark.parametrize("ema", [None, True, False])
def test_averages_of_a_checkpoint(v1, ema, caplog):
    caplog.set_level(logging.INFO)
    found = v1.read(v1.file("ema.safetensors", averaged(v1)), ema=ema)
    assert all(
        torch.equal(found[name], value + (ema is True and name.startswith(UNET))) for name, value in v1.state.items()
    )
    assert any(name.startswith(EMA) for name in found) == (ema is None)
    assert ("averages of training" in caplog.text, "without the average" in caplog.text) == (ema is True, ema is False)


@pytest.mark.parametrize("ema", [None, True, False])
def test_variants_of_a_folder(v1, tmp_path, ema, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(v1.whole, tmp_path / "x")
    file = tmp_path / "x/unet/diffusion_pytorch_model.safetensors"
    save_safetensors(file.with_suffix(".non_ema.safetensors"), {n: v + 1 for n, v in read_weights(file).items()})
    found = v1.read(tmp_path / "x", ema=ema)
    name = UNET + "out.2.weight"
    assert torch.equal(found[name], v1.state[name] + (ema is False))
    assert ("the average of training (EMA)" in caplog.text) == (ema is not None)
    file.unlink()
    with pytest.raises(InputError, match="unet has only weights without the average .*: no --ema yes"):
        v1.read(tmp_path / "x", ema=True)


def test_a_choice_that_a_base_does_not_have(v1, tmp_path):
    for ema in (True, False):
        with pytest.raises(InputError, match=r"unet.safetensors holds one set of weights \(model_ema"):
            v1.read(v1.unet, ema=ema)
        with pytest.raises(InputError, match=r"unet holds one set of weights \(no diffusion_pytorch_model.non_ema"):
            v1.read(v1.whole, ema=ema)
    with pytest.raises(InputError, match="1 averages belong to no weight of the file, e.g. model_ema.x"):
        v1.read(v1.file("lost.safetensors", {**v1.state, f"{EMA}x": torch.ones(1)}), ema=True)


# --- commands


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """SD-mini's UNet alone, and the same with averages."""
    folder, weights = tmp_path_factory.mktemp("mini"), read_weights(CKPT)
    unet = {name: value for name, value in weights.items() if name.startswith(UNET)}
    shadows = {EMA + name.removeprefix("model.").replace(".", ""): 0.5 * value for name, value in unet.items()}
    save_safetensors(folder / "unet.safetensors", unet)
    save_safetensors(folder / "ema.safetensors", {**unet, **shadows})
    return folder


GIVEN = ["--vae", str(CKPT), "--text_encoder", str(CKPT)]


def test_convert(mini, tmp_path):
    Program("convert")([str(mini / "unet.safetensors"), str(tmp_path / "x"), "--to", "diffusers-model", *GIVEN])
    weights, back = read_weights(CKPT), base_weights(tmp_path / "x")
    assert all(torch.equal(back[name], value) for name, value in weights.items() if not is_ignored(name))
    with pytest.raises(InputError, match="lacks vae, text_encoder; give --vae"):
        Program("convert")([str(mini / "unet.safetensors"), str(tmp_path / "y"), "--to", "diffusers-model"])
    Program("convert")([str(mini / "ema.safetensors"), str(tmp_path / "z.ckpt"), "--to", "checkpoint", "--ema", "yes"])
    name = UNET + "out.2.weight"
    found = read_weights(tmp_path / "z.ckpt")
    assert torch.equal(found[name], 0.5 * weights[name]) and not any(key.startswith(EMA) for key in found)
    Program("convert")([str(tmp_path / "z.ckpt"), str(tmp_path / "whole.ckpt"), "--to", "checkpoint", *GIVEN])
    assert read_weights(tmp_path / "whole.ckpt").keys() >= {n for n in weights if not is_ignored(n)}


def test_a_part_is_for_whole_models(tmp_path):
    save_safetensors(tmp_path / "words.safetensors", {"<a>": torch.ones(1, 128)})
    with pytest.raises(InputError, match="--vae, --text_encoder and --ema are for whole models"):
        Program("convert")([str(tmp_path / "words.safetensors"), str(tmp_path / "x"), "--to", "words", *GIVEN])


def test_a_random_base_takes_no_parts(v1, tmp_path):
    from ldm.models.building import choose_checkpoint

    config = Choice(vae="x").into(OmegaConf.merge(v1.config, {"checkpoint": {"path": None, "random_seed": 0}}))
    with pytest.raises(InputError, match="so --vae has no base to act on"):
        choose_checkpoint(config, None)


def test_extraction_takes_either(mini, tmp_path, capsys):
    """The base has no averages; the tuned model has both sets, of which the plain one is the base's."""
    words = ["--rank", "1", "--device", "cpu", "--save_path", str(tmp_path / "x.safetensors")]
    pair = [str(mini / "ema.safetensors"), str(mini / "unet.safetensors"), "--config", str(CONFIG)]
    with pytest.raises(InputError, match="have the same layers: there is nothing to extract"):
        Program("distill")([*pair, *words, "--layers", "all", "--ema", "no"])
    Program("distill")([*pair, *words, "--ema", "yes"])
    assert "layers, rank 1" in capsys.readouterr().out
    lora = read_lora(tmp_path / "x.safetensors", skeleton(CONFIG))
    name = UNET + "middle_block.1.transformer_blocks.0.attn2.to_q"
    change = delta(lora.layers[name])
    assert (change * read_weights(CKPT)[f"{name}.weight"]).sum() < 0  # half of the weights, the other way
    with pytest.raises(InputError, match="unet.safetensors holds one set of weights"):
        Program("distill")([*pair, *words, "--force", "--base_ema", "yes"])


def test_deltas_take_either(mini, tmp_path):
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    embedding = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(3, 2)}
    for ema, factor in (("yes", 0.5), ("no", 1)):
        save_torch(tmp_path / ema / "a.ckpt", {"state_dict": {**read_weights(mini / "ema.safetensors"), **embedding}})
        Program("deltas")(["--path", str(tmp_path / ema), "--ema", ema])
        delta = read_object(tmp_path / ema / "delta_a.ckpt")["state_dict"]
        assert torch.equal(delta[name], factor * read_weights(CKPT)[name])


@pytest.mark.slow
def test_sample(mini, tmp_path):
    drawn = {}
    for name, words in {"whole": [str(CKPT)], "parts": [f"{mini}/unet.safetensors", *GIVEN]}.items():
        Program("sample")([
            "--prompt", "a dog", "--ckpt", *words, "--ddim_steps", "2", "--n_iter", "1", "--device", "cpu",
            "--outdir", str(tmp_path / name), "--skip_grid",
        ])  # fmt: skip
        (picture,) = (tmp_path / name / "samples").glob("*.png")
        drawn[name] = runs.pixels(picture)
    assert (drawn["parts"] == drawn["whole"]).all()


@pytest.mark.slow
def test_training_and_its_resumption_find_the_parts(mini, tmp_path, caplog):
    shutil.copy(CKPT, tmp_path / "parts.safetensors")
    runs.pictures(tmp_path / "photos", 1)
    first = [
        "--base", str(ROOT / "configs/sd-mini/attn2o-ffni.yaml"), "-t", "--actual_resume", f"{mini}/unet.safetensors",
        "--vae", f"{tmp_path}/parts.safetensors", "--text_encoder", f"{tmp_path}/parts.safetensors", "--data_root",
        str(tmp_path / "photos"), "--class_word", "dog", "--logdir", str(tmp_path / "logs"), "-n", "mini",
        "--max_steps", "1", "--accelerator", "cpu", "data.params.reg=null", "lightning.callbacks.image_logger=null",
    ]  # fmt: skip
    runs.main_dream_booth(*first)
    run = runs.find_run(tmp_path, "mini")
    stored = load_config(run / "configs" / "project.yaml").checkpoint
    assert stored.vae == f"{tmp_path}/parts.safetensors" and stored.text_encoder == [stored.vae]
    again = ["-t", "-r", str(run), "--max_steps", "2", "--accelerator", "cpu"]
    runs.main_dream_booth(*again)
    assert (run / "checkpoints/2-adapters").is_dir()
    (tmp_path / "parts.safetensors").unlink()
    with pytest.raises(InputError, match="parts.safetensors does not exist"):
        Program("train")([*again[:3], "--max_steps", "3", "--accelerator", "cpu"])
