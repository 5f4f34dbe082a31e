"""Find real pictures of a class in an index of captioned pictures, by CLIP.

    ldm class-pictures --index laion-shards/ --class_prompt cat --class_data_dir real_reg/samples_cat

The index is a WebDataset tar, a parquet table, a folder of these, or a folder of captioned pictures. Writes
<class_data_dir>/images/, images.txt and caption.txt, as Custom Diffusion's retrieve.py did: for --reg_datapath
<dir>/images.txt --reg_caption <dir>/caption.txt of `ldm train`, and for `ldm custom-diffusion --real_prior`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser, count, text
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("--index", action="append", default=[], metavar="PATH", help="where to search; repeatable")
    p.add_argument("--class_prompt", "--target_name", type=text, required=True, help="what the pictures show, e.g. cat")
    p.add_argument("--class_data_dir", "--outpath", type=Path, required=True, metavar="DIR", help="the folder to fill")
    p.add_argument("--num_class_images", type=count, default=200, metavar="N", help="how many (default 200)")
    p.add_argument("--by", choices=("picture", "caption"), default="picture",
                   help="what is compared with the prompt (default picture)")  # fmt: skip
    p.add_argument("--image_column", default="image", help="of a parquet table (default image)")
    p.add_argument("--text_column", default="text", help="of a parquet table (default text)")
    p.add_argument("--network", default="openai/clip-vit-base-patch32", metavar="NAME",
                   help="a CLIP: a folder, or a name on the hub (default %(default)s)")  # fmt: skip
    p.add_argument("--download", action="store_true", help="fetch the network if it is not in the hub's cache")
    p.add_argument("--cache", default="logs/features", metavar="DIR|off", help="of vectors (default logs/features)")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")
    p.add_argument("--force", action="store_true", help="overwrite what exists")


def run(options: argparse.Namespace) -> None:
    from itertools import chain

    from ldm.devices import best_device
    from ldm.evaluate import retrieval
    from ldm.evaluate.features import FeatureCache
    from ldm.evaluate.networks import load_network
    from ldm.interchange.command import to_be_written

    if not options.index:
        raise InputError("--index is missing: name a tar, a parquet table or a folder of captioned pictures; the "
                         "published program's service on the network is gone")  # fmt: skip
    folder = options.class_data_dir
    for name in ("images", "images.txt", "caption.txt"):
        to_be_written(folder / name, options.force)
    network = load_network(options.network, str(best_device(options.device)), options.download)
    pairs = chain.from_iterable(
        retrieval.read_index(path, options.image_column, options.text_column) for path in options.index
    )
    cache = FeatureCache(None if options.cache == "off" else options.cache)
    found = retrieval.nearest(pairs, options.class_prompt, options.num_class_images, network, cache, options.by)
    if not found:
        raise InputError(f"{', '.join(options.index)}: no captioned picture in it")
    retrieval.save(found, folder)
    few = "" if len(found) == options.num_class_images else f"; the index has no more than these {len(found)}"
    print(f"{folder / 'images.txt'}  {len(found)} pictures, similarity {found[0].similarity:.3f} to "
          f"{found[-1].similarity:.3f}{few}")  # fmt: skip
