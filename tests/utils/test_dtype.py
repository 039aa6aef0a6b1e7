import numpy as np
import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.utils.dtype import NAMES, as_torch_dtype


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_torch_agree_on_every_name(name):
    expected = torch.from_numpy(np.zeros(1, dtype=name)).dtype
    assert as_torch_dtype(name) is expected
    assert as_torch_dtype(np.dtype(name)) is expected
    assert as_torch_dtype(np.zeros(1, dtype=name).dtype.type) is expected


def test_a_torch_type_is_returned_as_it_is():
    assert as_torch_dtype(torch.bfloat16) is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("float46", '"float46" is not known .did you mean "float64"'),
        ("half", '"half"'),
        (np.dtype("U3"), "str"),
    ],
)
def test_unknown_types_are_refused(name, expected):
    with pytest.raises(ConfigError, match=expected):
        as_torch_dtype(name)
