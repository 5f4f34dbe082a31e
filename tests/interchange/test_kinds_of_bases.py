"""Kinds of PEFT and LyCORIS on Stable Diffusion 1, 2.x and SDXL: their networks, text encoders included, both ways."""

import copy
import shutil
import warnings
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import identify, layers, load_any, lora_keys, lycoris, packed, read_lora
from ldm.interchange.formats import Context, by_name, open_file
from ldm.interchange.inspection import describe
from ldm.interchange.lora import delta
from ldm.tuning.lora import merge
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora
from tests.interchange.test_lycoris import CASES, attached_to, outputs
from tests.interchange.test_own_kinds import lora, tuned
from tests.interchange.whole_bases import TEXT

torch.set_num_threads(1)

CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
UNET_ENDS = ("attn2.to_k", "ff.net.0.proj", "proj_in", "conv_shortcut", "conv1")
TEXT_ENDS = ("q_proj", "fc1")


class Base:
    """A base here, and its networks in diffusers and transformers."""

    def __init__(self, case):
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
        import transformers

        self.case, self.model = case, case.model()
        self.names = layers.dialects(self.model)["diffusers"]
        self.networks = {"unet": diffusers.UNet2DConditionModel.from_pretrained(case.whole / "unet").eval()}
        for name in list(CLASSES)[: len(TEXT[case.base])]:
            self.networks[name] = getattr(transformers, CLASSES[name]).from_pretrained(case.whole / name).eval()
        self.state = {name: value.data for name, value in self.model.state_dict(keep_vars=True).items()}
        self.chosen = [
            next(n for n, theirs in self.names.items() if theirs.startswith(f"{network}.") and theirs.endswith(end))
            for network in self.networks
            for end in (UNET_ENDS if network == "unet" else TEXT_ENDS)
        ]

    def hosts(self, names):
        """Our layers by name; of OpenCLIP's q, k and v those that their rows are."""
        weights = packed.split(self.model.state_dict())
        return {name: host(weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names}

    def restore(self):
        for name, value in self.model.state_dict(keep_vars=True).items():
            value.data = self.state[name]
        self.model.tuning.released = {}

    def submodule(self, network, name):
        """A layer of a network by our name; `CLIPTextModel` of transformers 5 has no level `text_model`."""
        inner = self.names[name].partition(".")[2]
        known = dict(network.named_modules())
        return known[inner] if inner in known else known[inner.replace("text_model.", "")]

    def of(self, network):
        return [name for name in self.chosen if self.names[name].startswith(f"{network}.")]


def host(weight, bias):
    (out, width, *kernel), has_bias = weight.shape, bias is not None
    layer = (
        nn.Conv2d(width, out, tuple(kernel), padding=kernel[0] // 2, bias=has_bias) if kernel
        else nn.Linear(width, out, has_bias)
    )  # fmt: skip
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer.requires_grad_(False)


@pytest.fixture(scope="module")
def bases(made):
    return cache(lambda name: Base(made(name)))


@pytest.fixture
def base(request, bases):
    """A base by its name; a test leaves it as it was."""
    found = bases(request.param)
    yield found
    found.restore()


def same(found, expected, plain, tolerance=1e-5):
    for name, value in expected.items():
        assert (value - plain[name]).norm() > 0.002 * plain[name].norm(), name
        assert_close_to(found[name], value, tolerance)


# --- PEFT

PEFT = {
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 2, "init_lora_weights": False}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True, "init_lora_weights": False}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 4}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "ia3": ("IA3Config", {}),
}
STARTS = ("ia3_l.default", "boft_s.default", "vector.default.weight")  # what is not around zero


def peft_layers(base, case, folder):
    """Folders of PEFT for each network with random values, and the layers that it has wrapped."""
    import peft

    found = {}
    for number, (part, network) in enumerate(base.networks.items()):
        kind, settings = PEFT[case]
        own = {name: base.submodule(network, name) for name in base.of(part)}
        if case == "oft":  # PEFT's on a 3 x 3 convolution is no change of its weight
            own = {name: layer for name, layer in own.items() if not base.names[name].endswith("conv1")}
        known = {layer: name for name, layer in network.named_modules()}
        targets = [known[layer] for layer in own.values()]
        feedforward = {"feedforward_modules": targets[1:2]} if case == "ia3" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(peft, kind)(target_modules=targets, **settings, **feedforward)
            wrapped = peft.get_peft_model(copy.deepcopy(network), config).eval()
        generator = torch.Generator().manual_seed(number)
        for name, value in wrapped.named_parameters():
            if value.requires_grad:
                start = value.data if name.endswith(STARTS) else 0
                value.data = start + 0.2 * torch.randn(value.shape, generator=generator)
        wrapped.save_pretrained(folder / part)
        found |= {name: base.submodule(wrapped.base_model.model, name) for name in own}
    return found


ON_V1 = ("lora", "lokr")  # its UNet has tests of its own


@pytest.mark.parametrize(
    ("base", "case"), [(b, c) for b in TEXT for c in PEFT if b != "v1" or c in ON_V1], indirect=["base"]
)
def test_folders_of_peft_for_each_network(base, tmp_path, case):
    """PEFT writes unet/ and text_encoder/; we act as it does; what we write of it, it loads."""
    import peft

    wrapped = peft_layers(base, case, tmp_path / "x")
    plain = outputs(base.hosts(wrapped))
    expected = outputs(base.hosts(wrapped), wrapped)
    kind = "peft" if case == "lora" else "peft-kinds"
    assert identify(tmp_path / "x") == kind and describe(tmp_path / "x")["layers"] == len(wrapped)
    load_any(base.model, tmp_path / "x")
    same(outputs(base.hosts(wrapped)), expected, plain)
    base.restore()
    row, context = by_name(kind), Context(base.model, source="x")
    row.write(tmp_path / "y", row.read(row.form, open_file(tmp_path / "x"), context), context)
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == sorted(base.networks)
    load_any(base.model, tmp_path / "y")
    same(outputs(base.hosts(wrapped)), expected, plain)
    base.restore()
    theirs = {}
    for part, network in base.networks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # what PEFT does not find in the file it says in a warning
            warnings.filterwarnings("ignore", message=".*(butterfly|Ninja|CUDA|fbd|OFT|merge).*")
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "y" / part)
        theirs |= {n: base.submodule(loaded.eval().base_model.model, n) for n in base.of(part) if n in wrapped}
    same(outputs(base.hosts(wrapped), theirs), expected, plain)


@pytest.mark.parametrize("base", ["v1"], indirect=True)
def test_networks_of_different_kinds(base, tmp_path):
    """A plain LoRA beside DoRA: together they are kinds."""
    one, two = (peft_layers(base, case, tmp_path / case) for case in ("lora", "dora"))
    shutil.copytree(tmp_path / "lora/text_encoder", tmp_path / "dora/text_encoder", dirs_exist_ok=True)
    wrapped = {name: (one if "cond_stage" in name else two)[name] for name in one}
    assert identify(tmp_path / "dora") == "peft-kinds"
    plain = outputs(base.hosts(wrapped))
    load_any(base.model, tmp_path / "dora")
    same(outputs(base.hosts(wrapped)), outputs(base.hosts(wrapped), wrapped), plain)


@pytest.mark.parametrize("base", ["v1"], indirect=True)
def test_a_lora_with_biases(base, tmp_path):
    """`lora_bias` of PEFT: a LoRA and a difference of the bias."""
    import peft

    network = copy.deepcopy(base.networks["text_encoder"])
    settings = {"r": 2, "lora_alpha": 3, "lora_bias": True, "init_lora_weights": False}
    wrapped = peft.get_peft_model(network, peft.LoraConfig(target_modules=["q_proj", "fc1"], **settings)).eval()
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "x")
    names = base.of("text_encoder")
    plain = outputs(base.hosts(names))
    expected = outputs(base.hosts(names), {n: base.submodule(wrapped.base_model.model, n) for n in names})
    assert identify(tmp_path / "x") == "peft-kinds"
    load_any(base.model, tmp_path / "x")
    same(outputs(base.hosts(names)), expected, plain)
    with pytest.raises(InputError, match="by a difference of its bias beside LoRA, which is no product"):
        read_lora(tmp_path / "x", base.model)
    save_file(load_file(tmp_path / "x/adapter_model.safetensors"), tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="was trained with lora_bias"):  # its scale is in no file
        load_any(base.model, tmp_path / "alone.safetensors")


@pytest.mark.parametrize("base", TEXT, indirect=True)
def test_a_lora_for_all_networks_is_read_by_peft(base, tmp_path):
    import peft

    lora = random_lora(base.model, [*base.chosen])
    by_name("peft").write(tmp_path / "x", lora, Context(base.model))
    back = lora_keys.read if identify(tmp_path / "x") == "diffusers" else read_lora
    assert back(tmp_path / "x", base.model).layers.keys() == lora.layers.keys()
    for part, network in base.networks.items():
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "x" / part).merge_and_unload()
        for name in base.of(part):
            before, after = (base.submodule(one, name).weight for one in (network, loaded))
            assert_close_to(after - before, delta(lora.layers[name]).reshape(before.shape), 1e-4)


# --- what is trained here


@pytest.mark.parametrize("base", ["sd2", "sdxl"], indirect=True)
def test_our_own_trainings(base, tmp_path, capsys):
    """LoKr in all networks, norms, weights of the UNet and of the text encoders, q, k and v in one matrix included."""
    OmegaConf.save(base.case.config, tmp_path / "model.yaml")
    whole = base.case.file("base.safetensors", base.model.state_dict())
    convert = [str(tmp_path / "own"), str(tmp_path / "x"), "--to", "lycoris", "--config", str(tmp_path / "model.yaml")]
    targets = [name for name in base.chosen if not base.names[name].endswith("q_proj")]
    weights = r"(attn1\.to_k\.weight|in_proj_weight|in_proj_bias|self_attn\.q_proj\.weight)$"
    families = [lora("lokr", targets, rank=1), {"family": "norms"}, by_pattern(weights)]
    tuned(base.model, tmp_path / "own", *families)
    Program("convert")([*convert, "--base", whole])
    ours, loaded = base.case.model(), base.case.model()
    load_any(ours, tmp_path / "own")
    merge(ours)
    load_any(loaded, tmp_path / "x")
    before, expected, found = (one.state_dict() for one in (base.model, ours, loaded))
    changed = [name for name in before if not torch.equal(before[name], expected[name])]
    ends = ("norm2.weight", "to_k.weight", "in_proj_weight", "in_proj_bias", "c_fc.weight", "in_layers.2.weight")
    assert all(any(name.endswith(end) for name in changed) for end in ends)
    last = "resblocks.2." if base.case.base == "sd2" else "\0"  # Stable Diffusion 2.x does not compute it
    for name in [name for name in before if last not in name]:
        assert_close_to(found[name], expected[name], 1e-6)


def test_weights_that_have_no_name_in_these_files(made, tmp_path):
    case = made("v1")
    model, whole = case.model(), case.file("base.safetensors", case.state)
    OmegaConf.save(case.config, tmp_path / "model.yaml")
    tuned(model, tmp_path / "own", by_pattern(r"position_embedding\.weight$"))
    with pytest.raises(InputError, match=r"own changes .*position_embedding \(1 such\), for which these"):
        Program("convert")([str(tmp_path / "own"), str(tmp_path / "x"), "--to", "lycoris", "--config",
                            str(tmp_path / "model.yaml"), "--base", whole])  # fmt: skip


def by_pattern(pattern):
    return {"family": "weights-by-name", "params": {"pattern": pattern}}


# --- LyCORIS

LYCORIS = ("locon-tucker", "dora", "loha", "lokr", "oft", "boft", "glora", "ia3", "full")


@pytest.mark.parametrize("case", LYCORIS)
@pytest.mark.parametrize("base", ["sd2", "sdxl"], indirect=True)
def test_files_of_lycoris(base, tmp_path, case):
    """We act as LyCORIS' modules around these layers; what we write of it, it loads."""
    library = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed: pip install .[test]")
    kind, settings = CASES[case]
    plain, names = outputs(base.hosts(base.chosen)), lycoris.names_of(base.model)
    copies, tensors = attached_to(base.hosts(base.chosen), names, getattr(library, kind), settings)
    expected = outputs(base.hosts(base.chosen), copies)
    save_file(tensors, tmp_path / "x.safetensors")
    load_any(base.model, tmp_path / "x.safetensors")
    same(outputs(base.hosts(base.chosen)), expected, plain)
    base.restore()
    row, context = by_name("lycoris"), Context(base.model, source="x")
    row.write(tmp_path / "y", row.read("kinds", open_file(tmp_path / "x.safetensors"), context), context)
    held, theirs = load_file(tmp_path / "y"), base.hosts(base.chosen)
    if case == "ia3":  # which LyCORIS 4.1.3 writes and cannot make of a file
        assert held.keys() == tensors.keys() and all(torch.allclose(held[n], tensors[n]) for n in held)
        return
    for name, layer in theirs.items():
        kind, tensors = library.get_module(held, names[name])
        with torch.no_grad():
            library.make_module(kind, tensors, names[name], layer).eval().apply_to()
    same(outputs(base.hosts(base.chosen), theirs), expected, plain, 1e-3 if case == "full" else 1e-5)
