"""What keys and values in 8, 4 and 2 bits do to a 16-bit model, over 4096 tokens of a text.

    python benchmarks/kv_cache.py --text wikitext2-valid.txt

Prints a table; nothing is written.
"""

import argparse
from pathlib import Path

import torch

from qtune.evaluate.long_context import MOST_TOKENS, cache_effect, long_rows
from qtune.model.kv_cache import BITS
from qtune.model.load import load_base, load_tokenizer, register
from qtune.model.sources import resolve

# more characters than so many tokens take
CHARACTERS = 16 * MOST_TOKENS


def main() -> None:
    """Measure the model in each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    options = parser.parse_args()
    register()
    folder = resolve(options.model, report=print)
    text = options.text.read_text(encoding="utf-8")[:CHARACTERS]
    ids = load_tokenizer(folder)(text, verbose=False)["input_ids"]
    model = load_base(folder, None, device=torch.device("cpu"))
    rows = long_rows([ids], model.config)
    for bits in BITS:
        it = cache_effect(model, rows, bits)
        print(
            f"{bits} bits: {it.cache_bytes / 1e6:.1f} MB instead of "
            f"{it.cache_bytes_16bit / 1e6:.1f}, {it.loss - it.loss_16bit:+.4f} nats of "
            f"{it.tokens} tokens, KL {it.kl:.4f}, top-1 {it.top1:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
