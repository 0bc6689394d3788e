"""Imports between the layers of the library point down only (design.md, section 1)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "lowbit_jax"

# The first part of a module's name behind `lowbit_jax.`, and its floor.
FLOORS = {
    **dict.fromkeys(("version", "rounding", "formats", "scale_formats", "spec"), 0),
    # calibrate needs a spec alone, and packs nothing.
    **dict.fromkeys(("packing", "blocks", "grid", "calibrate", "qtensor"), 1),
    **dict.fromkeys(("estimators", "quantizers"), 2),
    "ops": 3,
    **dict.fromkeys(
        ("scheme", "presets", "recipe", "nn", "walk", "surgery", "summary", "models"), 4
    ),
    **dict.fromkeys(("lora", "onebit"), 4),
    **dict.fromkeys(("ptq", "checkpoint", "interop", "data", "training", "evaluation"), 5),
    **dict.fromkeys(("generation", "optimizers", "reporting", "testing"), 5),
    "": 6,  # lowbit_jax itself, which gathers the names; in the library only the top floor may
}
KERNELS = ("kernels_pallas", "kernels_cpu")


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file names in an import, at any depth, with the line."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:  # `from lowbit_jax import spec` names lowbit_jax.spec
                target = f"{base}.{alias.name}"
                known = (ROOT / target.replace(".", "/")).is_dir() or (
                    ROOT / f"{target.replace('.', '/')}.py"
                ).exists()
                yield (target if known else base), node.lineno


def part(module: str) -> str:
    return [*module.split("."), ""][1]


EDGES = [
    (module, target, f"{path.relative_to(ROOT)}:{line}")
    for package in (LIBRARY, *KERNELS, "experiments", "configs")
    for module, path in modules(package)
    for target, line in imports(module, path)
]


def within(module: str, *packages: str) -> bool:
    return module.split(".")[0] in packages


def test_every_module_has_a_floor():
    assert {part(module) for module, _ in modules(LIBRARY)} <= set(FLOORS)


def test_imports_point_down_or_sideways():
    up = [
        f"{where}: {module} imports {target}, which is on a higher floor"
        for module, target, where in EDGES
        if within(module, LIBRARY) and within(target, LIBRARY)
        if FLOORS[part(target)] > FLOORS[part(module)]
        # The top floor may use the library as a user does.
        and not (part(target) == "" and FLOORS[part(module)] == 5)
    ]
    assert not up


def test_floors_below_the_fourth_hold_no_cycle():
    """Sideways imports are fine as long as they have an order."""
    below = {
        (part(module), part(target))
        for module, target, _ in EDGES
        if within(module, LIBRARY) and within(target, LIBRARY)
        if part(module) != part(target) and FLOORS[part(module)] <= 4 and part(module)
    }
    left = {name for edge in below for name in edge}
    while left:
        free = {a for a in left if not any(x == a and b in left for x, b in below)}
        assert free, f"a cycle among {sorted(left)}"
        left -= free


@pytest.mark.parametrize(
    ("who", "what"),
    [
        ("kernels are reached from ops only", KERNELS),
        ("nothing in the library imports configs", ("configs",)),
        ("nothing in the library imports experiments", ("experiments",)),
        ("interop is the experiments'", ("interop",)),
    ],
)
def test_some_packages_have_one_door(who, what):
    doors = {KERNELS: "ops"}
    wrong = [
        where
        for module, target, where in EDGES
        if within(module, LIBRARY)
        and (within(target, *what) or (within(target, LIBRARY) and part(target) in what))
        and part(module) not in (*what, doors.get(what))
    ]
    assert not wrong, who


def test_kernels_import_neither_the_library_nor_flax():
    wrong = [
        where
        for module, target, where in EDGES
        if within(module, *KERNELS) and within(target, LIBRARY, "flax", "experiments", "configs")
    ]
    assert not wrong


def test_models_know_nothing_of_quantization():
    allowed = ("models", "version")
    wrong = [
        where
        for module, target, where in EDGES
        if module.startswith(f"{LIBRARY}.models")
        and within(target, LIBRARY)
        and part(target) not in allowed
    ]
    assert not wrong


def test_nothing_happens_at_import():
    """No module of the library sets a flag, seeds a generator or logs while it is imported."""
    calls = []
    for module, path in modules(LIBRARY):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                calls.append(f"{module}:{node.lineno}: {ast.unparse(node.value)}")
    # A gradient rule and a pytree belong to their definition.
    allowed = (".defvjp(", "register_")
    assert not [call for call in calls if not any(word in call for word in allowed)]
