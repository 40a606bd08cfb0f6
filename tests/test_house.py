"""The house: imports go down only, and every third-party library has its homes."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

GROUND = {
    "clock",
    "demands",
    "durable",
    "environment",
    "errors",
    "factors",
    "loading",
    "lowrank",
    "objects",
    "formatting",
    "scores",
    "seeds",
    "settings",
    "shutdown",
    "stages",
    "tensor_files",
    "updates",
    "watchdog",
}
"""Modules at the top of `fedsplit`, and the settings, that every package may import."""

PACKAGES = [
    "network",
    "model",
    "events",
    "tracking",
    "wire",
    "adaptation",
    "state",
    "corpora",
    "optimization",
    "objectives",
    "metrics",
    "trunk",
    "client",
    "generation",
    "proving",
    "federation",
    "engines",
    "results",
    "reporting",
    "studies",
    "contracts",
    "estimation",
    "commands",
]
"""Each imports from those before it, and from the ground."""

DOORS = {"simulate", "evaluate", "generate", "adapters", "clean", "data", "estimate", "prove", "reference", "report"}
"""Modules that `python -m` runs: each calls the module of its name in `fedsplit.commands`."""

ROOF = {"__main__", "api", "call", "flower_app", "inputs", "result", *DOORS}
"""Modules at the top that may import everything."""

HOMES = {
    "accelerate": {"model.device_map", "tracking.trackers"},
    "bitsandbytes": {"optimization.optim", "model.quantization"},
    "datasets": {"corpora.datasets_library", "corpora.given", "corpora.loaders", "corpora.partitioners", "inputs"},
    "cryptography": {"wire.certificate_set"},
    "flwr": {
        "flower_app",
        "commands.server_app",
        "commands.site_client",
        "federation.mods",
        "federation.records",
        "federation.flower_strategy",
        "engines.flower_engine",
        "engines.away_nodes",
        "engines.flower_clients",
        "engines.flower_runtime",
        "engines.flower_sites",
        "engines.pool_grid",
        "engines.client_app",
    },
    "flwr_datasets": {"corpora.partitioners"},
    "google": {"wire.chunks", "wire.grpc_schema"},  # protobuf
    "grpc": {"wire.grpc_calls", "wire.grpc_server", "wire.grpc_streams"},
    "grpc_health": {"wire.grpc_server"},
    "grpc_reflection": {"wire.grpc_server"},
    "huggingface_hub": {"federation.model_card", "model.hub", "results.publishing"},
    "jinja2": {"reporting.page"},
    "matplotlib": {"corpora.data_summary", "reporting.figures", "result"},
    "numpy": {
        "contracts.rules",  # its random state
        "federation.messages",
        "federation.rehearsal",
        "federation.records",
        "wire.blobs",
        "wire.casting",
        "wire.delta",
        "wire.encoded",
        "wire.frames",
        "wire.grouped",
        "wire.headers",
        "wire.top_k",
        "wire.value_tables",
        "wire.zstd",
    },
    "pandas": {"result", "studies.table"},
    "peft": {
        "adaptation.base_weights",
        "adaptation.initial_adapter",
        "adaptation.run_adapters",
        "adaptation.adapter_files",
        "adaptation.folding",
        "adaptation.injection",
        "adaptation.lora",
        "adaptation.prompts",
        "adaptation.rank_allocation",
        "proving.comparisons",
        "results.fitting",
        "results.whole",
        "results.combining",
        "results.merging",
    },
    "psutil": {"trunk.memory", "shutdown"},
    "ray": {
        "engines.placement",
        "engines.ray_nodes",
        "engines.worker_pool",
        "trunk.actor",
        "trunk.cluster",
        "trunk.shard_actors",
    },
    "rich": {"events.screen", "events.final_table"},
    "scipy": {"studies.paired"},
    "shtab": {"commands.completion"},
    "simpy": {"network.replay"},
    "safetensors": {
        "model.checkpoint_reader",
        "model.weight_files",
        "adaptation.adapter_files",
        "adaptation.prompts",
        "durable",
        "tensor_files",
    },
    "tomli_w": {"federation.checkpoint", "federation.client_site", "commands.network"},
    "transformers": {
        "inputs",
        "model.attention",
        "model.block_layers",
        "estimation.party_memory",
        "model.derivation",
        "model.facts",
        "model.fp8_weights",
        "model.library_head",
        "model.miniature",
        "model.parts",
        "model.split",
        "model.stored_names",
        "model.token_ids",
        "model.unsplit",
        "model.weight_files",
        "adaptation.prompts",
        "model.caches",
        "generation.sampling",
        "model.gguf_files",
        "model.vocabulary",
        "proving.classifiers",
        "proving.comparisons",
    },
    "zstandard": {"wire.zstd"},
}
"""torch may be used anywhere."""

MODULES = {
    ".".join(path.with_suffix("").parts[1:]): path
    for path in sorted(Path("fedsplit").rglob("*.py"))
    if path.stem != "__init__" and "project_template" not in path.parts  # a project of its own, to be copied
}


def level(module: str) -> int:
    """How far above the ground a module's package is."""
    package = module.partition(".")[0]
    if package in PACKAGES:
        return 1 + PACKAGES.index(package)
    return 0 if package in GROUND else 1 + len(PACKAGES)


def imports(path: Path, for_types: bool = True) -> Iterator[str]:
    """Every module that is imported, inside functions too.

    Args:
        path: The file.
        for_types: If true, also modules under `if TYPE_CHECKING`, which are never loaded.
    """
    tree = ast.parse(path.read_text())
    never_loaded: set[ast.AST] = set()
    if not for_types:
        blocks = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        never_loaded = {inner for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if node in never_loaded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


OPEN = {"events": ("fedsplit.events.event_types", "fedsplit.events.sink")}
"""Packages that offer names of their own modules to users, by those modules; all of them are light to import."""


def ours(path: Path) -> set[str]:
    """The modules of fedsplit that a file imports."""
    return {name.removeprefix("fedsplit.") for name in imports(path)} & MODULES.keys()


def test_every_module_has_its_place() -> None:
    assert {name for name in MODULES if "." not in name} == GROUND - {"settings"} | ROOF
    assert {name.partition(".")[0] for name in MODULES if "." in name} == {"settings", *PACKAGES}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name: str) -> None:
    for imported in imports(MODULES[name]):
        assert imported.partition(".")[0] not in ("strategies", "experiments", "tests"), f"{name} imports {imported}"
    for below in ours(MODULES[name]):
        assert level(below) <= level(name), f"{name} imports {below}, whose package is above its own"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graphlib.TopologicalSorter({name: ours(path) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_libraries_stay_in_their_homes(name: str) -> None:
    for imported in imports(MODULES[name], for_types=False):
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
            ours = imported.startswith(
                ("fedsplit.updates", "fedsplit.factors", "fedsplit.lowrank", "fedsplit.seeds", "fedsplit.stages")
            )
            assert allowed or ours, f"{path} imports {imported}"


def test_packages_import_nothing_by_themselves() -> None:
    """The package itself names its public functions for type checkers, and loads them when they are asked for."""
    for path in Path("fedsplit").glob("*/**/__init__.py"):
        offered = OPEN.get(path.parent.name, ())
        assert [name for name in imports(path) if not name.startswith(offered)] == [], path
    code = "import sys; before = {*sys.modules}; import fedsplit; print(*({*sys.modules} - before - {'typing'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"fedsplit"}
    assert [name for name in done.stdout.split() if name.startswith("fedsplit")] == ["fedsplit"]


def test_no_two_test_files_have_one_name() -> None:
    """pytest finds tests by the names of their files alone, and fails to load the second, but in a whole run only."""
    counts = Counter(path.name for path in Path("tests").rglob("test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_module_has_a_test_of_its_name() -> None:
    for name in MODULES.keys() - DOORS:
        package, _, module = name.rpartition(".")
        assert Path("tests", package, f"test_{module}.py").is_file(), name
    names = {path.stem for path in Path("strategies").glob("*.py")} - {"__init__"}
    assert {f"test_{name}.py" for name in names} <= {path.name for path in Path("tests/strategies").glob("*.py")}


def test_the_house_has_a_place_for_every_module() -> None:
    """Top modules at two spaces, packages by their slash, and a package's modules at four."""
    page = Path("docs/house.md").read_text().partition("```\n")[2].partition("\n```")[0]
    found, package = [], ""
    for line in page.splitlines()[1:]:
        if match := re.fullmatch(r"  (\w+)/", line):
            package = f"{match[1]}."
        elif line.startswith("  ") and not line.startswith("  base/"):
            package = package if line.startswith("    ") else ""
            found += [package + name for name in re.findall(r"(?:^|  )(\w+)(?=  )", line) if package + name in MODULES]
    assert sorted(found) == sorted(MODULES)


PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]


def heading_anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):  # another site, which a test without a network cannot see
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page}: {target}"
        assert not anchor or anchor in heading_anchors(there), f"{page}: {target}"


def test_the_readme_leads_to_every_page() -> None:
    assert {f"docs/{path.name}" for path in PAGES[2:]} <= {*re.findall(r"\]\((docs/\w+\.md)", PAGES[0].read_text())}


def test_every_path_that_a_page_names_is_there() -> None:
    """Files of ours, as they are called from the root."""
    for page in PAGES:
        for path in re.findall(r"`((?:fedsplit|strategies|tests|experiments)/[\w./]*)`", page.read_text()):
            assert Path(path).exists(), f"{page}: {path}"


def test_nothing_of_ours_is_pickled() -> None:
    """As SECURITY.md says. `torch.load` unpickles; Ray's own calls are elsewhere.

    One module reads pickles of plain values if the user asks for it, and calls nothing that they name.
    """
    pickling = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    found = []
    root = Path(__file__).parents[1]
    ours = {*(root / "fedsplit").rglob("*.py"), *(root / "strategies").rglob("*.py")}
    for file in sorted(ours - {root / "fedsplit" / "network" / "plain_pickle.py"}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            is_load = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.save",
                "numpy.load",
            )
            if is_load or pickling & {name.partition(".")[0] for name in names}:
                found.append(f"{file.name}: {ast.unparse(node)}")
    assert found == []
