"""Fixtures that several test files use."""

import pytest
from support.models import tiny_llama


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a saved tiny LLaMA."""
    folder = str(tmp_path_factory.mktemp("llama"))
    tiny_llama().save_pretrained(folder)
    return folder
