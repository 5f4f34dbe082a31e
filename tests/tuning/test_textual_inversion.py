"""New words: where they start, that nothing else moves, their norms; tokens of Custom Diffusion."""

import pytest
import torch

from ldm.errors import InputError
from ldm.tuning.cross_attention import ModifierTokens
from ldm.tuning.textual_inversion import released_table, word_ids
from tests.tuned_models import base_weights, family, model, train

TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def word(words="<sks>", **params):
    return family("textual_inversion.TextualInversion", words=words, **params)


def vectors(tuned):
    return torch.cat(list(tuned.trainable_parameters().values()))


def test_starts_at_the_initial_word():
    tuned = model([word(init_word="dog", vectors=3)])
    (number,) = word_ids(tuned.cond_stage_model, "dog")
    assert torch.equal(vectors(tuned), base_weights()[TABLE][number].expand(3, -1))


def test_each_word_may_start_elsewhere():
    tuned = model([word({"<a>": {"init_word": "dog"}, "<b>": {"init_word": "cat", "vectors": 2}})])
    encoder = tuned.cond_stage_model
    dog, cat = word_ids(encoder, "dog"), word_ids(encoder, "cat")
    assert torch.equal(vectors(tuned), base_weights()[TABLE][[*dog, *cat, *cat]])
    assert encoder.tokenize("<a> <b>")[0, 1:4].tolist() == [encoder.new_tokens.first_id + i for i in range(3)]


def test_a_word_of_several_tokens_gives_each_vector_one():
    encoder = model([]).cond_stage_model
    long = next(w for w in ("photographically", "unphotographed") if len(word_ids(encoder, w)) > 1)
    ids = word_ids(encoder, long)
    tuned = model([word(init_word=long, vectors=len(ids))])
    assert torch.equal(vectors(tuned), base_weights()[TABLE][ids])
    with pytest.raises(InputError, match=f"has {len(ids)} tokens here: give <sks> vectors: {len(ids)}"):
        model([word(init_word=long)])


def test_random_starts_have_the_statistics_of_the_table_or_the_given_deviation():
    table = base_weights()[TABLE]
    default = vectors(model([word(vectors=400)]))
    assert abs(default.std() / table.std() - 1) < 0.05
    assert abs(vectors(model([word(init_word=0.017, vectors=400)])).std() / 0.017 - 1) < 0.05
    assert not torch.equal(vectors(model([word(seed=1)])), vectors(model([word(seed=2)])))


def test_only_the_new_rows_move():
    tuned = train(model([word(init_word="dog", vectors=2)]), steps=3)
    state = tuned.state_dict()
    assert torch.equal(state[TABLE], base_weights()[TABLE])
    assert all(torch.equal(state[name], value) for name, value in base_weights().items())
    (number,) = word_ids(tuned.cond_stage_model, "dog")
    assert all(not torch.equal(row, base_weights()[TABLE][number]) for row in vectors(tuned))


def test_norms_go_towards_those_of_other_words():
    tuned = model([word(vectors=2, norm_weight=10)])
    (chosen,) = tuned.tuning.families
    target = released_table(tuned.cond_stage_model).norm(dim=1).mean()
    before = vectors(tuned).clone() * 3
    with torch.no_grad():
        for row in tuned.trainable_parameters().values():
            row.mul_(3)
    chosen.family.after_step(tuned, rate=0.02)
    expected = before.norm(dim=1) + 0.2 * (target - before.norm(dim=1))
    torch.testing.assert_close(vectors(tuned).norm(dim=1), expected)
    chosen.family.after_step(tuned, rate=1.0)
    torch.testing.assert_close(vectors(tuned).norm(dim=1), target.expand(2))


@pytest.mark.parametrize(
    "params,message",
    [
        ({"words": "dog"}, "knows 'dog' already; choose another name, e.g. <dog>"),
        ({"words": ["<a>", "<a> b"]}, "words without spaces such as <new1>"),
        ({"vectors": 0}, "vectors of <sks> must be a whole number of at least 1"),
        ({"words": []}, "at least one word"),
        ({"words": {"<a>": {"init": "dog"}}}, "expected init_word and vectors"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(InputError, match=message):
        model([word(**params)])


def test_a_word_that_is_there_already_is_refused():
    with pytest.raises(InputError, match="'<sks>'"):
        model([word(), word(vectors=2)])


def test_an_encoder_without_words_is_refused():
    with pytest.raises(InputError, match="Identity reads no words"):
        model([word()], cond_stage_config={"target": "torch.nn.Identity"})


def test_tokens_of_custom_diffusion_start_at_rare_words_from_the_last_one_on(monkeypatch):
    monkeypatch.setattr(
        "ldm.tuning.cross_attention.RARE_WORDS", ("dog", "cat")
    )  # SD-mini's vocabulary lacks the others
    tokens = ModifierTokens("<new1>+<new2>+<new3>")
    tokens.install(model())
    assert [how["init_word"] for how in tokens.words.values()] == [None, "cat", "dog"]


def test_tokens_of_custom_diffusion_from_given_words():
    tuned = model([family("cross_attention.ModifierTokens", modifier_token="<new1>+<new2>", init_word="cat+dog")])
    encoder = tuned.cond_stage_model
    ids = word_ids(encoder, "cat dog")
    assert torch.equal(vectors(tuned), base_weights()[TABLE][ids])
    with pytest.raises(InputError, match="has 1 words for the 2 of"):
        ModifierTokens("<new1>+<new2>", "cat")
