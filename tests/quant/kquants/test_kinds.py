import gguf
import numpy as np
import pytest

from qtune.quant.kquants.kinds import KINDS, UNEVEN


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_those_of_the_format(name: str) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (KINDS[name].block_size, KINDS[name].type_size) == sizes


def test_uneven_levels_are_those_that_are_read() -> None:
    # one byte holds code k in both halves, the step is 1
    step = np.array([1], np.float16).view(np.uint8)
    for code, value in enumerate(UNEVEN):
        block = np.concatenate([step, np.full(16, code * 17, np.uint8)])
        read = gguf.quants.dequantize(block, gguf.GGMLQuantizationType.IQ4_NL)
        assert set(read.tolist()) == {value}
