"""What rules that contradict each other say together: a majority, or a model of how often each rule
is right, learnt without any label.

The model is that of independent rules with one accuracy each (Ratner et al., 2016, Data
programming). Each accuracy is found by how well a rule agrees with the others. How frequent labels
are is given, not learnt: rules that each speak for one label and seldom meet cannot tell it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dray.tasks.parts.rules import ABSTAINS

Votes = npt.NDArray[np.int8]
"""[records, rules]: a label, or ABSTAINS."""
Floats = npt.NDArray[np.float64]

PRIOR_ACCURACY, PRIOR_WEIGHT = 0.7, 30.0
"""What a rule is taken for before others have met it, and as how many records of certain labels
that counts."""
BETTER_THAN_CHANCE, MOST_ACCURACY = 0.02, 0.99
"""A rule is never taken for worse than chance, nor for certain."""
MOST_ROUNDS, CLOSE = 200, 1e-6


@dataclass(frozen=True)
class LabelModel:
    """How often each rule is right where it votes; `prior`: how frequent labels are."""

    accuracies: Floats
    prior: Floats

    def shares(self, votes: Votes) -> Floats:
        """The probability of each label, [records, labels]; without any vote the prior."""
        num = len(self.prior)
        right = np.log(self.accuracies)
        wrong = np.log((1 - self.accuracies) / (num - 1))
        found = np.broadcast_to(np.log(self.prior), (len(votes), num)).copy()
        for label in range(num):
            agrees = votes == label
            others = (votes != ABSTAINS) & ~agrees
            found[:, label] += agrees @ right + others @ wrong
        found = np.exp(found - found.max(axis=1, keepdims=True))
        shares: Floats = found / found.sum(axis=1, keepdims=True)
        return shares


def majority(votes: Votes, num_labels: int) -> Floats:
    """Shares of the votes for each label; without any vote all alike."""
    counts = np.stack([(votes == label).sum(axis=1) for label in range(num_labels)], axis=1)
    total = counts.sum(axis=1, keepdims=True)
    shares: Floats = np.where(total > 0, counts / np.maximum(total, 1), 1 / num_labels)
    return shares


def fit(votes: Votes, prior: Floats) -> LabelModel:
    """A label model of the records that have votes."""
    voted = votes[(votes != ABSTAINS).sum(axis=1) > 1]  # alone a vote says nothing of its rule
    start = np.full(votes.shape[1], PRIOR_ACCURACY)
    model = LabelModel(_accuracies(voted, LabelModel(start, prior)), prior)
    speaks = [len({*votes[:, rule].tolist()} - {ABSTAINS}) for rule in range(votes.shape[1])]
    for _ in range(MOST_ROUNDS):
        # Rules of one label each agree with all others of it, whatever is true: asked again, one
        # side would take all the blame for where both sides meet.
        moving = np.where(np.array(speaks) > 1, _accuracies(voted, model), model.accuracies)
        again = LabelModel(moving, prior)
        moved = np.abs(again.accuracies - model.accuracies).max(initial=0.0)
        model = again
        if moved < CLOSE:
            break
    return model


def _accuracies(votes: Votes, model: LabelModel) -> Floats:
    """How often each rule is right, by what the others say where it votes.

    Of a record where the others give the shares p, a rule of accuracy a votes for a label of the
    mean share a·A + (1 - a)·B, with A the sum of p² and B = (1 - A) / (labels - 1). The mean over
    records is solved for a. A rule is never judged by itself: rules that each speak for one label
    alone would all find themselves right.
    """
    num = len(model.prior)
    found = np.empty(votes.shape[1])
    for rule in range(votes.shape[1]):
        own = votes[votes[:, rule] != ABSTAINS]
        label = own[:, rule].astype(np.int64)
        others = own.copy()
        others[:, rule] = ABSTAINS
        shares = model.shares(others)
        same = (shares**2).sum(axis=1)
        apart = (1 - same) / (num - 1)
        given = np.take_along_axis(shares, label[:, None], axis=1)[:, 0]
        weight = (same - apart).sum()
        right = (given - apart).sum()
        found[rule] = (right + PRIOR_ACCURACY * PRIOR_WEIGHT) / (weight + PRIOR_WEIGHT)
    clipped: Floats = np.clip(found, 1 / num + BETTER_THAN_CHANCE, MOST_ACCURACY)
    return clipped
