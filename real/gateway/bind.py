"""The address that a gateway is to listen on: whether it may and can."""

import socket

from real.gateway.api_keys import keys_from_environment
from real.gateway.config import GatewayConfig
from real.loopback import is_loopback


def check_bind(config: GatewayConfig) -> None:
    """Find out beforehand what would keep the workers from listening.

    Raises:
        ValueError: the address is open to others and no API key is set, or the variable with the keys is not.
        OSError: the port is taken.
    """
    serve = config.serve
    if not keys_from_environment(serve.api_key_env) and not is_loopback(serve.host):
        raise ValueError(
            f"serve.host {serve.host!r} can be reached from other machines, so serve.api_key_env must name an "
            "environment variable with API keys; or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            raise OSError(f"serve.port {serve.port} on {serve.host} cannot be used: {error.strerror}") from None
