"""Weights by gloo broadcast: the CPU twin of `nccl`, the same code on another process group."""

from workers.transports._collective import CollectiveTransport


class Transport(CollectiveTransport):
    """See `workers.transports`."""

    backend = "gloo"
