"""The rules of CONTRIBUTING.md that a machine can check: who imports whom, and what no package may call."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "server", "training")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# (who, must never import)
WALLS = [
    ("model", ("server", "training", "fastapi", "starlette", "pydantic", "uvicorn")),
    ("training", ("server", "fastapi", "starlette", "uvicorn")),
    ("server", ("training",)),
    (
        "server.engine",
        (
            *("fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn"),
            *("server.settings", "server.app", "server.routes", "server.schemas", "server.sse"),
        ),
    ),
    ("server.routes", ("torch",)),
    ("server.schemas", ("torch",)),
]

# The API process lives on these; one torch import would cost it a second and a few hundred megabytes.
TORCH_FREE = (
    "model.classifier_config",
    "model.config",
    "model.errors",
    "model.sampling_params",
    "model.tokenizer",
    "model.chat_template",
    "model.controls",
    "model.hf_config",
    "model.hub",
    "model.manifest",
    "model.presets",
    "model.self_check",
    "server.engine.sequence",
    "server.engine.block_manager",
    "server.engine.scheduler",
    "server.engine.client",
    "server.app",
    "server.batch_cli",
    "server.cli",
    "server.llm",
    "server.__main__",
)

# Deserialisers that can run code, and the ways in which torch and numpy reach pickle.
BANNED_MODULES = (
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle",
    "multiprocessing.reduction", "multiprocessing.managers", "torch.distributed.checkpoint", "torch.package",
)  # fmt: skip
BANNED_BUILTINS = ("eval", "exec", "compile", "__import__")
BANNED_CALLS = (
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load",
    "torch.hub.load", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle", "importlib.import_module",
)  # fmt: skip
# torch.distributed's object collectives and multiprocessing's queues and pipes pickle what they carry.
BANNED_ATTRIBUTES = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "SimpleQueue", "JoinableQueue", "Pipe", "Manager",
)  # fmt: skip
BANNED_KEYWORDS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": None, "shell": True}
# The one module that may open torch's files, for the user's explicit `import`, and the one way in which it may.
TORCH_FILE_MODULE = "training.importers.torch_file"

MAX_LINES = 400


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Every dotted name that `module` imports at any depth, `from a import b` as `a.b`."""
    package = module if SOURCES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain on a name, else the attributes alone."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def violations(tree: ast.AST, module: str) -> list[str]:
    """What a source file does that could run code out of data."""
    found = [f"imports {name}" for name in imported_names(tree, module) for ban in BANNED_MODULES if within(name, ban)]
    found += [f"imports {name}" for name in imported_names(tree, module) if name in BANNED_CALLS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES:
            found.append(f"line {node.lineno}: {node.attr}")
        if not isinstance(node, ast.Call) or (module == TORCH_FILE_MODULE and is_restricted_load(node)):
            continue
        name = dotted(node.func)
        if name in BANNED_CALLS or (isinstance(node.func, ast.Name) and name in BANNED_BUILTINS):
            found.append(f"line {node.lineno}: {name}()")
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else True
            if keyword.arg in BANNED_KEYWORDS and BANNED_KEYWORDS[keyword.arg] in (None, value):
                found.append(f"line {node.lineno}: {keyword.arg}={value}")
    return found


def is_restricted_load(node: ast.Call) -> bool:
    """Whether this is torch.load(path, …, weights_only=True), all of it written out."""
    written = {keyword.arg: keyword.value for keyword in node.keywords}
    restricted = written.get("weights_only")
    return (
        dotted(node.func) == "torch.load"
        and len(node.args) == 1
        and not isinstance(node.args[0], ast.Starred)
        and written.keys() <= {"map_location", "mmap", "weights_only"}
        and isinstance(restricted, ast.Constant)
        and restricted.value is True
    )


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize(("package", "forbidden"), WALLS, ids=[wall[0] for wall in WALLS])
def test_imports_keep_their_direction(package: str, forbidden: tuple[str, ...]) -> None:
    modules = {name: path for name, path in SOURCES.items() if within(name, package)}
    assert modules
    crossed = [
        f"{name} imports {target}"
        for name, path in modules.items()
        for target in imported_names(parse(path), name)
        if any(within(target, ban) for ban in forbidden)
    ]
    assert crossed == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_api_process_needs_no_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_package_can_run_code_out_of_data() -> None:
    found = {name: bad for name, path in SOURCES.items() if (bad := violations(parse(path), name))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import _pickle",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch.distributed.checkpoint as dcp",
        "eval('1')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "f(weights_only=True)",
        "dist.all_gather_object(a, b)",
        "context.SimpleQueue()",
    ],
)
def test_the_gate_sees(source: str) -> None:
    assert violations(ast.parse(source), "model.example")


@pytest.mark.parametrize(
    "source", ["model.eval()", "np.load('x', allow_pickle=False)", "re.compile('x')", "torch.compile(f)"]
)
def test_the_gate_lets_pass(source: str) -> None:
    assert violations(ast.parse(source), "model.example") == []


def test_one_module_may_read_torch_files_and_only_restricted() -> None:
    restricted = ast.parse("torch.load(path, map_location='cpu', mmap=mapped, weights_only=True)")
    assert violations(restricted, TORCH_FILE_MODULE) == []
    for module in ("training.importers.nanogpt", "training.importers.torch_file.x", "model.checkpoint"):
        assert violations(restricted, module)
    calls = [node for node in ast.walk(parse(SOURCES[TORCH_FILE_MODULE])) if isinstance(node, ast.Call)]
    assert sum(dotted(call.func) == "torch.load" for call in calls) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=1)",
        "torch.load(path, weights_only=flag)",
        "torch.load(path, weights_only=True, pickle_module=p)",
        "torch.load(path, **settings)",
        "torch.load(path, weights_only=True, **settings)",
        "torch.load(*settings, weights_only=True)",
        "torch.load(path, 'cpu', p, weights_only=True)",
        "torch.serialization.load(path, weights_only=True)",
        "f(weights_only=True)",
        "torch.save(x, path)",
        "from torch import load",
        "import pickle",
    ],
)
def test_the_exception_is_no_wider(source: str) -> None:
    assert violations(ast.parse(source), TORCH_FILE_MODULE)


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from . import a\nfrom ..b import c\nfrom .d.e import f")
    assert list(imported_names(tree, "server.engine.x")) == ["server.engine.a", "server.b.c", "server.engine.d.e.f"]


def test_importing_does_nothing_but_define() -> None:
    """Every module imports with a hostile command line and without opening a socket or a CUDA context."""
    absent = set() if importlib.util.find_spec("triton") else {"model.triton_kernels", "model.sampling.sampling_kernel"}
    modules = [name for name in SOURCES if not name.endswith("__main__") and name not in absent]
    program = (
        "import importlib, sys\n"
        "sys.argv = ['x', '--no-such-option']\n"
        "sys.addaudithook(lambda e, a: sys.exit(e) if e in ('socket.connect', 'socket.bind') else None)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "torch = sys.modules['torch']\n"
        "sys.exit('CUDA was initialised' if torch.cuda.is_initialized() else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_files_stay_small() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
