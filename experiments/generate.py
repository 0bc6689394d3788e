"""Text from a model, as it comes.

python -m experiments.generate --checkpoint runs/qat_ternary --prompt "def "
"""

from collections.abc import Sequence
from typing import cast

import jax
from absl import flags

from experiments import runtime
from lowbit_jax.generation import stream_text
from lowbit_jax.generation.quantized_cache import KIVI, SPECS, CacheFormat
from lowbit_jax.training.runs import load_checkpoint

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run's folder, its packed/, or another checkpoint.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", "def ", "What the text begins with.")
_LENGTH = flags.DEFINE_integer("length", 200, "Tokens to write.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0: always the most likely token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among so many tokens; 0: all.", lower_bound=0)
_KV_CACHE = flags.DEFINE_enum(
    "kv_cache", "float", ["float", *SPECS, *KIVI], "What keys and values are held in."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def main(argv: Sequence[str]) -> None:
    """Generates."""
    del argv
    loaded = load_checkpoint(_CHECKPOINT.value, prepare=True)
    pieces = stream_text(
        loaded.model,
        loaded.tokenizer(),
        _PROMPT.value,
        _LENGTH.value,
        key=jax.random.key(_SEED.value),
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value or None,
        cache_format=cast(CacheFormat, _KV_CACHE.value),
    )
    print(_PROMPT.value, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    runtime.run(main)
