"""Every family on tiny models of Stable Diffusion 2.x, SDXL and inpainting: trained, resumed, loaded, sampled."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoints import read_weights, save_safetensors
from ldm.config import load_config, unet_params
from ldm.data.dreambooth import PersonalizedBase
from ldm.data.masked import MaskedPictures, random_mask
from ldm.errors import InputError
from ldm.interchange import embeddings, own
from ldm.models.building import build_model, untuned
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.tokens import load_words, readers, teach
from ldm.tuning import files
from tests import runs
from tests.helpers import assert_close_to
from tests.small_bases import narrow

pytestmark = pytest.mark.slow

FOLDERS = {"sd2": "sd2-inject-dreambooth", "sdxl": "sdxl-inject-dreambooth", "inpaint": "sd-inpaint-dreambooth"}
CASES = [
    *(("sd2", name) for name in ("attn2o-ffni", "custom-diffusion", "textual-inversion", "lora-attention")),
    *(("sdxl", name) for name in ("attn2o-ffni", "custom-diffusion", "textual-inversion", "lora-attention")),
    ("inpaint", "attn2o-ffni"), ("inpaint", "lora-attention"),
]  # fmt: skip


RESUMED = ("attn2o-ffni", "textual-inversion")  # elsewhere only words and adapters differ from base to base


def learnt(run):
    return {name: value for name, value in runs.last(run)["state_dict"].items() if name != "scale_factor"}


@pytest.mark.parametrize(("base", "name"), CASES, ids=lambda value: value)
def test_a_family_goes_through_the_whole_loop(base, name, tmp_path):
    config = narrow(f"{FOLDERS[base]}/{name}.yaml", tmp_path)
    more = ["--init_word", "dog"] if name == "textual-inversion" else []
    whole = runs.train(tmp_path, "whole", *more, "--max_steps", 2, config=config)
    if name in RESUMED:
        part = runs.train(tmp_path, "part", *more, "--max_steps", 1, config=config)
        runs.resume(part, "--max_steps", "2")
        assert learnt(whole).keys() == learnt(part).keys()
        for key, value in learnt(whole).items():
            assert torch.equal(value, learnt(part)[key]), key

    folder = whole / "checkpoints" / "2-adapters"
    plain, tuned = (base_model(config) for _ in range(2))
    files.load(tuned, folder)
    words = [word for encoder in readers(tuned).values() for word in encoder.new_tokens.words]
    assert bool(words) == (name in ("custom-diffusion", "textual-inversion"))
    prompt = f"photo of a {words[0] if words else 'sks'} dog"
    assert not torch.equal(answer(plain, "photo of a dog"), answer(tuned, prompt))
    if words:
        file = tmp_path / "word.safetensors"
        held = own.words(folder)
        embeddings.write_diffusers(file, held)
        assert set(read_weights(file)) == ({"clip_l", "clip_g"} if base == "sdxl" else set(held))


def base_model(config):
    """The base of a config, without what its training tunes."""
    config = untuned(load_config(config))
    config.model.params.pop("train_level", None)
    OmegaConf.select(config, unet_params(config)).pop("adapter_config", None)
    return build_model(config, None, random_seed=0).eval()


@torch.no_grad()
def answer(model, prompt):
    """What a model predicts for fixed latents under a prompt."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    cond = model.get_learned_conditioning([prompt])
    if hasattr(model, "concat_keys"):
        cond = {"c_concat": [torch.zeros(1, 5, 8, 8)], "c_crossattn": [cond]}
    return model.apply_model(x, torch.tensor([80]), cond)


@pytest.mark.parametrize("base", ["sd2", "sdxl"])
def test_a_run_is_sampled_with_the_program(base, tmp_path):
    config = narrow(f"{FOLDERS[base]}/attn2o-ffni.yaml", tmp_path)
    run = runs.train(tmp_path, "run", "--max_steps", 2, config=config)
    options = ["--prompt", "photo of a sks dog", "--n_samples", 1, "--ddim_steps", 2, "--sampler", "euler"]
    with_adapter = ["--adapter_path", run / "checkpoints" / "2-adapters"]
    pictures = [
        runs.sample(tmp_path / name, *options, *more, config=config)[0]
        for name, more in (("tuned", with_adapter), ("plain", [*with_adapter, "--adapter_scale", 0]))
    ]
    tuned, plain = map(runs.pixels, pictures)
    assert tuned.shape == (32, 32, 3) and plain.std() > 0


def test_sizes_are_those_of_the_files(tmp_path):
    Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(tmp_path / "wide.png")
    turned = Image.fromarray(np.zeros((60, 100, 3), np.uint8))
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(tmp_path / "zturned.jpg", exif=exif)
    pictures = PersonalizedBase(tmp_path, size=30, class_word="dog", sizes=True, set="val")
    wide, tall = pictures.sample(0), pictures.sample(1)
    assert wide["original_size_as_tuple"].tolist() == [60, 100] and tall["original_size_as_tuple"].tolist() == [100, 60]
    assert wide["crop_coords_top_left"].tolist() == [0, 10] and tall["crop_coords_top_left"].tolist() == [10, 0]
    assert wide["target_size_as_tuple"].tolist() == [30, 30]
    squeezed = PersonalizedBase(tmp_path, size=30, class_word="dog", sizes=True, center_crop=False).sample(0)
    assert squeezed["crop_coords_top_left"].tolist() == [0, 0]
    assert "original_size_as_tuple" not in PersonalizedBase(tmp_path, size=30, class_word="dog").sample(0)


def test_masks_are_drawn_anew_and_depend_on_the_draw_alone(tmp_path):
    runs.pictures(tmp_path, 2)
    masked = MaskedPictures(tmp_path, size=32, class_word="dog", whole=0.25)
    items = [masked.sample(k) for k in range(60)]
    shares = torch.tensor([item["mask"].mean() for item in items])
    assert 0.08 < (shares == 1).float().mean() < 0.45 and shares[shares < 1].min() > 0.02
    assert len(set(shares.tolist())) > 30
    for item in items[:5]:
        assert item["mask"].unique().tolist() in ([0, 1], [1]) and item["mask"].shape == (32, 32, 1)
        assert torch.equal(item["masked_image"], item["image"] * (item["mask"] == 0))
    assert torch.equal(MaskedPictures(tmp_path, size=32, class_word="dog").sample(7)["mask"], items[7]["mask"])
    ellipse, rectangle = (random_mask(torch.tensor([0.9, kind, 0.5, 0.5, 0.5, 0.5]), 64, 0.25) for kind in (0.1, 0.9))
    assert rectangle.sum() == 32 * 32 and 0.7 < ellipse.sum() / rectangle.sum() < 0.87
    with pytest.raises(InputError, match="whole: expected a probability"):
        MaskedPictures(tmp_path, size=32, class_word="dog", whole=2)


def test_words_of_two_text_encoders_go_into_files_and_come_back(tmp_path):
    model = base_model(narrow("sdxl-inject-dreambooth/attn2o-ffni.yaml", tmp_path))
    generator = torch.Generator().manual_seed(0)
    vectors = tuple(torch.randn(2, 16, generator=generator) for _ in range(2))
    embeddings.write_diffusers(tmp_path / "toy.safetensors", {"<toy>": vectors})
    assert set(read_weights(tmp_path / "toy.safetensors")) == {"clip_l", "clip_g"}
    assert load_words(model, tmp_path / "toy.safetensors", "--embedding_path") == ["<toy>"]
    for encoder, own_vectors in zip(readers(model).values(), vectors, strict=True):
        assert_close_to(torch.cat(list(encoder.new_tokens.vectors.values())), own_vectors, 1e-6)
    with pytest.raises(InputError, match="vectors for 1 text encoder"):
        teach(readers(model), "<other>", vectors[0])
    with pytest.raises(InputError, match="LDM's files of words are for one text encoder"):
        embeddings.write_ldm(tmp_path / "toy.pt", {"<toy>": vectors})
    save_safetensors(tmp_path / "half.safetensors", {"clip_l": vectors[0]})
    with pytest.raises(InputError, match="clip_l and clip_g with equally many vectors"):
        load_words(model, tmp_path / "half.safetensors", "--embedding_path")


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler_a"])
def test_a_nine_channel_model_paints_where_the_mask_is_white(tmp_path, monkeypatch, sampler):
    """`ldm sample --init-img --mask`: the UNet sees the mask and the latents of the rest, and the rest stays."""
    config = narrow(f"{FOLDERS['inpaint']}/attn2o-ffni.yaml", tmp_path)
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :24, 0], pixels[:, 24:, 2] = 230, 230
    Image.fromarray(pixels).save(tmp_path / "flag.png")
    Image.fromarray((pixels[..., 0] > 0).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    seen, forward = [], UNetModel.forward

    def watched(unet, x, *more, **named):
        seen.append(x)
        return forward(unet, x, *more, **named)

    monkeypatch.setattr(UNetModel, "forward", watched)
    begin = ["--init-img", tmp_path / "flag.png", "--mask", tmp_path / "mask.png", "--prompt", "a cat"]
    settings = ["--ddim_steps", 3, "--sampler", sampler, "--n_iter", 1, "--skip_grid"]
    [file] = runs.sample(tmp_path / "out", *begin, *settings, config=config)
    found = runs.pixels(file) / 255
    flag = torch.from_numpy(pixels).float() / 255
    assert (found[:, 26:] - flag[:, 26:]).abs().max() < 1 / 254
    assert (found[:, :22] - flag[:, :22]).abs().mean() > 0.02
    assert len(seen) >= 3 and all(x.shape[1] == 9 for x in seen)
    white = seen[0][0, 4]
    assert white[:, : white.shape[1] // 2].all() and not white[:, white.shape[1] // 2 :].any()
    assert all(torch.equal(x[:1, 4:], seen[0][:1, 4:]) for x in seen) and seen[0][0, 5:].any()
    [again] = runs.sample(tmp_path / "again", *begin, *settings, config=config)
    assert torch.equal(runs.pixels(again), runs.pixels(file)), "a seed gives the same picture"
