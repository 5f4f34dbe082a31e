"""cloneofsimo LoRA files and the published arithmetic on them, against the published numbers."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ldm.checkpoints import read_metadata
from ldm.errors import InputError
from ldm.interchange import cloneofsimo as cs
from ldm.interchange import words_in
from ldm.interchange.layers import find_layers
from ldm.interchange.lora import Factors, clamped, delta, distilled, from_delta, reduced, selected, weighted_sum
from ldm.modules.encoders.tokens import read_embeddings
from tests.helpers import assert_close_to

torch.set_num_threads(1)
DEFAULT, EXTENDED = ["Attention", "CrossAttention", "GEGLU"], ["Attention", "CrossAttention", "GEGLU", "ResnetBlock2D"]


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "lora"


@pytest.fixture(scope="module")
def tensors(folder):
    return load_file(folder / "tensors.safetensors")


def facts(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def group(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# The network of the reference numbers; the class names are what the search goes by.


class ResnetBlock2D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.time_emb_proj = nn.Linear(6, 16)

    def forward(self, x, emb):
        return x + self.conv2(torch.tanh(self.conv1(x) + self.time_emb_proj(emb)[:, :, None, None]))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, 16, bias=False) for d in (16, 12, 12))
        self.to_out = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x, context):
        attention = (self.to_q(x) @ self.to_k(context).transpose(1, 2) / 4).softmax(-1)
        return self.to_out[0](attention @ self.to_v(context))


class GEGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 40)

    def forward(self, x):
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class Toy(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.inp = nn.Linear(8, 16)
        # registered in another order than they are used in: the search goes by the former
        self.res, self.attn, self.ff, self.out = ResnetBlock2D(), CrossAttention(), GEGLU(), nn.Linear(20, 8)
        self.load_state_dict(weights)

    @torch.no_grad()
    def forward(self, x, emb, context):
        tokens = self.inp(self.res(x, emb).flatten(2).transpose(1, 2))
        return self.out(self.ff(tokens + self.attn(tokens, context)))


@pytest.fixture
def toy(tensors):
    return Toy(group(tensors, "toy/unet/"))


def run(toy, tensors):
    return toy(tensors["toy/x"], tensors["toy/emb"], tensors["toy/context"])


def add(root, lora, strength=1.0):
    for name, factors in lora.items():
        layer = root.get_submodule(name)
        layer.weight.data = layer.weight.data + strength * delta(factors)


def test_the_search(toy, folder):
    order = facts(folder, "toy")["extract_order"]
    assert list(find_layers(toy, EXTENDED)) == order
    assert list(find_layers(toy, DEFAULT, (nn.Linear,))) == order[3:]


@pytest.mark.parametrize("name", ["linear_nobias", "linear_bias", "conv3x3_s2p1", "conv1x1"])
def test_single_layers(tensors, folder, name):
    """Merging into the weight is the reference's live branch; the selector works for convolutions too."""
    t, about = group(tensors, f"layer/{name}/"), facts(folder, "layers")[name]
    kind = about["kind"].replace("lin", "linear")
    call = F.linear if kind == "linear" else F.conv2d
    more = {key: about["kwargs"][key] for key in ("stride", "padding") if key in about["kwargs"]}
    factors = Factors(t["lora_down.weight"], t["lora_up.weight"], about["scale"])

    def output(change):
        return call(t["x"], t[f"{kind}.weight"] + change, t.get(f"{kind}.bias"), **more)

    assert_close_to(output(torch.zeros(())), t["y_base"])
    assert_close_to(output(delta(factors)), t["y"])
    if "y_selector" in t:
        assert_close_to(output(delta(selected(factors, t["selector_diag"]))), t["y_selector"])
    else:
        assert about["selector_raises"]
        assert delta(selected(factors, t["selector_diag"])).shape == t[f"{kind}.weight"].shape


class Dropped(nn.Module):
    """A live branch with dropout behind it, as the published code injects it: always in training mode."""

    def __init__(self, layer, factors):
        super().__init__()
        self.layer, self.factors = layer, factors

    def forward(self, x):
        (down, up, scale), layer = self.factors, self.layer
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)
        else:
            low = F.linear(F.linear(x, down), up)
        return layer(x) + scale * F.dropout(low, 0.1)


@pytest.mark.parametrize(("scale", "key"), [(0.7, "out_lora_scale0.7"), (1.0, "out_lora_scale1")])
def test_the_network_with_a_lora(toy, tensors, folder, scale, key):
    """The published outputs were recorded with dropout 0.1 in the branches (injection leaves them in training mode), so
    they are one draw; it lies among ours by its distance from the mean in standard deviations."""
    assert_close_to(run(toy, tensors), tensors["toy/out_plain"])
    raw = group(tensors, "toy/lora/")
    for name in facts(folder, "toy")["extract_order"]:
        parent, _, child = name.rpartition(".")
        branch = Dropped(toy.get_submodule(name), Factors(raw[f"{name}/down"], raw[f"{name}/up"], scale))
        toy.get_submodule(parent).add_module(child, branch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = torch.stack([run(toy, tensors) for _ in range(300)])
    distance = (tensors[f"toy/{key}"] - draws.mean(0)) / draws.std(0)
    assert 0.7 < distance.std() < 1.3


def test_collapsed_with_alpha_but_without_the_layers_scale(toy, tensors, folder):
    raw = group(tensors, "toy/lora/")
    names = facts(folder, "toy")["extract_order"]
    add(toy, {name: Factors(raw[f"{name}/down"], raw[f"{name}/up"]) for name in names}, strength=0.6)
    for name, value in group(tensors, "toy/collapsed0.6/").items():
        assert_close_to(toy.state_dict()[name], value)
    assert_close_to(run(toy, tensors), tensors["toy/out_collapsed0.6"])


def test_reading(folder):
    a, b = (cs.read_safetensors(folder / f"{name}.safetensors") for name in "AB")
    about = facts(folder, "files")
    assert {part: [f.rank for f in factors] for part, factors in b.factors.items()} == {
        part: spec["ranks"] for part, spec in about["parse_safeloras(B)"].items()
    }
    assert b.classes == {part: spec["targets"] for part, spec in about["parse_safeloras(B)"].items()}
    assert {word: list(v.shape) for word, v in b.tokens.items()} == {"<s1>": [1, 12], "<s2>": [1, 12]}
    assert len(a.factors["unet"]) == len(about["index_to_layer"]["unet"])


def test_the_scale_is_in_one_format_and_not_in_the_other(folder, tensors):
    safe, listed = cs.read_safetensors(folder / "A.safetensors"), cs.read_pt(folder / "A.pt")
    source = tensors["files/A_first_up_fp32"]
    assert_close_to(safe.factors["unet"][0].up.float(), 0.7 * source, 1e-3)
    assert_close_to(listed.factors["unet"][0].up.float(), source, 1e-3)
    assert len(listed.factors["text_encoder"]) == 2


@pytest.mark.parametrize("name", ["A", "B", "C_rank2"])
def test_writing_gives_the_published_files(folder, tmp_path, name):
    cs.write_safetensors(tmp_path / "x.safetensors", cs.read_safetensors(folder / f"{name}.safetensors"))
    theirs, ours = load_file(folder / f"{name}.safetensors"), load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) and theirs[key].dtype == ours[key].dtype for key in theirs)
    about = facts(folder, "files")[f"{name}.safetensors"]["metadata"]
    own = read_metadata(tmp_path / "x.safetensors")
    assert about.keys() == own.keys()
    assert all(sorted(json.loads(about[p])) == sorted(json.loads(own[p])) for p in cs.PARTS)
    assert all(about[key] == own[key] for key in about if key not in cs.PARTS)
    cs.write_pt(tmp_path / "x.pt", cs.read_pt(folder / f"{name}.pt"))
    for file in (f"{name}.pt", f"{name}.text_encoder.pt"):
        if (folder / file).is_file():
            pairs = zip(
                torch.load(folder / file, weights_only=True),
                torch.load(tmp_path / file.replace(name, "x"), weights_only=True),
                strict=True,
            )
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_words_of_several_vectors(tmp_path):
    words = {"<a>": torch.randn(12, 4), "<a_b>": torch.randn(1, 4)}
    cs.write_safetensors(tmp_path / "x.safetensors", cs.Published({}, {}, words))
    found = cs.read_safetensors(tmp_path / "x.safetensors").tokens
    assert found.keys() == words.keys() and all(torch.equal(found[word], words[word]) for word in words)


def test_words_beside_factors_are_read_as_words_alone(tmp_path):
    factors = {"unet": [Factors(torch.randn(2, 4), torch.randn(4, 2))]}
    words = {"<a>": torch.randn(3, 4)}
    cs.write_safetensors(tmp_path / "x.safetensors", cs.Published(factors, {"unet": ["CrossAttention"]}, words))
    found = read_embeddings(tmp_path / "x.safetensors")
    assert found.keys() == {"<a>"} and torch.equal(found["<a>"], words["<a>"])


def check_same(ours, path):
    theirs = cs.read_safetensors(path)
    assert ours.tokens.keys() == theirs.tokens.keys()
    assert all(torch.equal(ours.tokens[word], theirs.tokens[word]) for word in ours.tokens)
    for part, factors in theirs.factors.items():
        for a, b in zip(ours.factors[part], factors, strict=True):
            assert_close_to(a.up.float(), b.up.float(), 1e-3)
            assert_close_to(a.down.float(), b.down.float(), 1e-3)


def test_lpl(folder, tensors):
    a, b = (cs.read_safetensors(folder / f"{name}.safetensors") for name in "AB")
    check_same(cs.averaged(a, b), folder / "merge_lpl.safetensors")
    merged = cs.averaged(cs.read_pt(folder / "A.pt"), cs.read_pt(folder / "B.pt"))
    for part, name in (("unet", "lpl.pt"), ("text_encoder", "lpl.text_encoder.pt")):
        flat = [t for f in merged.factors[part] for t in (f.up, f.down)]
        for i, tensor in enumerate(flat):
            assert_close_to(tensor.float(), tensors[f"merge/{name}/{i}"].float(), 1e-3)


def test_lpl_is_not_the_average_of_the_changes_but_sum_is(folder):
    a, b = (cs.numbered(cs.read_safetensors(folder / f"{name}.safetensors")) for name in "AB")
    lpl = cs.numbered(cs.read_safetensors(folder / "merge_lpl.safetensors"))
    honest = weighted_sum([a, b], [0.5, 0.5])
    reduced = weighted_sum([a, b], [0.5, 0.5], rank=8)
    worst = 0.0
    for name in a.layers:
        wanted = 0.5 * delta(a.layers[name]) + 0.5 * delta(b.layers[name])
        if name.startswith("unet"):  # the published number is the worst of these
            worst = max(worst, ((delta(lpl.layers[name]) - wanted).norm() / wanted.norm()).item())
        assert_close_to(delta(honest.layers[name]), wanted, 1e-5)
        assert_close_to(delta(reduced.layers[name]), wanted, 1e-5)
    key = "max_over_layers_rel_diff_between_merged_delta_and_weighted_sum_of_deltas"
    assert worst == pytest.approx(facts(folder, "merge")["lpl"][key], rel=1e-3)


@pytest.mark.parametrize("other", ["B", "C_rank2"])
def test_ljl(folder, other):
    a, b = (cs.read_safetensors(folder / f"{name}.safetensors") for name in ("A", other))
    joined = cs.joined([a, b])
    check_same(joined, folder / f"merge_ljl_A_{other}.safetensors")
    for i, one in enumerate(joined.factors["unet"]):
        assert_close_to(delta(one), delta(a.factors["unet"][i]) + delta(b.factors["unet"][i]), 1e-3)


def test_upl(folder, tensors):
    for part, classes in (("unet", DEFAULT), ("text", ["CLIPAttention"])):
        base, merged = group(tensors, f"upl/base/{part}/"), group(tensors, f"upl/merged/{part}/")
        a = cs.read_safetensors(folder / "A.safetensors").factors["unet" if part == "unet" else "text_encoder"]
        names = facts(folder, "files")["index_to_layer"]["unet" if part == "unet" else "text_encoder"]
        assert classes
        for name, factors in zip(names, a, strict=True):
            assert_close_to(base.pop(f"{name}.weight") + 0.6 * delta(factors), merged.pop(f"{name}.weight"), 1e-3)
        assert all(torch.equal(base[name], merged[name]) for name in merged)


def test_svd_clamp_on_the_stored_decomposition(folder, tensors):
    about = facts(folder, "svd")["cases"]["r4_q0.99"]
    for name in about["layers_in_order"]:
        t = group(tensors, f"svd/r4_q0.99/{name}/")
        up = t["svd_U"] * t["svd_S"][:4]
        ours = clamped(Factors(t["svd_Vh"].reshape(t["down"].shape), up.reshape(t["up"].shape)), 0.99, signed=True)
        assert_close_to(ours.up, t["up"])
        assert_close_to(ours.down, t["down"])
        limit = max(ours.up.max().item(), ours.down.max().item())
        assert limit == pytest.approx(about["clamp_values"][name], rel=1e-4)


def test_reduced_is_the_best_of_its_rank():
    change = Factors(torch.randn(8, 6, 3, 3), torch.randn(10, 8, 1, 1), 0.7)
    for rank in (1, 3, 20):
        assert_close_to(delta(reduced(change, rank)), delta(from_delta(delta(change), rank)), 1e-4)


def test_distilled_does_not_depend_on_signs(tensors):
    base, tuned = group(tensors, "svd/base/"), group(tensors, "svd/tuned/")
    for name in ("res.conv1.weight", "attn.to_k.weight"):
        change = tuned[name] - base[name]
        ours, mirrored = distilled(tuned[name], base[name]), distilled(base[name], tuned[name])
        assert_close_to(delta(ours), -delta(mirrored), 1e-4)
        best = delta(distilled(tuned[name], base[name], 4, 1.0))
        left = torch.linalg.svdvals(change.flatten(1))[4:].norm()
        assert (change - best).norm().item() == pytest.approx(left.item(), rel=1e-4)


def test_a_sum_has_every_part_of_its_files(folder):
    a, b = (cs.read_safetensors(folder / f"{name}.safetensors") for name in "AB")
    only_unet = cs.Published({"unet": a.factors["unet"]}, {"unet": a.classes["unet"]})
    for pair, weights in (([only_unet, b], (0.3, 2)), ([b, only_unet], (2, 0.3))):
        assert cs.alike(*pair)
        merged = cs.renumbered(weighted_sum([cs.numbered(one) for one in pair], weights), pair)
        assert merged.classes == b.classes
        for one, expected in zip(merged.factors["text_encoder"], b.factors["text_encoder"], strict=True):
            assert_close_to(delta(one), 2 * delta(expected))


def test_numbers_tell_layers_only_where_classes_and_order_agree(folder):
    a = cs.read_safetensors(folder / "A.safetensors")
    assert cs.alike(a, dataclasses.replace(a, order="ldm"))  # published files name no order
    assert not cs.alike(dataclasses.replace(a, order="diffusers"), dataclasses.replace(a, order="ldm"))
    assert not cs.alike(a, dataclasses.replace(a, classes={**a.classes, "unet": EXTENDED}))
    assert not cs.alike(a, dataclasses.replace(a, factors={"unet": a.factors["unet"][::-1]}))
    assert cs.joined([a, dataclasses.replace(a, order="ldm")]).order == "ldm"
    with pytest.raises(InputError, match="different orders, diffusers and ldm: use sum"):
        cs.averaged(dataclasses.replace(a, order="diffusers"), dataclasses.replace(a, order="ldm"))


def test_a_text_encoders_list_goes_with_its_lora(folder, tmp_path):
    """What lies beside a .pt is read with it, so an older one's must not stay."""
    a = cs.read_pt(folder / "A.pt")
    cs.write_pt(tmp_path / "x.pt", a)
    assert cs.read_pt(tmp_path / "x.pt").factors.keys() == {"unet", "text_encoder"}
    cs.write_pt(tmp_path / "x.pt", cs.Published({"unet": a.factors["unet"]}, {}))
    assert cs.read_pt(tmp_path / "x.pt").factors.keys() == {"unet"}
    with pytest.raises(InputError, match="y.pt: a .pt LoRA begins with the UNet's layers, and this one has none"):
        cs.write_pt(tmp_path / "y.pt", cs.Published({"text_encoder": a.factors["text_encoder"]}, {}))


def test_the_words_of_a_list_lie_in_a_third_file(folder, tmp_path):
    """`save_all` of the published code writes {word: vector} as `x.ti.pt` beside `x.pt` and `x.text_encoder.pt`."""
    a = cs.read_pt(folder / "A.pt")
    cs.write_pt(tmp_path / "x.pt", a)
    torch.save({"<s1>": torch.ones(24), "<s2>": torch.zeros(24)}, tmp_path / "x.ti.pt")
    assert {word: v.tolist() for word, v in words_in(tmp_path / "x.pt").items()} == {
        "<s1>": [[1.0] * 24], "<s2>": [[0.0] * 24],
    }  # fmt: skip
    files = cs.write_pt(tmp_path / "y.pt", dataclasses.replace(a, tokens={"<s1>": torch.eye(2)}))
    assert [file.name for file in files] == ["y.pt", "y.text_encoder.pt", "y.ti.pt"]
    assert torch.equal(cs.read_pt(tmp_path / "y.pt").tokens["<s1>"], torch.eye(2))
    cs.write_pt(tmp_path / "y.pt", a)
    assert not (tmp_path / "y.ti.pt").exists()
    torch.save({"clip_l": torch.ones(1, 4), "clip_g": torch.ones(1, 8)}, tmp_path / "x.ti.pt")
    with pytest.raises(InputError, match="x.ti.pt holds a word of SDXL"):
        cs.read_pt(tmp_path / "x.pt")


def test_refusals(folder, tmp_path):
    a, c = (cs.read_safetensors(folder / f"{name}.safetensors") for name in ("A", "C_rank2"))
    with pytest.raises(InputError, match="different ranks .4 and 2 in unet:0"):
        cs.averaged(a, c)
    only_unet = cs.Published({"unet": a.factors["unet"]}, {"unet": a.classes["unet"]})
    with pytest.raises(InputError, match="different layers"):
        cs.joined([a, only_unet])
    torch.save([torch.zeros(2, 2)], tmp_path / "odd.pt")
    with pytest.raises(InputError, match="up and down"):
        cs.read_pt(tmp_path / "odd.pt")
