"""The methods of the literature, as sets of variables with their papers' settings.

Defaults of steps are those that a small machine bears; the papers' own are said beside them.
"""

from typing import Literal

from lowbit_jax.ptq.reconstruction.block import Reconstruction
from lowbit_jax.ptq.reconstruction.end_to_end import EndToEnd
from lowbit_jax.ptq.reconstruction.equivalence import Equivalence
from lowbit_jax.ptq.reconstruction.layer import LayerReconstruction
from lowbit_jax.ptq.reconstruction.modules import Norms
from lowbit_jax.ptq.reconstruction.optimizer import Optimizer
from lowbit_jax.ptq.reconstruction.rounding import RoundingOffset, SoftRounding, Weights
from lowbit_jax.ptq.reconstruction.scales import LearnedClipping, RangeShare, Scales, ZeroPoints
from lowbit_jax.ptq.stage import Stage


def AdaRound(steps: int = 2000, lr: float = 1e-2, regularization: float = 0.01) -> Stage:
    """Learned rounding layer by layer (arXiv:2004.10568).

    The authors take 10,000 to 20,000 steps of 32 samples at lr 1e-3; every step here sees all
    samples through their second moments, and the learning rate is ten times theirs for a tenth of
    the steps.
    """
    return LayerReconstruction((SoftRounding(lr, regularization),), steps=steps)


def BRECQ(
    steps: int = 2000,
    batch: int = 8,
    lr: float = 3e-3,
    regularization: float = 0.01,
    objective: Literal["output", "fisher"] = "output",
) -> Stage:
    """Learned rounding block by block (arXiv:2102.05426).

    The authors take 20,000 steps of 32 images at lr 1e-3. Their paper weights the squared error by
    Fisher information (Eq. 10, objective="fisher"); their program's default is the plain one, as
    here: docs/LOG.md has both measured, and the weights did not help.
    """
    variables = (SoftRounding(lr, regularization),)
    return Reconstruction(variables, objective=objective, steps=steps, batch=batch)


def QDrop(
    steps: int = 2000,
    batch: int = 8,
    lr: float = 3e-3,
    regularization: float = 0.01,
    dropped: float = 0.5,
) -> Stage:
    """BRECQ's rounding with activations that are quantized half of the time (arXiv:2203.05740).

    The authors take 20,000 steps of 32 images at lr 1e-3, and the squared error without Fisher
    weights.
    """
    variables = (SoftRounding(lr, regularization),)
    return Reconstruction(variables, steps=steps, batch=batch, dropped=dropped)


def AutoRound(steps: int = 200, batch: int = 8, bits: int = 4) -> Stage:
    """Signed gradient descent on rounding offsets and range shares (arXiv:2309.05516).

    Learning rate 1 / steps falling to zero, twice that at three bits and fewer, as in the authors'
    program.
    """
    lr = (1 if bits > 3 else 2) / steps
    return Reconstruction(
        (RoundingOffset(lr), RangeShare(lr)),
        optimizer=Optimizer("sign", "linear"),
        steps=steps,
        batch=batch,
        range="minmax",
    )


def OmniQuant(
    steps: int = 2560, batch: int = 1, lr: float = 1e-2, equivalence: Equivalence | None = None
) -> Stage:
    """Learned clipping and, if given, learned equivalence, by block (arXiv:2308.13137).

    The authors take 20 epochs of 128 sequences one by one (2,560 steps), 40 at two bits;
    `Equivalence(5e-3)` for weights, `Equivalence(1e-3, alpha=0.75)` for W4A4.
    """
    parts = () if equivalence is None else (equivalence,)
    return Reconstruction((LearnedClipping(lr),), parts, steps=steps, batch=batch, range="minmax")


def EfficientQAT(
    steps: int = 500, end_to_end_steps: int = 200, batch: int = 8, lr: float = 1e-4
) -> tuple[Stage, ...]:
    """Weights, scales and zero points by block, then scales end to end (arXiv:2407.11062).

    Two stages, to be unpacked into a pipeline. The second is trained on the float model's
    predictions instead of the next token, which needs no labels.
    """
    block = Reconstruction(
        (Weights(lr), Scales(lr * 10), ZeroPoints(lr * 100)),
        optimizer=Optimizer(decay="cosine"),
        steps=steps,
        batch=batch,
    )
    return block, EndToEnd((Scales(1e-3),), (Norms(1e-4),), steps=end_to_end_steps, batch=batch)
