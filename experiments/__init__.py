"""Entry points: `python -m experiments.train --config qat_ternary.py` and the others."""
