"""What the tests of conversions share."""

import pytest
from published import ARGUMENTS, read_state_dict

from av_mae import convert


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    """Work directory of a golden file, made once by the command."""
    folder = tmp_path_factory.mktemp("converted")

    def make(name):
        output = folder / name
        if not output.exists():
            convert.main([f"--source={shared / 'golden' / name}", f"--output={output}", *ARGUMENTS])
        return output

    return make


@pytest.fixture
def golden(shared):
    """Tensors of a golden file, to be changed."""
    return lambda name="factorized_mmi.pth": read_state_dict(shared / "golden" / name)
