"""What a word is in metrics of texts: named here, since a spec names it, and counted in
`text_metrics.py`."""

from typing import Literal

Words = Literal["13a", "intl", "zh", "char"]
"""sacrebleu's names of tokenisers."""
