"""Documents that the float model writes itself: samples beside those of the calibration text."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lowbit_jax.generation.generate import LanguageModel
from lowbit_jax.generation.self_generated import generated_tokens
from lowbit_jax.ptq.stage import ModelWork


@dataclasses.dataclass(frozen=True)
class Written:
    """LLM-QAT's data (arXiv:2305.17888, section 3.1) for a stage that trains the whole model.

    Calibration texts are short, and what moves every code soon knows them by heart; a float model
    writes as much of its own distribution as is wanted, and its predictions are the target anyway.
    Documents are as long as the calibration's sequences.

    Attributes:
        documents: How many; 0: none.
        first: The token that every document begins with, such as one that begins a text. None: one
            drawn uniformly, and `greedy` most likely ones behind it, as in the paper.
        greedy: See `first`.
        batch: Documents that are written at once.
    """

    documents: int = 0
    first: int | None = None
    greedy: int = 4
    batch: int = 64

    def __post_init__(self):
        if self.documents < 0 or self.batch < 1 or self.greedy < 0:
            raise ValueError(
                f"Written: documents={self.documents}, greedy={self.greedy}, batch={self.batch}: "
                "the first two are at least 0, the last 1."
            )

    def samples(self, work: ModelWork) -> list[Any]:
        """The run's batches, and what the float model wrote behind them.

        Raises: NotImplementedError: Documents of a model that writes none, or whose batches are not
            arrays of tokens [sequences, length].
        """
        batches = list(work.batches)
        if not self.documents:
            return batches
        model = work.reference
        tokens = isinstance(batches[0], np.ndarray | jax.Array) and batches[0].ndim == 2
        if not isinstance(model, LanguageModel) or not tokens:
            raise NotImplementedError(
                f"Written: a {type(model).__name__} writes no documents, since it has no "
                "`init_cache`, `features` and `logits` (generation.LanguageModel), or its batches "
                "are not arrays of tokens [sequences, length]. Leave documents=0."
            )
        made = generated_tokens(
            model,
            self.documents,
            batches[0].shape[1],
            key=jax.random.fold_in(work.key, 1),
            greedy=self.greedy if self.first is None else 0,
            batch=min(self.batch, self.documents),
            first=self.first,
        )
        done = 0
        for part in made:
            batches.append(part.astype(batches[0].dtype))
            done += len(part)
            work.emit("progress", stage="Written", step=done, steps=self.documents)
        return batches
