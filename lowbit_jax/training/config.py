"""What one run is, as data: mutable dataclasses, so that `--config.optim.lr=3e-4` sets a field.

Fields hold plain ints, floats, strings and booleans only: a config is one JSON object, two configs
can be compared field by field, and a wrong value is refused by `validate` before anything is
written.
"""

import dataclasses
from typing import Any

from lowbit_jax.training.fields import at_variant, replaced


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The decoder's sizes; vocabulary and compute dtype come from the tokenizer and the run.

    head_dim: Features of one head; 0: dim // heads.
    max_length: Longest context of the model, in tokens; prompts and samples have to fit as well.
    stacked: Layers as one scanned stack: compiles in constant time, wants one scheme for all
        layers.
    """

    dim: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    ffn_dim: int = 640
    head_dim: int = 0
    max_length: int = 512
    tied: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    sub_norm: bool = False
    stacked: bool = False


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens.

    source: "stdlib", "text:GLOB" or "hf:NAME[:CONFIG]".
    tokenizer: "bytes", "file:PATH" or "train:VOCAB" (trained on the corpus).
    separator: The string between two documents.
    valid_fraction: Share of documents held out, where the source brings no split of its own.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    separator: str = "\n\n"
    valid_fraction: float = 0.05


@dataclasses.dataclass(kw_only=True)
class OptimConfig:
    """AdamW and its schedule.

    lr: Peak learning rate.
    warmup: Steps of linear warm-up, starting from lr / warmup; 0: none.
    schedule: "cosine" (to `final_lr` of the peak), "two_stage" (see training/schedule.py) or
        "constant".
    final_lr: Learning rate of the last step, as a share of the peak.
    stage2_lr, stage2_decay: What the second half multiplies learning rate and weight decay by
        ("two_stage" only).
    clip: Largest global gradient norm; 0: no clipping.
    scale_lr: Multiplies the learning rate of learned quantizer scales (`*_scale`).
    """

    lr: float = 3e-3
    warmup: int = 50
    schedule: str = "cosine"
    final_lr: float = 0.05
    stage2_lr: float = 0.5
    stage2_decay: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    scale_lr: float = 1.0


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1: all that are left."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(kw_only=True)
class DistillConfig:
    """Knowledge distillation (arXiv:1503.02531): off while `teacher` is empty.

    teacher: A float checkpoint: a run folder, its `packed/`, or any lb.checkpoint folder.
    temperature: Softens both distributions.
    weight: Share of the loss that the teacher's divergence gets; the labels get the rest.
    """

    teacher: str = ""
    temperature: float = 2.0
    weight: float = 0.5


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """One run: `train(config, workdir)` reads nothing else.

    recipe: A preset's name, "pattern=preset;pattern=preset", recipe JSON, or "" for float.
    batch: Sequences of one update, over all devices and all `accumulate` parts.
    length: Tokens of one training sequence.
    accumulate: Parts the batch is cut into, one after the other, to save memory.
    calibrate_every: Steps between calibrations of static activation statistics, where there are
        any.
    eval_batches: Validation batches of one evaluation while training.
    final_batches: Validation batches of the evaluation at the end; 0: the whole split.
    init_from: A float checkpoint to start from; "": random weights.
    """

    name: str = "run"
    recipe: str = ""
    steps: int = 600
    batch: int = 8
    length: int = 128
    accumulate: int = 1
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 25
    eval_every: int = 100
    eval_batches: int = 16
    final_batches: int = 64
    checkpoint_every: int = 100
    calibrate_every: int = 200
    init_from: str = ""
    sample_prompt: str = "def "
    sample_length: int = 200
    sample_temperature: float = 0.8
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)

    def variant(self, name: str, **variants: dict[str, Any]) -> "TrainConfig":
        """This config at another size, named `<name>_<variant>`; "" is the config itself.

        Every config has "smoke" (a minute on two cores), "study" and "pod" (the real size); keyword
        arguments add to these or to new ones: `variant(name, smoke={"optim.lr": 1e-3})`.
        """
        return at_variant(self, name, VARIANTS, variants)

    def replace(self, changes: dict[str, Any]) -> "TrainConfig":
        """A copy with the fields of dotted path set: `replace({"optim.lr": 1e-3})`."""
        return replaced(self, changes)


# "smoke" proves the machinery; its numbers mean nothing. "study" is what experiments.study runs:
# 20 M tokens for 0.13 M parameters, which one core trains in ten minutes. "pod" is GPT-2 small's
# size on WikiText-103.
VARIANTS: dict[str, dict[str, Any]] = {
    "smoke": {
        "model.dim": 64,
        "model.layers": 3,
        "model.heads": 2,
        "model.kv_heads": 2,
        "model.ffn_dim": 192,
        "length": 64,
        "steps": 60,
        "optim.warmup": 10,
        "log_every": 10,
        "eval_every": 30,
        "eval_batches": 2,
        "final_batches": 8,
        "checkpoint_every": 30,
        "calibrate_every": 30,
    },
    "study": {
        "model.dim": 64,
        "model.layers": 2,
        "model.heads": 2,
        "model.kv_heads": 2,
        "model.ffn_dim": 160,
        "batch": 16,
        "length": 128,
        "steps": 9800,
        "optim.warmup": 200,
        "log_every": 100,
        "eval_every": 980,
        "final_batches": 0,
        "checkpoint_every": 490,
    },
    "pod": {
        "model.dim": 768,
        "model.layers": 12,
        "model.heads": 12,
        "model.kv_heads": 12,
        "model.ffn_dim": 2048,
        "model.max_length": 2048,
        "model.tied": True,
        "model.stacked": True,
        "data.source": "hf:Salesforce/wikitext:wikitext-103-raw-v1",
        "data.tokenizer": "train:50304",
        "mesh.data": 1,
        "mesh.fsdp": -1,
        "dtype": "bfloat16",
        "batch": 512,
        "length": 1024,
        "steps": 10000,
        "optim.warmup": 500,
        "optim.lr": 1e-3,
        "log_every": 50,
        "eval_every": 500,
        "eval_batches": 8,
        "final_batches": 0,
        "checkpoint_every": 1000,
        "sample_prompt": "The ",
    },
}
