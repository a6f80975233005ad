"""Ways for weights to travel. A module here has a class `Transport(runtime, learners, config)` with

push(receivers, version)        send the learners' weights to every receiver; returns {receiver name: future of its Receipt}
refresh(receiver, version)      send the last pushed weights to one late joiner; returns the future of its Receipt
close()
"""
