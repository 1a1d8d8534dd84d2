"""qtune: one recipe in, one measured model out.

`import qtune` registers the quantizer with transformers and the adapter layer with PEFT, so that
quantized folders load with `AutoModelForCausalLM.from_pretrained`. The registration waits until
transformers is imported: the command line answers `--help` without it.

`qtune.load` hands a quantized model to other libraries.
"""

from qtune.api import load
from qtune.recipe import Lora, Quant
from qtune.registration import install

__all__ = ["Lora", "Quant", "load"]

install()
