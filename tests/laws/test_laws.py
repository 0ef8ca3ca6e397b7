"""Every method, adapter and variant against every law; a new file in methods/ is found by itself."""

import pytest

from tests.fixtures.laws import everything, label
from tests.laws.laws import LAWS


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("method", everything(), ids=label)
def test_law(method, law):
    law(method)
