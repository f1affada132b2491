"""Ray as dray sees it. What the workers do is not known here.

`connection.py` connects, `local_ray.py` starts a Ray here and finds the token that a cluster wants;
`needs.py` is what a worker takes of a node, `nodes.py` knows what the nodes have and see,
`autoscaler.py` which may still join. `placement.py`
is the part of a Ray that a run may use, `workers.py` starts worker groups, and `groups.py` puts
them there.
"""
