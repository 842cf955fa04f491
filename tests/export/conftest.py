"""What the tests of exports share."""

import pytest
from tiny_export import write_checkpoint, write_media


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"), ["b/2.mp4", "a.mp4", "b/1.mp4"])
