"""The state of a run on disk: every finished block, and both chains behind the last one.

Both chains are kept: making the quantized one anew, from blocks that were solved on another, is
known to end in another and worse result.

    workdir/
      run.json            what the run is; another one is refused
      events.jsonl        the report's events
      blocks/0003/        the arrays of a finished block (an orbax tree)
      chains/0003/        both chains behind it; only the latest is kept
      fits/               fits that were stopped in the middle (`unfinished`)
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit_jax.nn import QuantStat
from lowbit_jax.ptq.arrays import read_tree, write_tree
from lowbit_jax.ptq.chain import Chain
from lowbit_jax.ptq.stage import Stage, untrained_twin
from lowbit_jax.scheme import LayerScheme
from lowbit_jax.walk import layers, rebuilt


def fingerprint(
    model: nnx.Module,
    schemes: dict[str, LayerScheme],
    batches: Sequence[Any],
    pipeline: Sequence[Stage],
    blocks: str,
    seed: int,
) -> dict[str, str]:
    """Everything that a run's result depends on, by name."""
    recipe = json.dumps({path: scheme.to_dict() for path, scheme in schemes.items()})
    return {
        "model": _digest(nnx.state(model)),
        "batches": _digest(batches),
        "schemes": hashlib.sha256(recipe.encode()).hexdigest(),
        "pipeline": repr(list(pipeline)),
        "blocks": blocks,
        "seed": str(seed),
    }


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


@dataclasses.dataclass
class State:
    """What is on disk; with `folder` None nothing is, and nothing is written.

    Attributes:
        folder: Of the run.
        finished: Blocks that are on disk, from the first on.
        events: The report's events of these blocks.
    """

    folder: Path | None
    finished: int = 0
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, str]) -> "State":
        """Begins a run in a folder, or goes on with the one that is there.

        Raises:
            ValueError: It belongs to another run; the message says what differs.
        """
        if folder is None:
            return cls(None)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.json"
        if file.exists():
            known = json.loads(file.read_text())
            if differing := [name for name in identity if known.get(name) != identity[name]]:
                raise ValueError(
                    f"{folder}: holds the state of another run: {', '.join(differing)} differ. "
                    "Choose another workdir, or remove this one."
                )
        else:
            file.write_text(json.dumps(identity, indent=1))
        finished = 0
        while (folder / "blocks" / f"{finished:04d}").is_dir():
            finished += 1
        while finished and not (folder / "chains" / f"{finished - 1:04d}").is_dir():
            finished -= 1  # killed between the two: that block is solved again
        state = cls(folder, finished)
        state.events = state._kept_events()
        return state

    @property
    def log(self) -> Path | None:
        """The file of events."""
        return None if self.folder is None else self.folder / "events.jsonl"

    @property
    def fits(self) -> Path | None:
        """The folder of unfinished fits."""
        return None if self.folder is None else self.folder / "fits"

    @property
    def seconds(self) -> float:
        """Seconds that the finished blocks took."""
        return sum(row["seconds"] for row in self.rows("block"))

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, without it."""
        found = [event for event in self.events if event["kind"] == kind]
        return [{k: v for k, v in event.items() if k != "kind"} for event in found]

    def load(
        self, number: int, original: nnx.Module, schemes: dict[str, LayerScheme], transformed: bool
    ) -> tuple[nnx.Module, nnx.Module] | None:
        """A finished block, quantized and (if `transformed`) float; None if it is not on disk."""
        if self.folder is None or number >= self.finished:
            return None
        arrays = read_tree(self.folder / "blocks" / f"{number:04d}")
        twins = rebuilt(
            original, lambda path, m: untrained_twin(m, schemes[path]) if path in schemes else m
        )
        quantized = _filled(twins, arrays["quantized"])
        if not transformed:
            return quantized, quantized
        if "transformed" not in arrays:
            raise ValueError(
                f"{self.folder}: its blocks were saved without their transformed float form. Start "
                "anew in another workdir, or without keep_transformed."
            )
        return quantized, _filled(nnx.clone(original), arrays["transformed"])

    def chains(self, chain: Chain, chain_hat: Chain) -> tuple[Chain, Chain]:
        """Both chains behind the last finished block; the other arguments are those given."""
        assert self.folder is not None
        arrays = read_tree(self.folder / "chains" / f"{self.finished - 1:04d}")
        pairs = (("float", chain), ("quantized", chain_hat))
        first, second = (
            Chain([jax.numpy.asarray(x) for x in arrays[name]], given.rests)
            for name, given in pairs
        )
        return first, second

    def save(
        self,
        number: int,
        block: nnx.Module,
        original: nnx.Module,
        transformed: bool,
        chain: Chain,
        chain_hat: Chain,
    ) -> None:
        """Writes a finished block and the chains behind it; each appears whole or not at all."""
        if self.folder is None:
            return
        tree = {"quantized": _arrays(block)}
        if transformed:
            tree["transformed"] = _arrays(original)
        write_tree(self.folder / "blocks" / f"{number:04d}", tree)
        chains = {"float": chain.xs, "quantized": chain_hat.xs}
        write_tree(self.folder / "chains" / f"{number:04d}", chains)
        for old in (self.folder / "chains").iterdir():
            if old.name != f"{number:04d}":
                shutil.rmtree(old)
        shutil.rmtree(self.folder / "fits", ignore_errors=True)  # they belong to this block
        self.finished = number + 1

    def _kept_events(self) -> list[dict[str, Any]]:
        """Events up to the last finished block; those behind it are removed from the file."""
        log = self.log
        if log is None or not log.exists():
            return []
        events = []
        for line in log.read_text().splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break  # cut off by the kill
        ends = [i for i, event in enumerate(events) if event["kind"] == "block"]
        kept = events[: ends[self.finished - 1] + 1] if self.finished else []
        log.write_text("".join(json.dumps(event) + "\n" for event in kept))
        return kept


def _arrays(block: nnx.Module) -> dict[str, Any]:
    """Every array of a block by path, parameters and statistics apart."""
    kinds: dict[str, dict[str, Any]] = {"parameters": {}, "statistics": {}}
    for path, variable in nnx.to_flat_state(nnx.state(block)):
        kind = "statistics" if isinstance(variable, QuantStat) else "parameters"
        kinds[kind]["/".join(map(str, path))] = variable[...]
    return {kind: arrays for kind, arrays in kinds.items() if arrays}


def _filled(block: nnx.Module, arrays: dict[str, Any]) -> nnx.Module:
    """A block with these arrays; a transform may have added some (a bias that was None)."""
    modules = dict(layers(block))
    for kind, cls in (("parameters", nnx.Param), ("statistics", QuantStat)):
        for path, array in arrays.get(kind, {}).items():
            parent, _, name = path.rpartition("/")
            variable = getattr(modules[parent], name, None)
            if isinstance(variable, nnx.Variable):
                variable.set_value(jax.numpy.asarray(array))
            else:
                setattr(modules[parent], name, cls(jax.numpy.asarray(array)))
    return block
