"""Fixtures of the decode tests."""

from __future__ import annotations

import os

import pytest

from pipeline.decode.torchcodec_backend import video_decoder_class
from pipeline.errors import UsageError


@pytest.fixture
def torchcodec_or_skip():
    try:
        video_decoder_class()
    except UsageError as error:
        if os.environ.get("FAIL_WITHOUT_TORCHCODEC"):
            pytest.fail(str(error))
        pytest.skip(f"NOT TESTED: {error}")
