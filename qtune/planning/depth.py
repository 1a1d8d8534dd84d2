"""What a deep model takes, told from two shallow ones of the same blocks.

Blocks that are alike take alike, so bytes grow in a straight line with their number: a run of two
and one of three blocks say what eighty take, to a thousandth and in a moment. Models whose blocks
differ are run as they are.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from qtune.model.blocks import blocks

Parts = dict[str, int]
# blocks of the first shallow model; the other has one more
FEW = 2
# what says in a configuration that blocks differ, though their weights have the same shapes
DIFFERING = ("num_kv_shared_layers", "full_attention_interval", "no_rope_layers")


def by_depth(config: Any, alike: bool, measure: Callable[[Any], Parts | None]) -> Parts | None:
    """`measure(config)`, where the blocks are alike from two models with few of them.

    None where that is what a measurement gives.
    """
    depth = config.get_text_config().num_hidden_layers
    if not alike or depth <= FEW + 1:
        return measure(config)
    few, more = measure(_with_depth(config, FEW)), measure(_with_depth(config, FEW + 1))
    if few is None or more is None:
        return None
    return {name: few[name] + (depth - FEW) * (more[name] - few[name]) for name in few}


def blocks_are_alike(model: nn.Module, config: Any) -> bool:
    """Whether all blocks of the model have the same kind and shapes, as far as can be seen."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [None]
    shapes = {
        (type(block), *((name, p.shape) for name, p in block.named_parameters()))
        for block in blocks(model)
    }
    known = all(not getattr(text, name, None) for name in DIFFERING)
    return known and len(set(kinds)) == 1 and len(shapes) == 1


def _with_depth(config: Any, depth: int) -> Any:
    made = copy.deepcopy(config)
    text = made.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    text.num_hidden_layers = depth
    return made
