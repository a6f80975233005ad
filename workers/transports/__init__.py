"""Ways for weights to travel. A module here has a class `Transport(runtime, learners, config)` with

push(receivers, version, concurrent)      send the learners' weights to every receiver; returns {receiver name: future of its Receipt}
refresh(receiver, version, concurrent)    send the last pushed weights to one late joiner; returns the future of its Receipt
close()

and may state `NEEDS_GPUS = True` (False by default): learners and generators must have GPUs.

`concurrent` (False by default): generators receive them between two steps of the batch that they are at, instead of after it.
"""

CONTRACT = ("Transport(runtime, learners, config)",)
