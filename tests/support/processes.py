"""What tests that start several processes need."""

import socket


def free_port() -> int:
    """A port on which no process of this machine listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
