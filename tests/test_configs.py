"""Every shipped config: loads, says how to run it, names what exists, and resolves to the published values."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.commands import Program
from ldm.config import ALIASES, get_obj_from_str, load_config, plain
from ldm.trust import foreign_targets
from tests.helpers import words_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")  # see tests/study
NOT_ROUTES = {"model", "inference", "dreambooth", "concepts", "search", "captioned", "photographs", "full"}  # sd-mini/
FAMILIES = ("lora-", "custom-diffusion-", "textual-inversion-")  # other ways of tuning than routes
ROUTES = [
    path
    for folder in ("sd-inject-dreambooth", "sd-mini")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
    if path.stem not in NOT_ROUTES and not path.stem.startswith(FAMILIES)
]

# The published config each of ours stands for, in ../shared/reference/manifests/published_configs.json.
PUBLISHED = {
    "sd-inject-dreambooth/attn2o-ffni.yaml": "unet-finetune",
    "sd-inject-dreambooth/resi-reso.yaml": "unet-finetune",
    "sd-dream.yaml": "unet-finetune",
    "stable-diffusion/v1-inference.yaml": "stable-diffusion",
    **{
        str(path.relative_to(CONFIGS)): "custom-diffusion"
        for path in sorted((CONFIGS / "custom-diffusion").glob("*.yaml"))
    },
    **{
        str(path.relative_to(CONFIGS)): "stable-diffusion"
        for folder in ("autoencoder", "latent-diffusion")
        for path in sorted((CONFIGS / folder).glob("*.yaml"))
    },
}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@cache
def resolved(path: Path) -> dict:
    return OmegaConf.to_container(load_config(path), resolve=True)


def targets(config) -> set[str]:
    if isinstance(config, dict):
        own = {config["target"]} if "target" in config else set()
        return own.union(*map(targets, config.values()))
    return set().union(*map(targets, config)) if isinstance(config, list) else set()


def test_the_walk_finds_the_configs():
    assert len(ROUTES) == 40
    assert set(PUBLISHED) <= {name(path) for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=name)
def test_opens_with_its_command_and_what_it_needs(path):
    header = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert path.read_text().startswith("# ")
    assert ("# Run:    ldm " in text or "# Run:    python " in text) and "# Needs: " in text
    assert len(header) <= 8


@pytest.mark.parametrize("path", ALL, ids=name)
def test_command_in_the_header_names_files_that_exist(path):
    words = path.read_text().split("\nmodel:")[0].replace("'", " ").split()
    named = [word for word in words if word.startswith("configs/")]
    assert named
    for word in named:
        assert (CONFIGS.parent / word).is_file(), word


def commands_of(text: str) -> list[str]:
    """The commands in a header: the lines of `Run:`, without `#`, as a shell would join them."""
    block = re.search(r"^# Run:    .*\n(?:#     +.*\n)*", text, re.M)[0]
    return "\n".join(line.removeprefix("# Run:").removeprefix("#").strip() for line in block.splitlines()).replace(
        "\\\n", ""
    ).splitlines()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=name)
def test_command_in_the_header_can_be_pasted(path):
    """As one command or several, which their programs understand."""
    for command in commands_of(path.read_text()):
        program, verb, *words = words_of(command)
        if verb == "-ic":  # python
            compile(words[0], command, "exec")
        elif verb == "-m":
            assert importlib.util.find_spec(words[0]) and words[1] in importlib.import_module(words[0]).__doc__
        else:
            assert program == "ldm"
            Program(verb).parser().parse_args(words)


def test_a_command_without_a_backslash_is_two():
    header = "# What.\n# Run:    ldm train --base a.yaml -t --gpus 0,\n#           --data_root <photos>\n# Needs:  x\n"
    assert commands_of(header)[1] == "--data_root <photos>"
    assert len(commands_of(header.replace("0,", "0, \\"))) == 1


@pytest.mark.parametrize("path", ALL, ids=name)
def test_targets_exist(path):
    for target in sorted(targets(resolved(path))):
        get_obj_from_str(target)
    assert not foreign_targets(resolved(path), ALIASES)


@pytest.mark.parametrize("path", ROUTES, ids=name)
def test_route_is_named_after_its_positions(path):
    config = resolved(path)["model"]["params"]["unet_config"]["params"]["adapter_config"]
    (entries,) = config.values()
    (entry,) = entries if isinstance(entries, list) else [entries]
    assert path.stem == f"{entry['din']}-{entry['dout']}"


def test_both_folders_have_the_published_routes(golden):
    manifest = json.loads((golden / "manifests/adapters_manifest.json").read_text())["configs"]
    for folder in ("sd-inject-dreambooth", "sd-mini"):
        assert {path.stem for path in ROUTES if path.parent.name == folder} == set(manifest)
    for route, facts in manifest.items():
        config = resolved(CONFIGS / f"sd-inject-dreambooth/{route}.yaml")["model"]["params"]
        assert config["unet_config"]["params"]["adapter_config"] == facts["adapter_config"]
        assert facts["other_params"].items() <= config.items()


@pytest.mark.parametrize("ours,folder", PUBLISHED.items(), ids=PUBLISHED)
def test_resolves_to_the_published_values(golden, ours, folder):
    published = json.loads((golden / "manifests/published_configs.json").read_text())[f"{folder}/configs/{ours}"]
    assert comparable(resolved(CONFIGS / ours)) == comparable(published)


def comparable(config):
    """A config with today's targets, less what we leave out or correct on purpose.

    - Datasets of other packages (faces, LSUN, ImageNet) are not named in ours.
    - `checkpoint`, the file that is used where the command line names none, is ours.
    - Three published files give the path of a YAML file where a first-stage checkpoint is meant.
    """
    if isinstance(config, list):
        return [comparable(value) for value in config]
    if not isinstance(config, dict):
        return config
    result = {
        key: comparable(value) for key, value in config.items() if key != "checkpoint" and not is_foreign_dataset(value)
    }
    if "target" in result:
        result["target"] = ALIASES.get(result["target"], result["target"])
    if "ckpt_path" in result:
        parts = Path(result["ckpt_path"]).parts
        result["ckpt_path"] = Path("models", *parts[1:]).with_name("model.ckpt").as_posix()
    return result


def is_foreign_dataset(value) -> bool:
    target = value.get("target", "") if isinstance(value, dict) else ""
    return target.startswith(("taming.data.", "ldm.data.imagenet.", "ldm.data.lsun."))


def test_a_config_lies_over_its_defaults(tmp_path):
    (tmp_path / "low.yaml").write_text("model: {target: x, params: {a: {b: 1, c: 2}, d: [1, 2], e: {f: 1}, g: 5}}\n")
    (tmp_path / "side.yaml").write_text("model: {params: {a: {b: 7, h: 8}}}\n")
    (tmp_path / "top.yaml").write_text(
        "defaults: [low.yaml, side.yaml]\nmodel: {params: {a: {c: 3}, d: [4], e: null, g: {i: '${model.target}'}}}\n"
    )
    expected = {"a": {"b": 7, "c": 3, "h": 8}, "d": [4], "e": None, "g": {"i": "x"}}
    for _ in range(2):  # the second time from what was read the first time
        config = plain(load_config(tmp_path / "top.yaml"))
        assert config == {"model": {"target": "x", "params": expected}}
        config["model"]["params"]["d"].append(9)
    (tmp_path / "side.yaml").write_text("model: {params: {a: {b: 6, h: 8}}}\n")
    assert plain(load_config(tmp_path / "top.yaml"))["model"]["params"]["a"]["b"] == 6
