"""The rules of docs/architecture.md: which way imports point, and how large a function may be.

What still breaks the rule of arguments by place is counted by module. The counts may only shrink.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "lrquant"
FILES = sorted(SOURCE.rglob("*.py"))

# A room imports only from rooms above it, and from its own.
ROOMS = [
    ["errors", "settings"],
    ["runtime"],
    ["formats", "losses"],
    ["method_presets", "recipe_yaml"],
    ["recipe"],
    ["transforms", "runtimes"],
    ["architectures"],
    ["_registration"],
    ["zoo"],
    ["loading"],
    ["calibration"],
    ["reconstruction"],
    ["passes"],
    ["export", "evaluation", "resume"],
    ["report"],
    ["entrypoints"],
    ["cli"],
]
PLACE = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
MOST_PARAMETERS, MOST_POSITIONAL, MOST_LINES = 7, 3, 80

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """The module's name below lrquant: `reconstruction.engine`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of lrquant that `module` imports anywhere: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "lrquant":
                found.add(module_called(name.partition(".")[2]))
    return frozenset(found - {"", module})


def module_called(name: str) -> str:
    """The module that `name` is, or is something of."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def functions() -> Iterator[tuple[str, Function]]:
    """Every function by its full name, `reconstruction.engine.reconstruct_blocks`.

    The command line and Triton's kernels are left out, and so are functions within functions: what they take is decided
    by who calls them back.
    """
    for module, path in MODULES.items():
        if not module.startswith("cli") and module != "formats.triton_kernels":
            yield from functions_of(module, ast.parse(path.read_text()))


def functions_of(name: str, node: ast.AST) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{name}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions_of(f"{name}.{child.name}", child)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"", "__main__"}))
def test_rooms_import_only_downwards(module: str) -> None:
    room = module.partition(".")[0]
    for other in imports_of(module):
        other_room = other.partition(".")[0]
        allowed = other_room == room or PLACE[other_room] < PLACE[room]
        assert allowed, f"{module} imports {other}"


def test_imports_never_go_in_a_circle() -> None:
    """Counting those for type checkers and those inside functions."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports_of(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_engine_knows_no_pass() -> None:
    for module in MODULES:
        if module.startswith("reconstruction"):
            assert not [other for other in imports_of(module) if other.startswith("passes")], module


def test_resuming_knows_no_exporter() -> None:
    found = {module for module in MODULES for other in imports_of(module) if other.startswith("export")}
    assert not {module for module in found if module.startswith("resume")}


def parameters_of(function: Function) -> tuple[int, int]:
    """(how many there are, how many of them may be given by place), the object's own apart."""
    arguments = function.args
    by_place = [each.arg for each in (*arguments.posonlyargs, *arguments.args) if each.arg not in ("self", "cls")]
    return len(by_place) + len(arguments.kwonlyargs), len(by_place)


def test_functions_take_at_most_seven_arguments() -> None:
    assert not [name for name, function in functions() if parameters_of(function)[0] > MOST_PARAMETERS]


def test_arguments_beyond_three_are_given_by_name() -> None:
    """Counted by module; what breaks the rule still may only become less."""
    found = Counter(
        name.rpartition(".")[0] for name, function in functions() if parameters_of(function)[1] > MOST_POSITIONAL
    )
    by_module: Counter[str] = Counter()
    for owner, count in found.items():
        by_module[module_called(owner)] += count
    more = {module: count for module, count in by_module.items() if count > BY_PLACE.get(module, 0)}
    assert not more, f"functions with more than {MOST_POSITIONAL} arguments by place: {more}"


def test_functions_are_short() -> None:
    assert not [name for name, function in functions() if (function.end_lineno or 0) - function.lineno >= MOST_LINES]


BY_PLACE = {
    "architectures.double": 1,  # as torch calls it
    "architectures.gated_decoder": 1,
    "architectures.trace": 1,  # as torch calls it
    "calibration.activation_cache": 1,
    "calibration.capture": 1,
    "calibration.dialogues": 2,
    "calibration.images": 3,
    "calibration.text": 1,
    "entrypoints.estimate": 1,
    "evaluation.answers": 1,
    "evaluation.images": 1,
    "evaluation.perplexity": 1,
    "evaluation.tasks": 1,
    "formats.activation_quant": 3,
    "formats.fake_quant": 3,
    "formats.fake_quant_math": 3,
    "formats.fp4": 1,
    "formats.gptq": 1,
    "formats.kernels": 1,
    "formats.mx": 1,
    "formats.number_format": 2,
    "formats.qparams": 3,
    "formats.schemes": 1,
    "loading.offload": 2,
    "reconstruction.block_forward": 1,
    "reconstruction.block_parameters": 2,
    "reconstruction.compiled_block": 2,
    "reconstruction.fixed_parameters": 1,
    "reconstruction.initial_state": 3,
    "reconstruction.journal": 3,
    "reconstruction.learnables.end_to_end_factor": 1,
    "report.observer": 1,
    "report.style": 1,
    "resume.fingerprint": 1,
    "resume.journal": 1,
    "runtime.distributed": 1,
    "transforms.equivalence": 4,
    "transforms.hadamard": 1,
    "transforms.smoothing": 9,
    "zoo.scripts.outliers": 2,
    "zoo.scripts.train_llama": 1,
    "zoo.scripts.train_llava": 2,
    "zoo.scripts.train_vit": 1,
    "zoo.scripts.training": 2,
    "zoo.shapes": 2,
}


FOREIGN_PRIVATE: set[str] = set()  # modules that still have some
FOREIGN = ("torch", "transformers", "datasets", "compressed_tensors")
NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def own_private_names() -> set[str]:
    """Names with a leading underscore that lrquant itself defines, anywhere."""
    found = set(NAMED_TUPLES)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def test_private_names_of_others_stand_in_compat_only() -> None:
    own = own_private_names()
    found = []
    for module, path in MODULES.items():
        if module in {"runtime.compat", *FOREIGN_PRIVATE}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in FOREIGN:
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in names if name.startswith("_") and not name.startswith("__") and name not in own]
            found += [f"{module}: {name}" for name in private]
    assert not found
