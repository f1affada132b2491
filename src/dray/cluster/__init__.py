"""Ray as dray sees it. What the workers do is not known here.

`connection.py` connects, knows what the nodes have and starts worker groups; `local_ray.py` starts a Ray here
and finds the token that a cluster wants.
"""
