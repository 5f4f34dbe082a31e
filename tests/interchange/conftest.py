"""What the tests of file formats share."""

from functools import cache

import pytest

from tests import interchange_models


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return interchange_models.small_config(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Tiny bases by their names, `v1`, `sd2` and `sdxl`, each made once."""
    from tests.interchange.whole_bases import Case

    return cache(lambda base: Case(base, tmp_path_factory.mktemp(base)))
