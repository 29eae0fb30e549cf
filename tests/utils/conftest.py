"""A Hub of one test's own."""

import pytest


@pytest.fixture
def hub(hub_server):
    """A Hub of one test's own: it fails, and ends."""
    with hub_server.HubServer() as server:
        yield server
