"""Own a Ray cluster until standard input ends: `python -m tests.benchmarks.ray_suite.cluster`.

The address is printed when it runs. When the suite is gone, however it went, so is the cluster.
"""

from __future__ import annotations

import signal
import sys

import ray

CPUS = 8  # each deployment of Ray Serve claims one, whatever the machine has


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = ray.init(address="local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    print("address", context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
