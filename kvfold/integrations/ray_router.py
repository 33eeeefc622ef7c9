"""Ray Serve's parts that are loaded outside of our deployments: the request router, in every process that holds a handle,
and the autoscaling policy, in Serve's controller. No torch here. Both interfaces are alpha in Ray: see `ray_serve.TESTED`.
"""

import math
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvfold.integrations.prefix_routing import PrefixMemory, chain, ranked

SLACK = 8
"""A replica with so many requests more than the least loaded is not sent more for its prefixes' sake."""


class PrefixRouter(RequestRouter):
    """Sends a request where most of its prompt was sent before, unless that replica is crowded.

    Each router knows what it sent itself. Where it knows nothing, a hash decides, the same in all routers.
    """

    def initialize_state(self, slack: int = SLACK) -> None:
        """See Ray."""
        self._slack, self._memory = slack, PrefixMemory()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See Ray. A replica that is gone took its prefixes along."""
        super().update_replicas(replicas)
        self._memory.keep_only(replica.replica_id.unique_id for replica in replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """See Ray: one replica a rank, so that the next is asked only when the one before is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        loads = {
            replica.replica_id.unique_id: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for replica in candidate_replicas
        }
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_id[name]] for name in ranked(self._chain(pending_request), self._memory, loads, self._slack)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """See Ray."""
        self._memory.note(self._chain(pending_request), replica_id.unique_id)

    def _chain(self, request: PendingRequest | None) -> tuple[bytes, ...]:
        """Keys of what the front named as the request's prompt; none for calls of another kind."""
        call = request.args[0] if request is not None and request.args else None
        return chain(getattr(call, "prompt", b""))


class FreePages:
    """As many replicas as it takes that each uses no more than a share of its KV memory."""

    def __init__(self, target_use: float = 0.7):
        """`target_use`: bytes held and waited for, as a share of the pool, that a replica should have."""
        self.target_use = target_use

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """See Ray: the replicas wanted, before Serve's own delays and limits."""
        uses = (context.aggregated_metrics or {}).get("pool_use", {})
        if not uses:
            return context.target_num_replicas, {}
        return max(1, math.ceil(sum(uses.values()) / self.target_use - 1e-9)), {}
