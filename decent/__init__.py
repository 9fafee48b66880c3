"""Everything that knows there is more than one worker."""

from decent.allreduce_dp import AllReduceDP
from decent.decent_dp import DecentDP
from decent.topology import Topology, build_topology
from decent.world import PeerError, SetupError, World

__all__ = ["AllReduceDP", "DecentDP", "PeerError", "SetupError", "Topology", "World", "build_topology"]
