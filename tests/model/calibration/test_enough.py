from qtune.model.calibration.enough import shortage


def test_a_wide_input_needs_eight_tokens_a_weight():
    assert shortage(8 * 96, 96) is None
    words = shortage(8 * 96 - 1, 96)
    assert words is not None
    assert "767 tokens tell little about inputs 96 wide; 768 are better" in words
    assert "quant.calibration.tokens" in words
