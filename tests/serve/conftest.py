"""One server for the tests that change nothing about it."""

import pytest

from serving_kit import running_server


@pytest.fixture(scope="session")
def server():
    with running_server() as found:
        yield found


@pytest.fixture(scope="session")
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as found:
        yield found
