"""The house: imports go down only, and every third-party library has its homes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = [
    {"config", "lowrank", "packets", "scaling", "seeds", "tally", "clipping", "stopping", "transcript"},
    {"updates", "flags", "command", "rates", "vocabulary", "synthetic", "methods", "devices", "schedules"},
    {
        "families",
        "kernels",
        "quantization",
        "corpus",
        "wire",
        "optim",
        "steps",
        "memory",
        "strategy",
        "routers",
        "report",
        "local",
        "store",
        "fidelity",
        "comparison",
        "sampling",
    },
    {"hub", "gguf_files", "tables"},
    {"sources", "classes"},
    {"split", "link", "learner", "finished", "sequences", "head"},
    {"injection", "formats"},
    {"lora", "learners", "caches", "prompts"},
    {"partition", "adapting"},
    {"trunk", "client", "checkpoint", "whole", "decoding", "census"},
    {"dispatch", "sessions", "heldout", "holdings", "merging"},
    {"planning", "checks"},
    {"actor"},
    {"records"},
    {"aggregation", "client_app"},
    {"exchange"},
    {"server_app"},
    {"simulate", "adapters", "evaluate", "data"},
    {"generate"},
]

HOMES = {
    "bitsandbytes": {"optim", "quantization"},
    "datasets": {"tables", "partition"},
    "flwr": {"records", "aggregation", "exchange", "client_app", "server_app", "simulate"},
    "flwr_datasets": {"partition"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"census"},
    "numpy": {"packets", "records", "wire"},
    "peft": {"injection", "lora", "prompts", "whole", "merging"},
    "psutil": {"memory"},
    "ray": {"actor"},
    "rich": {"report"},
    "safetensors": {"split", "lora", "prompts", "store"},
    "tokenizers": {"vocabulary"},
    "tomli_w": {"checkpoint"},
    "transformers": {"split", "prompts", "caches", "sampling", "gguf_files", "vocabulary"},
}
"""torch may be used anywhere."""

MODULES = {path.stem: path for path in Path("fedsplit").glob("*.py") if path.stem != "__init__"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_layer() -> None:
    assert MODULES.keys() == LEVEL.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name: str) -> None:
    for imported in imports(MODULES[name]):
        package, _, module = imported.partition(".")
        assert package not in ("strategies", "experiments", "tests"), f"{name} imports {imported}"
        below = module.partition(".")[0]
        if package == "fedsplit" and below in LEVEL:
            assert LEVEL[below] < LEVEL[name], f"{name} imports {below}, which is not below it"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_libraries_stay_in_their_homes(name: str) -> None:
    for imported in imports(MODULES[name]):
        library = imported.partition(".")[0]
        if library not in sys.stdlib_module_names and library not in ("fedsplit", "torch"):
            assert name in HOMES[library], f"{name} imports {library}"


def test_sources_alone_turns_a_models_name_into_a_folder() -> None:
    """`Config.model_path` knows local folders only."""
    assert [name for name, path in MODULES.items() if "config.model_path" in path.read_text()] == []


def test_strategies_need_torch_and_the_lowest_modules_only() -> None:
    for path in Path("strategies").glob("*.py"):
        for imported in imports(path):
            library = imported.partition(".")[0]
            allowed = library in sys.stdlib_module_names or library in ("torch", "strategies")
            ours = imported.startswith(("fedsplit.updates", "fedsplit.lowrank", "fedsplit.seeds"))
            assert allowed or ours, f"{path} imports {imported}"


def test_the_package_imports_nothing_by_itself() -> None:
    assert list(imports(Path("fedsplit/__init__.py"))) == []


def test_every_module_has_a_test_of_its_name() -> None:
    assert {f"test_{name}.py" for name in MODULES} <= {path.name for path in Path("tests").glob("*.py")}
    names = {path.stem for path in Path("strategies").glob("*.py")} - {"__init__"}
    assert {f"test_{name}.py" for name in names} <= {path.name for path in Path("tests/strategies").glob("*.py")}
