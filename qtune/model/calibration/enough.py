"""How much text calibration needs: second moments of few tokens tell little about wide inputs."""

# for each weight of the widest row
TOKENS_PER_INPUT = 8


def shortage(num_tokens: int, widest: int) -> str | None:
    """What to say of a text with so few tokens, inputs being that wide; None where it is enough."""
    needed = TOKENS_PER_INPUT * widest
    if num_tokens >= needed:
        return None
    return (
        f"calibration: {num_tokens} tokens tell little about inputs {widest} wide; {needed} are "
        "better: raise quant.calibration.tokens, or name more text, as quant.calibration.text: "
        "train + FILE"
    )
