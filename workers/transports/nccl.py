"""Weights by NCCL broadcast: the way between GPUs."""

from workers.transports._collective import CollectiveTransport

NEEDS_GPUS = True


class Transport(CollectiveTransport):
    """See `workers.transports`."""

    backend = "nccl"
