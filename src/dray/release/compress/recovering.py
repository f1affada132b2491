"""Training what a method has left: by the ordinary loop, as an ordinary run that resumes, in a
storage of its own inside the folder of the run that is being made.

A process that is killed leaves that storage: the same command goes on with what was trained there,
another one clears it. It is gone once the new run is kept or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from dray.corpus.prepare import Corpus
from dray.errors import SpecError
from dray.models.adapters import merge
from dray.release.compress.keeping import Contents, keep, make_compressed_spec
from dray.release.compress.method import Candidate, Method, Say
from dray.release.trained import Trained, load_trained
from dray.runs import CheckpointReader, Run
from dray.runs.finished import clear, holding_name
from dray.runs.row_log import load_json, save_json
from dray.spec import Spec
from dray.storage.filesystem import child

WORK, REQUEST, TEACHER = "work", "request.json", "teacher"


class TrainRun(Protocol):
    """Trains a spec as a run: `dray.train.driver.train`, or `train_locally`."""

    def __call__(self, spec: Spec, *, storage: str, run_name: str, corpus: Corpus) -> Any: ...


class Workshop:
    """Where candidates are trained."""

    def __init__(
        self,
        storage: str,
        name: str,
        methods: Sequence[Method],
        trained: Trained,
        *,
        train: TrainRun | None,
        say: Say,
    ) -> None:
        self._place = child(storage, name, WORK)
        self._train, self._say, self._trained = train, say, trained
        self._request = {
            "run": trained.run.name,
            "step": trained.checkpoint.step,
            "attempt": trained.checkpoint.attempt,
            "weights": trained.weights,
            "methods": [method.told() for method in methods],
        }
        self._run: Run | None = None
        self._number, self._round, self._method = 0, 0, ""

    def open(self, run: Run) -> None:
        """Take the folder of the run that is being made: what another command has left is
        cleared."""
        self._run = run
        path = f"{run.path}/{REQUEST}"
        try:
            same = load_json(run.filesystem, path) == self._request
        except FileNotFoundError:
            same = False
        clear(run, *((WORK, REQUEST) if same else ()))

    def enter(self, number: int, method: Method) -> None:
        """Say which method is at work."""
        self._number, self._round, self._method = number, 0, method.name

    def close(self) -> None:
        """Delete what was trained."""
        assert self._run is not None
        clear(self._run)

    def train(self, candidate: Candidate, steps: int, rate: float | None, **sections: Any) -> Any:
        """The candidate's model after so many steps (`method.Train`). Raises SpecError where
        nothing trains here, and what training raises."""
        if self._train is None:
            raise SpecError(
                f"--with {self._method}",
                "trains, and no training was given",
                "training is handed in from above",
                "give compress(train=dray.train.driver.train)",
            )
        assert self._run is not None
        save_json(self._run.filesystem, f"{self._run.path}/{REQUEST}", self._request)
        self._round += 1
        start = f"{self._number}-{self._method}-{self._round}"
        end = f"{start}-trained"
        if Run.find(self._place, start) is None:
            self._keep(candidate, start)
        if "distil" in sections:
            self._keep_teacher(candidate)
            sections["distil"] = {"run": TEACHER, **sections["distil"]}
        spec = self._make_spec(candidate, start, end, steps=steps, rate=rate, sections=sections)
        self._say(f"{self._method}: {steps:,} steps of training")
        trained = self._trained
        corpus = Corpus(trained.corpus, trained.manifest)
        self._train(spec, storage=self._place, run_name=end, corpus=corpus)
        return load_trained(self._place, end, unpacked=True).model

    def _keep_teacher(self, candidate: Candidate) -> None:
        """The run that is compressed, as a run of this storage."""
        if Run.find(self._place, TEACHER) is None:
            original = replace(self._trained)
            if hasattr(original.model, "dray_adapted"):
                merge(original.model)
            self._keep(replace(candidate, model=original.model, keeps_zeros=False), TEACHER)

    def _keep(self, candidate: Candidate, name: str) -> None:
        with (
            holding_name(self._place, name) as (run, driver),
            CheckpointReader(candidate.trained.run, candidate.trained.checkpoint) as reader,
        ):
            clear(run)
            contents = Contents(candidate, name)
            keep(run, driver, candidate, [], contents, manifest_sha256=reader.manifest_sha256)

    def _make_spec(
        self,
        candidate: Candidate,
        start: str,
        name: str,
        *,
        steps: int,
        rate: float | None,
        sections: dict[str, Any],
    ) -> Spec:
        """The run's own recipe for so many steps from a candidate's weights: a short warm-up, then
        straight down to a tenth."""
        trained = candidate.trained
        tree = make_compressed_spec(trained, name).model_dump(mode="json")
        optimizer = tree["optimizer"]
        optimizer["learning_rate"] = rate or float(optimizer["learning_rate"]) / 2
        if candidate.keeps_zeros:
            tree["regularization"]["keep_zeros"] = True
        labels = trained.spec.model.num_labels
        given = {
            "model": {"run": start, **({} if labels is None else {"num_labels": labels})},
            "optimizer": optimizer,
            "regularization": tree["regularization"],
            "schedule": {"name": "linear", "warmup_steps": max(1, steps // 20), "floor_share": 0.1},
            "duration": {"steps": steps},
            "validation": {**tree["validation"], "every_steps": None, "patience": None},
            "checkpoint": {"every_steps": max(1, steps // 4), "keep_last": 1},
            "tracking": {},
        }
        if trained.spec.task.tokenizes:
            given["tokenizer"] = {"run": start}
        return make_compressed_spec(trained, name, **given, **sections)
