"""Train SD-mini's tokenizer, in CLIP's format, on the captions that build_captioned_pictures.py wrote.

    python -m scripts.sd_mini.train_tokenizer --captions build/captioned/captions.txt --out models/sd-mini/clip

writes vocab.json, merges.txt and the configurations beside them. The shipped one must not be trained again: the weights
belong to its numbering.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ldm.checkpoints import atomic_write
from ldm.cli import (
    Parser,
    run_command,
)
from ldm.data.captioned import background_words
from ldm.errors import InputError
from ldm.files import read_text

log = logging.getLogger("train_tokenizer")

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
PATTERN = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")  # how CLIP cuts lower-case English text

# Identifiers for DreamBooth: tokens of their own, in no caption.
IDENTIFIERS = "sks zwx"
# Words of the DreamBooth benchmark's prompts and of everyday prompts, whether or not a caption has them.
PROMPT_WORDS = """
photo picture image drawing painting emoji style of the a an in on with at to and its background
jungle snow beach cobblestone street top pink fabric wooden floor city mountain blue house purple rug forest wheat
field tree autumn leaves eiffel tower floating water ocean milk green grass sunflowers around mirror sidewalk crowded
dirt road white red shiny wet cube shaped wearing hat santa rainbow scarf black monocle chef outfit firefighter police
glasses yellow shirt wizard backpack stuffed animal bowl can candle cat clock sneaker dog toy boot cartoon teapot vase
big small tiny large old new young happy sad angry orange brown grey gray golden silver cute beautiful sitting sleeping
running standing jumping playing swimming flying eating sky sun moon night day light dark gold face person woman man
"""


def count_words(lines: Iterable[str]) -> Counter:
    """How often each word, number or run of signs occurs, as CLIP's tokenizer cuts the lines."""
    return Counter(word for line in lines for word in PATTERN.findall(line.lower()))


def train_bpe(words: Counter, vocabulary: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding of at most `vocabulary` tokens -> (vocab, merges); every byte is in it, so any text encodes.

    Order as in CLIP: bytes, bytes at the end of a word, merges by rank, start, end (so that `end` is the highest id).
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [byte + WORD_END for byte in alphabet]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator((" ".join([word] * count) for word, count in sorted(words.items())), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - 2 - len(base)]
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END])
    return {token: number for number, token in enumerate(tokens)}, merges


def clip_config(vocab: dict[str, int], length: int) -> dict:
    """The configuration of CLIP-mini (Hugging Face `CLIPConfig`)."""
    special = {"bos_token_id": vocab[START], "eos_token_id": vocab[END], "pad_token_id": vocab[END]}
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    tower |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}
    text = {"model_type": "clip_text_model", **tower, "vocab_size": len(vocab), "max_position_embeddings": length}
    vision = {"model_type": "clip_vision_model", **tower, "image_size": 64, "patch_size": 8, "num_channels": 3}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 128,
        "logit_scale_init_value": 2.6592,
        "text_config": text | special,
        "vision_config": vision,
    }


def write_clip_folder(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 32) -> None:
    """Write what `CLIPTokenizer.from_pretrained(folder)` and `CLIPConfig.from_pretrained(folder)` read."""
    specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **specials}
    texts = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]),
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(specials, indent=2),
        "config.json": json.dumps(clip_config(vocab, length), indent=2),
    }
    for name, text in texts.items():
        with atomic_write(folder / name) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--captions", required=True, help="text file, one caption per line")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--vocabulary", type=int, default=8000, help="tokens at most")
    options = parser.parse_args(arguments)
    if not Path(options.captions).is_file():
        raise InputError(f"no captions at {options.captions}; build_captioned_pictures.py beside this writes them")
    lines = read_text(options.captions).splitlines()
    words = count_words([*lines, *background_words(), *[PROMPT_WORDS] * 50, *[IDENTIFIERS] * 50])
    vocab, merges = train_bpe(words, options.vocabulary)
    write_clip_folder(Path(options.out), vocab, merges)
    log.info("%d tokens, %d merges in %s", len(vocab), len(merges), options.out)


if __name__ == "__main__":
    run_command(main)
