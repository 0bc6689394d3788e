"""Makes a checkpoint of another program's model; quantized tensors keep their codes.

    python -m experiments.import --model model.gguf --out imported

The checkpoint is what `experiments.generate`, `experiments.evaluate` and `experiments.export` take.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

import lowbit_jax as lb
from experiments import runtime
from lowbit_jax import interop
from lowbit_jax.surgery import quantized_layers

_MODEL = flags.DEFINE_string(
    "model", None, "A GGUF file or a Hugging Face folder (float or quantized).", required=True
)
_OUT = flags.DEFINE_string("out", None, "The checkpoint to write.", required=True)
_FLOAT = flags.DEFINE_bool(
    "float", False, "Dequantize quantized tensors, so that the model can be quantized anew."
)


def main(argv: Sequence[str]) -> None:
    """Imports."""
    del argv
    out = Path(_OUT.value)
    if out.exists():
        raise ValueError(f"--out={out}: exists already. Choose another path, or remove it.")
    found = interop.load_model(_MODEL.value, weights="float" if _FLOAT.value else "packed")
    metadata = {"source": found.source}
    if found.tokenizer is not None:
        metadata["tokenizer"] = found.tokenizer.to_json()
    lb.checkpoint.save(out, found.model, metadata=metadata)
    count = sum(1 for _ in quantized_layers(found.model))
    print(f"{out}: {found.source['architecture']}, {count} layers with their codes")


if __name__ == "__main__":
    runtime.run(main)
