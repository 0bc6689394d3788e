"""The rows of the MNIST table: which network of which paper, and how it is trained here.

Papers trained for up to 1000 epochs on GPUs; three seeds of a row are to end within half an hour
on two cores, so that epochs are fewer and rates decay faster. What else differs stands in `note`.
"""

import dataclasses

import lowbit_jax as lb
from lowbit_jax.models import LeNetConfig, MLPConfig
from lowbit_jax.training.classifier import ClassifierConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: Of its folders and of `--rows`.
        title: What the table says.
        paper: arXiv number.
        figure: Test error in the paper, in percent; None: the paper has none for MNIST.
        model: The float network.
        recipe: As `Recipe.from_string` reads it; "" for float.
        training: Optimizer, epochs and the like.
        note: What differs from the paper.
    """

    name: str
    title: str
    paper: str
    figure: float | None
    model: MLPConfig | LeNetConfig
    recipe: str
    training: ClassifierConfig
    note: str


# Latent weights live in [-1, 1] and take steps as large as the inverse of Glorot's range; the best
# epoch is chosen on the last 10,000 training images, which are not trained on.
_BINARY = ClassifierConfig(
    epochs=30,
    batch=200,
    optimizer="adam",
    lr=1e-3,
    final_lr=3e-6,
    glorot_lr=True,
    clip=1.0,
    validation=10_000,
)
_LENET = ClassifierConfig(
    epochs=10, batch=50, optimizer="sgd", lr=0.01, drops=(0.5, 0.8), weight_decay=1e-4
)
_XNOR = ClassifierConfig(epochs=6, batch=100, optimizer="adam", lr=1e-3, final_lr=1e-5)

_BINARY_NOTE = (
    "Adam with rates scaled per layer (section 2.5 of the paper); its section 3.1 used SGD, 1000 "
    "epochs"
)
_LENET_NOTE = "10 epochs, rates a tenth behind 50 % and 80 % of them; pooled before the norm"
_XNOR_NOTE = (
    "the paper's networks are larger, on ImageNet; first and last layer are float, as there"
)


def rows() -> list[Row]:
    """All rows, in the order of the table."""
    mlp = MLPConfig(784, (1024, 1024, 1024), 10, norm=True)
    wide = MLPConfig(784, (2048, 2048, 2048), 10, norm=True, activation="hard_tanh")
    signs = LeNetConfig(activation="hard_tanh")
    scaled = lb.LayerScheme(weight=lb.XNOR(lb.QuantSpec(format=lb.BINARY)))
    inner = "layers/1/conv|hidden"
    return [
        Row(
            name="mlp-float",
            title="MLP 3 x 1024, float",
            paper="1511.00363",
            figure=1.30,
            model=mlp,
            recipe="",
            training=dataclasses.replace(_BINARY, glorot_lr=False, clip=None),
            note="the paper's row without a regularizer; Adam, its section 3.1 used SGD",
        ),
        Row(
            name="binaryconnect",
            title="BinaryConnect, MLP 3 x 1024",
            paper="1511.00363",
            figure=1.29,
            model=mlp,
            recipe=".*=w1a16_bc",
            training=_BINARY,
            note=f"deterministic; {_BINARY_NOTE}",
        ),
        Row(
            name="bnn",
            title="BNN, MLP 3 x 2048",
            paper="1602.02830",
            figure=0.96,
            model=wide,
            recipe="layers/0=w1a16_bc;.*=w1a1_bnn",
            training=dataclasses.replace(_BINARY, epochs=12),
            note="the paper's is 3 x 4096 with dropout and 1000 epochs; pixels enter as they are",
        ),
        Row(
            name="lenet-float",
            title="LeNet-5, float",
            paper="1605.04711",
            figure=0.59,
            model=LeNetConfig(),
            recipe="",
            training=_LENET,
            note=_LENET_NOTE,
        ),
        Row(
            name="twn",
            title="TWN, LeNet-5",
            paper="1605.04711",
            figure=0.65,
            model=LeNetConfig(),
            recipe=".*=w1_58a16_twn",
            training=_LENET,
            note=_LENET_NOTE,
        ),
        Row(
            name="bpwn",
            title="Binary weights (BPWN), LeNet-5",
            paper="1605.04711",
            figure=0.95,
            model=LeNetConfig(),
            recipe=".*=w1a16",
            training=_LENET,
            note=_LENET_NOTE,
        ),
        Row(
            name="xnor-weights",
            title="XNOR-Net's binary weights, LeNet-5",
            paper="1603.05279",
            figure=None,
            model=LeNetConfig(),
            recipe=lb.Recipe(lb.Rule(inner, scaled)).to_json(),
            training=_XNOR,
            note=_XNOR_NOTE,
        ),
        Row(
            name="xnor",
            title="XNOR-Net, LeNet-5",
            paper="1603.05279",
            figure=None,
            model=signs,
            recipe=f"{inner}=w1a1_xnor",
            training=_XNOR,
            note=f"{_XNOR_NOTE}; no scales of activations",
        ),
    ]
