"""Metrics against values that follow from their definitions."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.evaluate.intervals import mean_interval
from ldm.evaluate.metrics import METRICS, clip_i, clip_t, mean_and_error, pairwise_similarity, psnr, retrieval
from ldm.evaluate.networks import load_network
from tests.conftest import ROOT


def test_psnr_of_a_constant_error():
    black = torch.zeros(2, 3, 4, 4)
    assert psnr(black + torch.tensor([0.1, 0.01])[:, None, None, None], black).tolist() == pytest.approx(
        [20, 40], abs=1e-3
    )


def test_similarities_are_mean_cosines():
    a, b = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert clip_i(a, b).tolist() == pytest.approx([1 / 3, 0])
    assert pairwise_similarity(b).item() == pytest.approx(-1 / 3)
    assert clip_t(a, torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == pytest.approx([0.5**0.5, 1])


def test_retrieval_counts_the_own_candidate_among_the_nearest():
    queries = torch.eye(3)
    candidates = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0.5]])
    assert retrieval(queries, candidates) == pytest.approx(1 / 3)
    assert retrieval(queries, candidates, k=2) == 1


def test_standard_error():
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2, (1 / 3) ** 0.5))
    assert mean_and_error(torch.tensor([4.0])) == (4, 0)


def test_similarities_are_those_of_torchmetrics():
    from torchmetrics.functional import pairwise_cosine_similarity

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator) for n in (6, 4))
    among = pairwise_cosine_similarity(a, zero_diagonal=True)
    assert clip_i(a, b).tolist() == pytest.approx(pairwise_cosine_similarity(a, b).mean(1).tolist(), abs=1e-6)
    assert pairwise_similarity(a).item() == pytest.approx(among.sum().item() / 30, abs=1e-6)
    diversity = mean_interval(METRICS["diversity"].function(a, a).numpy(), ["one prompt"] * 6).mean
    assert diversity == pytest.approx(1 - among.sum().item() / 30, abs=1e-6)


@pytest.mark.slow
def test_clip_t_is_the_clip_score_of_torchmetrics():
    from torchmetrics.multimodal import CLIPScore

    network = load_network("models/sd-mini/clip")
    pictures = [Image.open(path).convert("RGB") for path in sorted((ROOT / "examples/subjects/noto_cat").glob("*.png"))]
    captions = [f"an emoji of {what}" for what in ("a cat", "a house", "a crying cat")]
    pictures = pictures[: len(captions)]

    class Towers(torch.nn.Module):
        """The two towers as transformers 4 has them; torchmetrics normalises and multiplies."""

        config = network.module.clip.config

        def get_image_features(self, pixels):
            clip = network.module.clip
            return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

        def get_text_features(self, ids, _mask):
            clip = network.module.clip
            return clip.text_projection(clip.text_model(input_ids=ids).pooler_output)

    def processor(text=None, images=None, **_):
        if images is not None:
            shown = [network.preprocess(Image.fromarray(x.movedim(0, -1).numpy())) for x in images]
            return {"pixel_values": torch.stack(shown)}
        ids = network.module.tokenize(text)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    metric = CLIPScore(lambda: (Towers(), processor))
    with torch.no_grad():
        metric.update([torch.from_numpy(np.array(picture)).movedim(-1, 0) for picture in pictures], captions)
    ours = clip_t(network.vectors(pictures), network.embed_captions(captions))
    assert 100 * ours.mean().item() == pytest.approx(metric.compute().item(), abs=1e-3)
    assert ours[0] > ours[1]  # it is a cat and no house
