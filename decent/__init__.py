"""Everything that knows there is more than one worker."""

from decent.allreduce_dp import AllReduceDP
from decent.checkpoint import Checkpoints, find_start
from decent.decent_dp import DecentDP
from decent.liveness import Liveness, PeerError
from decent.stop import StopRequest
from decent.topology import Topology, build_topology, default_topology
from decent.world import SetupError, World, keep_freed_memory

__all__ = [
    "AllReduceDP",
    "Checkpoints",
    "DecentDP",
    "Liveness",
    "PeerError",
    "SetupError",
    "StopRequest",
    "Topology",
    "World",
    "build_topology",
    "default_topology",
    "find_start",
    "keep_freed_memory",
]
