"""Why a model predicts what it does: `attribution.py` which tokens or patches a prediction hangs
on, `attention.py` where attention flows, `neighbours.py` which training rows are like it,
`tracing.py` where these came from and when they were learnt, `explain.py` asks them."""
