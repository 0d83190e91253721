from __future__ import annotations

from tests.dataplane.network import certificates, network, transport
from tests.processes import start

__all__ = ["certificates", "network", "start", "transport"]
