"""The data sets of faces that LDM's configs name, CelebA-HQ and FFHQ, from folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.data.listed import ListedPictures
from ldm.errors import InputError


class Faces(ListedPictures):
    """The pictures of `data_root` that `txt_file` lists, or all of them if there is no such file.

    keys: unused but for its name: the published class keeps these keys of an item, here only `image` is among them
    """

    places: tuple[str | None, str | None] = (None, None)  # list, folder

    def __init__(
        self,
        size: int = 256,
        keys: Sequence[str] | None = None,
        txt_file: str | None = None,
        data_root: str | None = None,
        seed: int = 0,
    ) -> None:
        if keys is not None and "image" not in keys:
            raise InputError(f"keys: these data sets have the key image, which {list(keys)} lacks")
        super().__init__(data_root or self.places[1] or "data/faces", txt_file or self.places[0], size, seed=seed)


class CelebAHQTrain(Faces):
    places = "data/celebahqtrain.txt", "data/celebahq"


class CelebAHQValidation(Faces):
    places = "data/celebahqvalidation.txt", "data/celebahq"


class FFHQTrain(Faces):
    places = "data/ffhqtrain.txt", "data/ffhq"


class FFHQValidation(Faces):
    places = "data/ffhqvalidation.txt", "data/ffhq"
