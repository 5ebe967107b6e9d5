"""The filter that leaves a webhook's receiver out of the banned networks."""

import runpy
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

PLUGIN = Path(__file__).resolve().parents[2] / "roles/label_studio/filter_plugins/networks.py"
without_address: Callable[[list[str], str], list[str]] = runpy.run_path(str(PLUGIN))["without_address"]
BANNED = ["10.0.0.0/8", "127.0.0.0/8", "255.255.255.255/32", "::1/128", "fc00::/7"]


@pytest.mark.parametrize("receiver", ["127.0.0.9", "10.1.2.3", "fd00::5", "::1", "255.255.255.255"])
def test_only_the_receiver_is_left_out(receiver: str) -> None:
    networks = [ip_network(text) for text in without_address(BANNED, receiver)]
    assert not any(ip_address(receiver) in network for network in networks)
    assert (
        sum(network.num_addresses for network in networks) == sum(ip_network(text).num_addresses for text in BANNED) - 1
    )


def test_without_a_receiver_all_stay() -> None:
    assert without_address(BANNED, "") == BANNED
