"""The prepared no-download tier, made once for all test files that ask for it."""

import pytest
from data_cases import corpus_config

from train.data import prepare_data
from train.tokenizer import TokenizerConfig


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(data_cache):
    """The no-download tier with a small BPE."""
    return prepare_data(corpus_config(data_cache), TokenizerConfig(vocab_size=512), progress=False)
