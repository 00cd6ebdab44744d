"""The trained models of the quick study, shared by the tests of its experiments on images."""

import pytest

from training.study.setup import Study


@pytest.fixture(scope="session")
def image_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Return a quick study whose models are trained once, by whichever test asks first (about a minute in all)."""
    return Study(tmp_path_factory.mktemp("image-study"))
