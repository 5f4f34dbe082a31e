"""Position adapters: by hand, at their start, switched off, compiled, checkpointed, refused."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.errors import InputError
from ldm.modules.adapter_files import adapter_tensors, describe
from ldm.modules.adapters import BottleneckConv, BottleneckMLP, attach_adapters, read_adapter_config, tapped_blocks
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from ldm.modules.folders import names_adapter

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 24,
    "legacy": False,
}  # fmt: skip


def mlp(din="attn2o", dout="ffni", **more):
    return {"din": din, "dout": dout, "mid_dim": 4, "init": "default", **more}


def conv(din="resi", dout="reso", **more):
    return mlp(din, dout, **more)


def both(*transformer, res=()):
    return {"transformer_adp_config": list(transformer), "resblock_adp_config": list(res)}


def unet(config=None, **more):
    """A UNet with seeded weights, none of which is zero; the same base for every adapter config."""
    torch.manual_seed(0)
    model = UNetModel(**{**UNET, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    attach_adapters(model, config)
    return model.eval()


def inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 8, 8), (batch, 5, 24)
    x, context = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.tensor([3, 700])[:batch], context


@torch.no_grad()
def run(model):
    return model(*inputs())


# --- what an adapter does


def block_by_hand(block, x, context, owed):
    """The figure of the paper in plain words; `owed(position, value)` is what is added there."""
    x = x + owed("attn1i", x)
    h = block.attn1(block.norm1(x))
    h = h + owed("attn1o", h)
    x = x + h
    x = x + owed("attn2i", x)
    context = context + owed("attn2c", context)
    h = block.attn2(block.norm2(x), context)
    h = h + owed("attn2o", h)
    x = x + h
    x = x + owed("ffni", x)
    h = block.ff(block.norm3(x))
    h = h + owed("ffno", h)
    x = x + h
    return x + owed("transo", x)


def test_three_adapters_in_one_block_two_of_them_on_one_route():
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, context_dim=24)
    routes = {
        "adapter_inout": ("attn1i", "ffni", 0.5),
        "adapter_inout_1": ("ffni", "ffni", 1.0),
        "adapter_inout_2": ("attn1i", "ffni", 2.0),
        "text": ("attn2c", "attn2c", 1.0),
        "late": ("attn1o", "transo", -1.0),
    }
    for name, (reads, writes, scale) in routes.items():
        width = 24 if reads == "attn2c" else 16
        block.attach(name, BottleneckMLP(width, width, 4, "silu", "default"), reads, writes, scale)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 5, 24)
    seen = {}

    def owed(position, value):
        seen[position] = value
        due = [
            scale * getattr(block, name)(seen[reads])
            for name, (reads, writes, scale) in routes.items()
            if writes == position
        ]
        return sum(due) if due else torch.zeros_like(value)

    # Each adapter at `attn1i` reads the value as it arrived: nothing is written there before.
    with torch.no_grad():
        torch.testing.assert_close(block(x, context), block_by_hand(block, x, context, owed))


@pytest.mark.parametrize("routes", [[("resi", "resi")], [("resi", "reso"), ("resi", "resi")], [("reso", "reso")] * 2])
def test_adapters_of_a_residual_block(routes):
    torch.manual_seed(0)
    block = ResBlock(32, 16, 0.0, 64).eval()
    nn.init.normal_(block.out_layers[3].weight, std=0.1)
    plain = ResBlock(32, 16, 0.0, 64).eval()
    plain.load_state_dict(block.state_dict())
    for reads, writes in routes:
        width = block.width(reads), block.width(writes)
        block.attach(block.next_adapter_name(), BottleneckConv(*width, 4, init="default"), reads, writes, 0.5)
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        forms = [(getattr(block, route.name), route.reads, route.writes) for route in block.routes]
        start = x + sum(0.5 * form(x) for form, reads, writes in forms if (reads, writes) == ("resi", "resi"))
        end = plain(start, emb)
        due = [0.5 * form(x if reads == "resi" else end) for form, reads, writes in forms if writes == "reso"]
        torch.testing.assert_close(block(x, emb), end + sum(due) if due else end)


def test_two_adapters_on_one_route_are_one_of_twice_the_strength():
    once, twice = unet(both(mlp(scale=2))), unet(both(mlp(), mlp()))
    for name, value in adapter_tensors(once).items():
        for copy in (name, name.replace("adapter_inout", "adapter_inout_1")):
            twice.state_dict()[copy].copy_(value)
    torch.testing.assert_close(run(once), run(twice))


def test_state_dict_names():
    model = unet(both(mlp(), mlp("attn2c", "attn2c"), mlp(), res=[conv(), conv("resi", "resi")]))
    per_block = {name.split(".adapter")[1].split(".")[0] for name in adapter_tensors(model)}
    assert per_block == {"_inout", "_inout_1", "_inout_2", "", "_1"}
    names = list(adapter_tensors(model))
    assert "input_blocks.1.1.transformer_blocks.0.adapter_inout.adp.0.weight" in names
    assert "middle_block.0.adapter_1.4.bias" in names and "middle_block.0.adapter.0.weight" in names
    assert [(e["name"], e["din"], e["dout"]) for e in describe(model)] == [
        ("adapter_inout", "attn2o", "ffni"),
        ("adapter_inout_1", "attn2c", "attn2c"),
        ("adapter_inout_2", "attn2o", "ffni"),
        ("adapter", "resi", "reso"),
        ("adapter_1", "resi", "resi"),
    ]
    assert all(map(names_adapter, names)) and not names_adapter("input_blocks.1.0.in_layers.0.weight")


def test_the_start():
    every = dict(res=[conv("resi", "resi", init="zero"), conv(init="zero"), conv("reso", "reso", init="zero")])
    plain = run(unet())
    assert torch.equal(run(unet(both(mlp(init="zero"), mlp("attn1i", "transo", init="zero"), **every))), plain)
    assert not torch.equal(run(unet(both(mlp()))), plain)
    assert read_adapter_config({"transformer_adp_config": [{"din": "ffni", "dout": "ffni", "mid_dim": 4}]})[
        "transformer_adp_config"
    ] == [
        {
            "type": "inout",
            "din": "ffni",
            "dout": "ffni",
            "mid_dim": 4,
            "method": "default",
            "scale": 1.0,
            "init": "zero",
            "form": "mlp",
        }
    ]


def test_off_is_the_base_and_on_again_is_not():
    model, plain = unet(both(mlp(), res=[conv()])), run(unet())
    adapted = run(model)
    model.adapters_enable(False)
    assert torch.equal(run(model), plain)
    model.adapters_enable()
    assert torch.equal(run(model), adapted) and not torch.equal(adapted, plain)


def test_detach_leaves_no_trace():
    model = unet(both(mlp(), mlp("ffni", "ffni")))
    for _, block in tapped_blocks(model, "transformer_adp_config"):
        block.detach("adapter_inout")
        assert block.next_adapter_name() == "adapter_inout"
        block.detach("adapter_inout_1")
    assert torch.equal(run(model), run(unet())) and not adapter_tensors(model)


def test_a_call_within_a_call_keeps_its_own_accounts():
    """An adapter that runs its own block: what is owed lives in one call of `forward`."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, context_dim=24, checkpoint=False)
    other, context = torch.randn(1, 3, 16), torch.randn(1, 5, 24)

    class Nosy(nn.Module):
        def forward(self, x):
            if x.shape == other.shape:
                return 3 * x
            block(other, context)
            return 2 * x

    block.attach("adapter_inout", Nosy(), "attn1i", "ffni")
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        expected = block_by_hand(block, x, context, lambda p, v: 2 * x if p == "ffni" else torch.zeros_like(v))
        torch.testing.assert_close(block(x, context), expected)


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = unet(both(mlp(), mlp("attn2c", "attn2c"), res=[conv()]))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs()), run(model))


def test_checkpointing_gives_the_same_gradients_and_none_to_the_base():
    config, found = both(mlp(), mlp("attn2c", "attn2c"), res=[conv()]), []
    for use_checkpoint in (False, True, "selective"):
        model = unet(config, use_checkpoint=use_checkpoint).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names_adapter(name))
        model(*inputs()).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all((gradients[name] is None) == (not names_adapter(name)) for name in gradients)
        found.append({name: value for name, value in gradients.items() if value is not None})
    assert all(value.abs().sum() > 0 for value in found[0].values())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
        torch.testing.assert_close(value, found[2][name])


def test_checkpointing_spares_activations():
    def kept(use_checkpoint):
        sizes = []
        model = unet(both(mlp()), use_checkpoint=use_checkpoint).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(*inputs())
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)
    assert kept("selective") < 0.5 * kept(False)  # beside what its policy keeps, which the next test counts


def test_selective_checkpointing_does_not_repeat_what_is_costly():
    def products(use_checkpoint):
        model = unet(both(mlp()), use_checkpoint=use_checkpoint).train()
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names_adapter(name))
        with FlopCounterMode(display=False) as counter:
            model(*inputs()).sum().backward()
        return counter.get_total_flops()

    assert products("selective") == products(False) < products(True)


def test_an_unknown_kind_of_checkpointing_is_refused():
    with pytest.raises(InputError, match="use_checkpoint must be true, false or selective, got 'some'"):
        unet(use_checkpoint="some")(*inputs())


# --- what is refused

ROUTES = [
    (mlp("attn3i", "ffni"), "unknown input 'attn3i', expected one of attn1i, attn1o, attn2i"),
    (mlp("attn1i", "attn2o"), "unknown output 'attn2o'; from attn1i one can write to attn1i, attn2i, ffni, transo"),
    (mlp("ffni", "attn2i"), "ffni-attn2i writes before it reads: .* from ffni one can write to ffni, transo"),
    (mlp("attn2c", "ffni"), "attn2c-ffni joins different streams: attn2c lies on the text context.* write to attn2c"),
    (mlp("attn1i", "attn2c"), "attn1i-attn2c joins different streams"),
    (conv("reso", "resi"), "reso-resi writes before it reads: .* from reso one can write to reso"),
    (conv("attn1i", "reso"), "unknown input 'attn1i', expected one of resi, reso"),
]
ENTRIES = [
    ({"dim": 3}, "transformer_adp_config has the unknown key 'dim'; did you mean din.$"),
    ({"din": None}, "transformer_adp_config lacks the key 'din'"),
    ({"dout": None}, "lacks the key 'dout'"),
    ({"mid_dim": None}, "lacks the key 'mid_dim'"),
    ({"din": ["attn1i"]}, "din must be a name, got .'attn1i'."),
    ({"type": "in"}, "type must be 'inout', got 'in'"),
    ({"method": "gelu"}, "method must be one of relu, sig, silu, ident, default, got 'gelu'"),
    ({"init": "ones"}, "init must be one of zero, default, got 'ones'"),
    ({"mid_dim": 0}, "mid_dim must be a whole number of at least 1, got 0"),
    ({"mid_dim": 2.5}, "mid_dim must be a whole number of at least 1, got 2.5"),
    ({"mid_dim": True}, "mid_dim must be .* got True"),
    ({"scale": "strong"}, "scale must be a finite number, got 'strong'"),
    ({"scale": float("nan")}, "scale must be a finite number, got nan"),
]
CONFIGS = [
    (
        {"transformer_adapters": []},
        "unknown key 'transformer_adapters'; did you mean transformer_adp_config.$",
    ),
    ([mlp()], "adapter_config must be a mapping"),
    ({"transformer_adp_config": 5}, "transformer_adp_config: expected entries with type, din, .* got 5"),
    ({"transformer_adp_config": ["attn1i"]}, "expected entries with .* got 'attn1i'"),
]


@pytest.mark.parametrize("entry,message", ROUTES, ids=[f"{e['din']}-{e['dout']}" for e, _ in ROUTES])
def test_routes_that_do_not_exist(entry, message):
    kind = "resblock_adp_config" if "res" in entry["din"] + entry["dout"] else "transformer_adp_config"
    with pytest.raises(InputError, match=message):
        unet({kind: [entry]})


@pytest.mark.parametrize("change,message", ENTRIES)
def test_wrong_entries(change, message):
    with pytest.raises(InputError, match=message):
        unet(both({**mlp(), **change}))


@pytest.mark.parametrize("config,message", CONFIGS)
def test_wrong_configs(config, message):
    with pytest.raises(InputError, match=message):
        unet(config)


def test_a_block_that_changes_the_resolution_has_no_route_through():
    with pytest.raises(
        InputError, match="resi-reso joins different streams: resi lies on the features before resampling"
    ):
        unet({"resblock_adp_config": conv()}, resblock_updown=True)
    unet({"resblock_adp_config": conv("resi", "resi")}, resblock_updown=True)


def test_names_that_are_taken_and_models_without_such_blocks():
    block = BasicTransformerBlock(16, 2, 8, context_dim=24)
    block.attach("adapter_inout", nn.Identity(), "ffni", "ffni")
    for name in ("adapter_inout", "attn1"):
        with pytest.raises(InputError, match=f"adapter name '{name}' is taken in this BasicTransformerBlock"):
            block.attach(name, nn.Identity(), "ffni", "ffni")
    plain = {"use_spatial_transformer": False, "context_dim": None}
    with pytest.raises(InputError, match="transformer_adp_config: this model has no BasicTransformerBlock"):
        unet(both(mlp()), **plain)


def test_scale_and_single_entries_as_people_write_them():
    config = read_adapter_config({"resblock_adp_config": conv(scale=2), "transformer_adp_config": None})
    entry = {"type": "inout", "method": "default", "form": "conv", **conv(scale=2.0)}
    assert config == {"resblock_adp_config": [entry]}
    assert isinstance(config["resblock_adp_config"][0]["scale"], float)
