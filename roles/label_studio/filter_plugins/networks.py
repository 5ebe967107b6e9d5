"""A filter that leaves one address out of a list of networks."""

from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network


def without_address(networks: list[str], address: str) -> list[str]:
    """The networks, the one that holds the address split into parts that do not.

    Args:
        networks: in CIDR notation.
        address: an IP address; empty leaves the list as it is.

    Raises:
        ValueError: the address or a network is not one.
    """
    if not address:
        return networks
    left_out = ip_address(address)
    result: list[str] = []
    for text in networks:
        network = ip_network(text)
        if left_out not in network:
            result.append(text)
        elif isinstance(network, IPv4Network):
            result += [str(part) for part in sorted(network.address_exclude(IPv4Network(address)))]
        else:
            result += [str(part) for part in sorted(network.address_exclude(IPv6Network(address)))]
    return result


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[[list[str], str], list[str]]]:
        """The filters of this role."""
        return {"without_address": without_address}
