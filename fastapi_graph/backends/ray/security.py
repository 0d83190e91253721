"""TLS for direct connections: wherever Ray itself is told to use it, with the same files.

https://docs.ray.io/en/latest/ray-core/configure.html#tls-authentication
"""

from __future__ import annotations

import os
import ssl

from fastapi_graph.errors import SettingsError

__all__ = ["client_context", "server_context"]

_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


def server_context() -> ssl.SSLContext | None:
    """Return what a replica listens with; None without TLS.

    Raises:
        SettingsError: TLS is switched on and a file is not named.
    """
    return _context(ssl.Purpose.CLIENT_AUTH)


def client_context() -> ssl.SSLContext | None:
    """Return what a client connects with; None without TLS.

    Raises:
        SettingsError: TLS is switched on and a file is not named.
    """
    return _context(ssl.Purpose.SERVER_AUTH)


def _context(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
        return None
    try:
        certificate, key, authority = (os.environ[name] for name in _FILES)
    except KeyError as error:
        raise SettingsError(f"RAY_USE_TLS is set and {error.args[0]} is not") from None
    context = ssl.create_default_context(purpose, cafile=authority)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = False  # Ray's certificates are for the cluster, not for a host
    return context
