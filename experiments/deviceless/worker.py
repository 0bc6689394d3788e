"""Compiles the cases of one device: a process of its own, whose environment is set before jax.

python -m experiments.deviceless.worker DEVICE FOLDER > rows.jsonl
"""

import json
import sys
from pathlib import Path

from experiments.deviceless import bundles, sass


def main(device: str, folder: Path) -> None:
    """Prints a line for each case: its name, tiles, and counts or the reason why there are none."""
    from experiments.deviceless import cases

    for case in cases.of(device):
        row = {"device": device, "name": case.name, "config": case.config, "tensor": case.tensor}
        try:
            if device.startswith("nvidia"):
                # What XLA makes of the arrays around it is not a Mosaic kernel, and not listed.
                codes = sass.compiled(case.function, case.arguments, folder)
                # With int8 or fp8 the rounding of x is a kernel too; the product's comes last.
                code = max(codes, key=lambda code: code.tensor)
                row |= {"count": code.loop / case.units, "spills": sum(c.spills for c in codes)}
                row |= {"registers": code.registers, "gmma": code.tensor}
            else:
                kind = cases.KINDS[device]
                count = bundles.compiled(case.function, case.arguments, kind, case.kernel, folder)
                row["count"] = count / case.units
        except Exception as error:  # whatever a compiler raises is the result of this case
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
