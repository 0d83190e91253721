from tests.processes import start

__all__ = ["start"]
