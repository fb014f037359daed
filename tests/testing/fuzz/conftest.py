"""One set of small folders for all tests of the fuzzer; read only."""

import pytest

from bitmend.testing.fuzz.folders import make_folders


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz")
    make_folders(place / "folders")
    return place
