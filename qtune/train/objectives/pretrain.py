"""Continued pretraining: the loss of `sft`, on rows of plain text in which every token is learned.

That is a matter of the rows (`qtune/data`), not of the loss, so the two cannot drift apart.
"""

from qtune.train.objectives.sft import Sft, make

__all__ = ["Sft", "make"]
