"""Where a controller's checkpoint is kept: in Ray's own key-value store."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
from typing import Any

import cloudpickle  # type: ignore[import-untyped,unused-ignore]
from ray.experimental import internal_kv

from fastapi_graph.backends.ray.messages import Offer
from fastapi_graph.backends.ray.records import Checkpoint

__all__ = ["CheckpointStore"]

KV_NAMESPACE = b"fastapi_graph"

logger = logging.getLogger("fastapi_graph")


class CheckpointStore:
    """Keeps the checkpoint of one graph. Its methods block: call them in a thread.

    Offers hold the pickled code and may be large, so each has a key of its own, named by its
    content and written once.

    Args:
        prefix: What the keys begin with; no other graph's may begin with it.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()
        self._keys: dict[str, tuple[Offer, bytes]] = {}
        self._written: set[bytes] = set()

    def load(self) -> Checkpoint | None:
        """Return the checkpoint, or None if there is none that can be read.

        One that another release of this package has written may be of no use; then the graph
        begins anew.
        """
        body = self._get(b"state")
        if body is None:
            return None
        try:
            checkpoint, keys = pickle.loads(body)
            bodies = [self._get(key) or b"" for key in keys]
            return self._joined(checkpoint, [pickle.loads(item) for item in bodies], keys)
        except Exception:
            logger.exception("the checkpoint cannot be read")
            return None

    def _joined(self, checkpoint: Checkpoint, offers: list[Offer], keys: list[bytes]) -> Checkpoint:
        versions = tuple(
            dataclasses.replace(saved, offer=offer)
            for saved, offer in zip(checkpoint.versions, offers, strict=True)
        )
        self._written = set(keys)
        return dataclasses.replace(checkpoint, versions=versions)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint over the former one."""
        keys = [self._save_offer(saved.offer) for saved in checkpoint.versions]
        # What the state refers to is written before it and deleted after it.
        nothing: Any = None
        bare = tuple(dataclasses.replace(saved, offer=nothing) for saved in checkpoint.versions)
        state = dataclasses.replace(checkpoint, versions=bare)
        self._put(b"state", pickle.dumps((state, keys)))
        for key in self._written - set(keys):
            internal_kv._internal_kv_del(self._prefix + key, namespace=KV_NAMESPACE)
        self._written = set(keys)
        current = {saved.offer.version for saved in checkpoint.versions}
        self._keys = {name: item for name, item in self._keys.items() if name in current}

    def delete(self) -> None:
        """Delete all that was saved."""
        internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=KV_NAMESPACE)
        self._keys.clear()
        self._written.clear()

    def _save_offer(self, offer: Offer) -> bytes:
        saved, key = self._keys.get(offer.version, (None, b""))
        if saved is offer:
            return key
        body = cloudpickle.dumps(offer)
        key = b"offer:" + hashlib.sha256(body).hexdigest().encode()
        if key not in self._written:
            self._put(key, body)
            self._written.add(key)
        self._keys[offer.version] = (offer, key)
        return key

    def _get(self, key: bytes) -> bytes | None:
        value: bytes | None = internal_kv._internal_kv_get(
            self._prefix + key, namespace=KV_NAMESPACE
        )
        return value

    def _put(self, key: bytes, value: bytes) -> None:
        internal_kv._internal_kv_put(self._prefix + key, value, True, namespace=KV_NAMESPACE)
