"""Trained models behind HTTP, on Ray Serve.

`service.py` is the one place that speaks to Ray Serve: a gateway and replicas. The gateway's side:
`api.py` the routes, `schemas.py` bodies, `answers.py` OpenAI's documents, `keys.py` who may ask,
`limits.py` what a request may be, `routing.py` which replicas answer; `guard.py` and `entrance.py`
are around it, `tls.py` its certificate. A replica's side:
`loading.py` a run or a folder as a model, `answering.py` what answers by it, `checking.py` a
request within limits, `generation.py` the engine that writes, `slots.py` its forward passes,
`sampling.py` the next token, `texts.py` text from tokens. Between them: `events.py`, `refusals.py`.

Of what is watched: `asked.py` what is known of a request, `observing.py` who hears of it,
`metering.py` Prometheus' counts, `drift.py` whether requests and answers are what they were,
`request_log.py` a line of each.

Of keys and versions: `held_keys.py` keys in the storage, `versions.py` the history of a name,
`pinning.py` weights that a version is, `shares.py` which version answers, `following.py` a running
service that follows.

`dray.serve:application` is what Ray's own configurations name: `import_path` of `serve deploy` and
of KubeRay's RayService, with the fields of `Served`, or `models`, as its `args`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dray.serve.service import application as application


def __getattr__(name: str) -> Any:  # Ray Serve is slow to import
    if name == "application":
        from dray.serve.service import application

        return application
    raise AttributeError(name)
