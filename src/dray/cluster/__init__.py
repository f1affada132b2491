"""Ray as dray sees it. What the workers do is not known here.

`connection.py` connects, `local_ray.py` starts a Ray here and finds the token that a cluster wants;
`nodes.py` knows what the nodes have and see, `workers.py` starts worker groups.
"""
