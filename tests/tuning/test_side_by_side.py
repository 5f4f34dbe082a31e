"""Several tunings of one base in one call: every family, alone and mixed, answers as it does alone."""

import pytest
import torch

from ldm.tuning import Tuning, families, freeze_rest
from ldm.tuning.side_by_side import join, own_copies, view
from tests import tuned_models
from tests.tuned_models import ROUTE, batch, family, shake

pytestmark = pytest.mark.slow

FAMILIES = {
    "position": ("position.PositionAdapters", {"adapter_config": ROUTE}),
    "another route": ("position.PositionAdapters", {"adapter_config": {
        "transformer_adp_config": [{"din": "attn1i", "dout": "transo", "mid_dim": 3, "scale": 0.5}]}}),
    "lora": ("lora.LoRA", {"rank": 2}),
    "lora on text": ("lora.LoRA", {"rank": 2, "targets": ["cond_stage_model.*.self_attn.*_proj"]}),
    "loha": ("lora.LoRA", {"rank": 2, "kind": "loha"}),
    "dora": ("lora.LoRA", {"rank": 2, "kind": "dora"}),
    "oft": ("lora.LoRA", {"rank": 4, "kind": "oft"}),
    "words": ("textual_inversion.TextualInversion", {"words": "<sks>", "init_word": "dog"}),
    "biases": ("biases.Biases", {}),
    "norms": ("norms.Norms", {}),
    "keys and values": ("cross_attention.CrossAttention", {}),
}  # fmt: skip


def tuned(base, *names):
    """A view of the base with families of these names, which have learnt something."""
    one = view(base)
    entries = [family(FAMILIES[name][0], **FAMILIES[name][1]) for name in names]
    one.tuning = Tuning(one, families(None, entries))
    one.is_tuned = True
    known = {name for name, _ in base.named_parameters()}
    one.tuning.install()
    own_copies(one, [name for name in one.trainable_parameters() if name in known])
    freeze_rest(one, one.trainable_parameters())
    shake(one, seed=len(names[0]))
    return one


def draw(model, number):
    torch.manual_seed(number)
    return model.draw(batch(number))


def losses(model, drawn):
    return [loss for loss, _ in model.losses_of(drawn)]


@pytest.mark.parametrize("names", [
    *[([name], [name]) for name in FAMILIES],
    (["position"], ["another route"]), (["lora"], ["loha", "position"]), (["words", "lora on text"], ["biases"]),
    (["position", "lora"], ["norms"], ["keys and values"], ["words"]),
], ids=str)  # fmt: skip
def test_together_they_answer_as_alone(names):
    base = tuned_models.model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    views = [tuned(base, *own) for own in names]
    together = view(base)
    join(together, views)
    drawn = [draw(one, number) for number, one in enumerate(views)]
    alone = [losses(one, [own])[0] for one, own in zip(views, drawn, strict=True)]
    plain = [losses(base, [draw(base, number)])[0] for number in range(len(views))]
    joint = losses(together, drawn)
    assert torch.allclose(torch.stack(joint), torch.stack(alone), rtol=1e-5)
    assert not torch.allclose(torch.stack(plain), torch.stack(alone), rtol=1e-5), "this test compares nothing"

    sum(joint).backward()
    gradients = [
        {name: p.grad.clone() for name, p in one.trainable_parameters().items() if p.grad is not None} for one in views
    ]
    for number, (one, theirs) in enumerate(zip(views, gradients, strict=True)):
        one.zero_grad()
        losses(one, [draw(one, number)])[0].backward()
        mine = {name: p.grad for name, p in one.trainable_parameters().items() if p.grad is not None}
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-6) for name in mine)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items()), "the base stays"
