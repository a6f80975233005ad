"""Weights by NCCL broadcast: the way between GPUs."""

from workers.transports.collective import CollectiveTransport


class Transport(CollectiveTransport):
    """See `workers.transports`."""

    backend = "nccl"
