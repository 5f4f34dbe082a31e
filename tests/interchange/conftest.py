"""What the tests of file formats share."""

import pytest

from tests import interchange_models


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return interchange_models.small_config(tmp_path_factory.mktemp("clip"))
