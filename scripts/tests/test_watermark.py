"""Print the invisible watermark of a picture: python scripts/tests/test_watermark.py PICTURE [--length BYTES]."""

from ldm.cli import Parser, count, run_command


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__)
    p.add_argument("picture")
    p.add_argument("--length", type=count, default=17, help="bytes of the text (default 17: StableDiffusionV1)")
    options = p.parse_args(argv)

    from ldm.data.pictures import read_picture
    from ldm.evaluate.watermark import read_watermark

    print(read_watermark(read_picture(options.picture), options.length))


if __name__ == "__main__":
    run_command(main)
