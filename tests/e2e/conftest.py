"""Who speaks to a module's own `gateway`, where nothing about them matters to the tests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.gateway import RunningGateway
from tests.support.officers import Hand
from tests.support.sdk import openai_client


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway, "app") as opened:
        yield opened


@pytest.fixture(scope="module")
def auditor(gateway: RunningGateway) -> Hand:
    return Hand(gateway, "auditor")
