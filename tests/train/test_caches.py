"""Encodings made once: the same numbers, no work by the encoders afterwards, nothing trusted that does not fit."""

import os
import weakref

import pytest
import torch

from ldm.checkpoints import save_safetensors
from ldm.data.dreambooth import PersonalizedBase
from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.train import picture_cache
from tests.runs import differences, last, pictures, train

pytestmark = pytest.mark.slow


def test_the_cache_changes_no_number(tmp_path):
    kept = str(tmp_path / "kept")
    off, memory, written, read = (
        train(tmp_path, name, "--max_steps", 6, "--cache", where)
        for name, where in {"off": "off", "memory": "memory", "written": kept, "read": kept}.items()
    )
    assert len(list((tmp_path / "kept").iterdir())) == 2  # subject and class; validation shows the subject again
    for run in (memory, written, read):
        assert differences(last(off)["state_dict"], last(run)["state_dict"]) == []
        assert differences(last(off)["optimizer_states"], last(run)["optimizer_states"]) == []


def test_no_encoder_works_during_training(tmp_path, monkeypatch):
    calls = {"pictures": 0, "prompts": 0}

    def counted(cls, name, key):
        original = getattr(cls, name)

        def method(self, *args, **kwargs):
            calls[key] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, method)

    counted(AutoencoderKL, "encode", "pictures")
    counted(FrozenCLIPEmbedder, "forward", "prompts")
    quiet = ["lightning.callbacks.image_logger.params.disabled=true"]
    train(tmp_path, "short", "--max_steps", 2, *quiet)
    short = dict(calls)
    calls.update(pictures=0, prompts=0)
    train(tmp_path, "long", "--max_steps", 9, *quiet)
    assert calls == short
    assert calls["prompts"] == 3  # subject, class, and the empty one for guidance
    train(tmp_path, "uncached", "--max_steps", 9, "--cache", "off", *quiet)
    assert calls["prompts"] > 3 + 9


def test_the_test_set_is_seen_after_the_training(tmp_path):
    target = "ldm.data.dreambooth.PersonalizedBase"
    params = f"{{data_root: {tmp_path / 'photos'}, size: 32, set: val, repeats: 1}}"
    test = f"data.params.test={{target: {target}, params: {params}}}"
    run = train(tmp_path, "run", "--max_steps", 2, test)
    assert last(run)["global_step"] == 2


def test_an_encoder_that_learns_is_not_replaced(tmp_path):
    run = train(tmp_path, "words", "--max_steps", 2, "model.params.train_level=[adapter,embeder]")
    assert any(name.startswith("cond_stage_model.") for name in last(run)["state_dict"])


@pytest.fixture
def photographs(tmp_path):
    return pictures(tmp_path / "photos", 3)


@pytest.fixture
def kept(tmp_path, photographs):
    """A small autoencoder, a set of pictures, and a function that gives their encodings from a folder."""
    torch.manual_seed(0)
    config = {"double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    config |= {"ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    first_stage = AutoencoderKL(config, {"target": "torch.nn.Identity"}, embed_dim=2).eval()
    model = type("Model", (), {"first_stage_model": first_stage})

    def encode(workers=0, **options):
        dataset = PersonalizedBase(photographs, **{"size": 16, "class_word": "dog"} | options)
        return picture_cache.pictures(model, dataset, tmp_path / "kept", torch.device("cpu"), "train", workers)

    return encode, tmp_path / "kept", first_stage


def test_what_is_kept_depends_on_pictures_settings_and_encoder(kept, photographs):
    encode, folder, first_stage = kept
    first = encode()
    assert first.shape == (len(list(photographs.iterdir())), 2, 4, 8, 8)
    assert torch.equal(encode(), first) and len(list(folder.iterdir())) == 1
    assert not torch.equal(encode(interpolation="nearest"), first)
    one = sorted(photographs.iterdir())[0]
    one.write_bytes(sorted(photographs.iterdir())[1].read_bytes())
    assert not torch.equal(encode(), first)
    with torch.no_grad():
        first_stage.quant_conv.weight.mul_(2)
    encode()
    assert len(list(folder.iterdir())) == 4


def test_processes_that_read_change_no_number(kept, photographs, monkeypatch):
    encode, folder, _ = kept
    alone = encode().clone()
    [file] = folder.iterdir()
    file.unlink()
    monkeypatch.setattr(PersonalizedBase, "picture", reads_elsewhere(PersonalizedBase.picture))
    before = torch.get_rng_state()
    assert torch.equal(encode(workers=2), alone) and torch.equal(torch.get_rng_state(), before)
    (photographs / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="^cannot read the picture .*1.png: .*; replace or remove it$"):
        encode(workers=2)


def reads_elsewhere(original):
    """A method that refuses to work in this process."""
    here = os.getpid()

    def method(self, *arguments):
        assert os.getpid() != here
        return original(self, *arguments)

    return method


def test_a_folder_holds_one_picture_in_memory_at_a_time(kept, photographs, monkeypatch):
    pictures(photographs, 12)
    encode, _, first_stage = kept
    original, made, most = first_stage.encode, [], 0

    def counted(picture):
        nonlocal most
        most = max(most, sum(one() is not None for one in made))
        encoded = original(picture)
        made.append(weakref.ref(encoded.parameters))
        return encoded

    monkeypatch.setattr(first_stage, "encode", counted)
    encode()
    assert len(made) == 2 * 12 and most <= 4  # a picture and its mirror image, while the next ones are made


def test_a_damaged_file_is_rebuilt(kept):
    encode, folder, _ = kept
    first = encode().clone()  # what is kept in a file is mapped from it
    [file] = folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(encode(), first)
    assert torch.equal(encode(), first) and file.stat().st_size > 100


HOSTILE = {
    "another shape": lambda m: {"moments": m[:, :, :, :4]},
    "fewer pictures": lambda m: {"moments": m[:1]},
    "no shape at all": lambda m: {"moments": m[0, 0, 0, 0, 0]},
    "a flat one": lambda m: {"moments": m.flatten()},
    "an odd number of channels": lambda m: {"moments": m[:, :, :3]},
    "numbers that are whole": lambda m: {"moments": m.long()},
    "truths": lambda m: {"moments": m > 0},
    "complex numbers": lambda m: {"moments": m.to(torch.complex64)},
    "nan": lambda m: {"moments": torch.where(m == m.max(), torch.nan, m)},
    "infinity": lambda m: {"moments": torch.where(m == m.max(), torch.inf, m)},
    "another name": lambda m: {"weights": m},
    "half precision": lambda m: {"moments": m.half()},
    "one tensor more": lambda m: {"moments": m, "more": m[0].clone()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cache_that_does_not_fit_is_rebuilt(kept, name, caplog):
    encode, folder, _ = kept
    first = encode()
    [file] = folder.iterdir()
    save_safetensors(file, {key: value.contiguous() for key, value in HOSTILE[name](first).items()})
    with caplog.at_level("WARNING"):
        assert torch.equal(encode(), first)
    assert f"{file} is rebuilt: " in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert torch.equal(encode(), first) and not caplog.text


def test_a_first_stage_without_a_posterior_is_refused(kept):
    """Such as a VQ model, which gives latents themselves."""
    encode, folder, first_stage = kept
    first_stage.encode = lambda x: x
    with pytest.raises(InputError, match="AutoencoderKL has no posterior to keep: train with --cache off"):
        encode()
    assert not folder.exists()
