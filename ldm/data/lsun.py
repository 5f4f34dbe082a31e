"""LDM's data sets of LSUN (arXiv 1506.03365), from folders of pictures under the published names and places."""

from __future__ import annotations

from ldm.data.listed import ListedPictures


class LSUNBase(ListedPictures):
    """The pictures of `data_root` that `txt_file` lists, or all of them if there is no such file."""

    places: tuple[str | None, str | None] = (None, None)  # list, folder
    flips = 0.5

    def __init__(
        self,
        txt_file: str | None = None,
        data_root: str | None = None,
        size: int = 256,
        interpolation: str = "bicubic",
        flip_p: float | None = None,
        seed: int = 0,
    ) -> None:
        flips = self.flips if flip_p is None else flip_p
        root = data_root or self.places[1] or "data/lsun"
        super().__init__(root, txt_file or self.places[0], size, interpolation, flips, seed=seed)


class LSUNChurchesTrain(LSUNBase):
    places = "data/lsun/church_outdoor_train.txt", "data/lsun/churches"


class LSUNChurchesValidation(LSUNBase):
    places, flips = ("data/lsun/church_outdoor_val.txt", "data/lsun/churches"), 0.0


class LSUNBedroomsTrain(LSUNBase):
    places = "data/lsun/bedrooms_train.txt", "data/lsun/bedrooms"


class LSUNBedroomsValidation(LSUNBase):
    places, flips = ("data/lsun/bedrooms_val.txt", "data/lsun/bedrooms"), 0.0


class LSUNCatsTrain(LSUNBase):
    places = "data/lsun/cat_train.txt", "data/lsun/cats"


class LSUNCatsValidation(LSUNBase):
    places, flips = ("data/lsun/cat_val.txt", "data/lsun/cats"), 0.0
