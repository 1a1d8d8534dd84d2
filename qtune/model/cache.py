"""Where downloaded and converted models are kept; `qtune.cache` says how one is put there."""

import hashlib
from pathlib import Path

from qtune.cache import cache_folder


def model_folder(name: str, identity: str) -> Path:
    """Place of the model whose source and conversion `identity` describes, whether there or not."""
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return cache_folder() / "models" / f"{name}-{digest[:12]}"
