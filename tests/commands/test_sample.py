"""What `ldm sample` draws, in one process with what trained it."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.checkpoints import read_weights
from ldm.config import load_config
from ldm.errors import InputError
from tests.runs import (
    TINY,
    pixels,
    sample,
)

pytestmark = pytest.mark.slow


def test_the_adapter_changes_pictures_and_with_scale_0_nothing(tmp_path, trained):
    plain = sample(tmp_path / "plain")
    adapted = sample(tmp_path / "adapted", "--adapter_path", trained.adapters)
    off = sample(tmp_path / "off", "--adapter_path", trained.adapters, "--adapter_scale", 0)
    half = sample(tmp_path / "half", "--adapter_path", trained.adapters, "--adapter_scale", 0.5)
    for a, b, c, d in zip(plain, adapted, off, half, strict=True):
        assert torch.equal(pixels(a), pixels(c))
        assert (pixels(a) - pixels(b)).abs().max() > 3
        assert not torch.equal(pixels(b), pixels(d))
    assert len(plain) == 2  # n_iter


def test_two_adapters_add_up(tmp_path, trained):
    halves = ["--adapter_path", trained.adapters] * 2 + ["--adapter_scale", 0.25, "--adapter_scale", 0.75]
    once = sample(tmp_path / "once", "--adapter_path", trained.adapters, "--n_iter", 1)
    twice = sample(tmp_path / "twice", *halves, "--n_iter", 1)
    assert (pixels(once[0]) - pixels(twice[0])).abs().max() <= 1


def test_metadata_names_and_grid(tmp_path, trained):
    out = tmp_path / "out"
    more = ["--prompt", "photo of a sks dög", "--n_samples", 2, "--n_rows", 3, "--seed", 7, "--ddim_steps", 3]
    first = sample(out, *more, "--n_iter", 2, "--adapter_path", trained.adapters, "--sampler", "dpm_solver")
    assert [path.name for path in first] == ["00000.png", "00001.png", "00002.png", "00003.png"]
    with Image.open(first[3]) as picture:
        assert picture.size == (32, 32)
        assert picture.text == {
            "prompt": "photo of a sks dög", "negative": "", "seed": "10", "sampler": "dpm_solver", "steps": "3",
            "eta": "0.0", "spacing": "uniform", "scale": "7.5", "config": str(TINY), "ckpt": "the config's",
            "embeddings": "", "adapter": str(trained.adapters), "adapter scale": "", "base precision": "fp32",
        }  # fmt: skip
    with Image.open(out / "grid-0000.png") as grid:
        assert grid.size == (3 * 36, 2 * 36) and grid.text["seed"] == "7"
    sample(out, *more, "--n_iter", 1)  # goes on counting
    assert (out / "samples" / "00005.png").is_file() and (out / "grid-0001.png").is_file()


def test_a_picture_is_its_seed_whatever_the_batch(tmp_path):
    one = sample(tmp_path / "one", "--n_iter", 3, "--ddim_eta", 0.5)
    three = sample(tmp_path / "three", "--n_iter", 1, "--n_samples", 3, "--ddim_eta", 0.5)
    late = sample(tmp_path / "late", "--n_iter", 1, "--seed", 44, "--ddim_eta", 0.5)
    for a, b in zip(one, three, strict=True):
        assert (pixels(a) - pixels(b)).abs().max() <= 1  # batches are summed in another order
    assert torch.equal(pixels(one[2]), pixels(late[0]))
    assert not torch.equal(pixels(one[0]), pixels(one[1]))


def test_fixed_code_and_prompts_from_a_file(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red house\n\n  a blue house  \n")
    found = sample(tmp_path / "out", "--from-file", prompts, "--n_iter", 2, "--fixed_code", "--scale", 1)
    texts = [(picture.text["prompt"], picture.text["seed"]) for picture in map(Image.open, found)]
    assert texts == [("a red house", "42"), ("a blue house", "42")] * 2
    assert torch.equal(pixels(found[0]), pixels(found[2]))
    assert not torch.equal(pixels(found[0]), pixels(found[1]))


def test_sizes_and_what_may_be_skipped(tmp_path):
    out = tmp_path / "out"
    assert sample(out, "--H", 48, "--W", 64, "--n_iter", 1, "--skip_save", "--precision", "full") == []
    with Image.open(out / "grid-0000.png") as grid:
        assert grid.size == (68, 52)
    sample(out, "--n_iter", 1, "--skip_grid")
    assert len(list(out.glob("grid-*"))) == 1


@pytest.mark.parametrize(
    "words", [["--plms"], ["--sampler", "plms"], ["--sampler", "dpm_solver"], ["--sampler", "ddim"]]
)
def test_samplers(tmp_path, words):
    (path,) = sample(tmp_path / "out", *words, "--n_iter", 1)
    with Image.open(path) as picture:
        assert picture.text["sampler"] == words[-1].lstrip("-")


def test_a_base_in_half_precision_draws_nearly_the_same(tmp_path, trained):
    words = ["--adapter_path", trained.adapters, "--n_iter", 1, "--base_precision"]
    whole, half = (pixels(sample(tmp_path / name, *words, name)[0]) for name in ("fp32", "bf16"))
    assert 0 < (whole - half).abs().max() and (whole - half).abs().mean() < 3


def test_learnt_words_of_textual_inversion(tmp_path):
    """The published code saves an `nn.ParameterDict` in a pickle."""
    file, plain = tmp_path / "embeddings.pt", ["--prompt", "photo of a house", "--n_iter", 1]
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(2, 128))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": vectors}, file)
    star = ["--prompt", "photo of a *", "--n_iter", 1]
    without = sample(tmp_path / "without", *star)
    with_it = sample(tmp_path / "with", *star, "--embedding_path", file)
    assert not torch.equal(pixels(without[0]), pixels(with_it[0]))
    house = sample(tmp_path / "house", *plain), sample(tmp_path / "house2", *plain, "--embedding_path", file)
    assert torch.equal(pixels(house[0][0]), pixels(house[1][0]))


def test_python_api(trained):
    from sample import load_model_from_config

    model = load_model_from_config(load_config(TINY), None, verbose=True)
    unet = model.model.diffusion_model
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.load_adapter_from_dir(str(trained.adapters))
    saved = read_weights(trained.adapters / "adapters.safetensors")
    assert {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])} <= set(saved)
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in saved.items())
    assert not model.training


def test_published_adapter_folders_are_sampled_with(tmp_path, trained):
    """Every transformer adapter is there twice, in files named after the modules."""
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = load_file(trained.adapters / "adapters.safetensors")
    modules = {name.rsplit(".adp.", 1)[0] for name in tensors}
    for module in modules:
        own = {
            name.removeprefix(module + "."): value for name, value in tensors.items() if name.startswith(module + ".")
        }
        torch.save(own, folder / f"{module}.pt")
        torch.save({name.removeprefix("adp."): value for name, value in own.items()}, folder / f"{module}.adp.pt")
    ours = sample(tmp_path / "ours", "--adapter_path", trained.adapters, "--n_iter", 1)
    theirs = sample(tmp_path / "theirs", "--adapter_path", folder, "--n_iter", 1)
    assert torch.equal(pixels(ours[0]), pixels(theirs[0]))
    shutil.rmtree(folder)


def test_a_size_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="picture size 60x32 does not fit this model: expected multiples of 8"):
        sample(tmp_path, "--H", 60)
