"""The peak of resident memory of a process that holds a client's parts, the trunk, or the whole model.

    python -m experiments.memory.measure --cache runs/speed-cache

Writes result.json and the table in README.md beside this file; what result.json has is not measured again. Every
measurement is a process of its own, which loads as the command's processes do, reads every weight once, and makes one
training step of 1 x 128 tokens on what it holds. The same with a tiny model of the same family is what the libraries
alone take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.speed.models import folder_of
from experiments.speed.report import conditions, table, write_between
from experiments.speed.run import machine

HERE = Path(__file__).parent
ROLES = {"client": ("bottom", "top"), "trunk": ("trunk",), "whole": ()}
"""The parts that a process of each role loads; the whole model is loaded by transformers and PEFT alone."""

TOKENS = 128


def status(key: str) -> int:
    """A value of /proc/self/status in bytes: VmHWM is the peak of resident memory, of this program alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def tiny_of(family: str, folder: Path) -> str:
    """A folder with a model of the same family and hardly any weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
    more = {"num_key_value_heads": 1, "intermediate_size": 64} if family != "gpt2" else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more)).save_pretrained(folder)
    return str(folder)


def hold(role: str, config: Any, vocabulary: int) -> dict[str, Any]:
    """Loads what a role holds, and makes a step with it; peaks in bytes after each."""
    import torch

    from fedsplit.adaptation import lora
    from fedsplit.adaptation.injection import make_config
    from fedsplit.model.devices import TYPES
    from fedsplit.model.facts import read_facts
    from fedsplit.model.sources import config_folder, weights_folder
    from fedsplit.model.split import load_parts

    torch.set_num_threads(1)
    dtype = TYPES[config.dtype]
    if role == "whole":
        from peft import get_peft_model

        from fedsplit.model.unsplit import load_unsplit

        family = read_facts(config_folder(config.model)).family
        parts = [get_peft_model(load_unsplit(weights_folder(config), dtype), make_config(config.lora, family))]
    else:
        # What a process of this role imports anyhow, needed here or not.
        __import__("fedsplit.engines.client_app" if role == "client" else "fedsplit.trunk.actor")
        kinds: Any = ROLES[role]
        parts = load_parts(weights_folder(config, kinds), config.bounds, kinds, dtype, config.kernels)
        for part in parts:
            lora.add(part, config.lora, config.seed)
    own = {id(parameter): parameter for part in parts for parameter in part.parameters()}
    for parameter in own.values():  # what is mapped from a file is resident only once it is read
        parameter.detach().view(-1).max()
    loaded, anonymous, mapped = (status(key) for key in ("VmHWM", "RssAnon", "RssFile"))
    _step(role, parts, dtype, vocabulary)
    return {
        "weights": sum(p.nbytes for p in own.values() if not p.requires_grad),
        "loaded": loaded,
        "anonymous": anonymous,
        "mapped": mapped,
        "step": status("VmHWM"),
    }


def _step(role: str, parts: Sequence[Any], dtype: Any, vocabulary: int) -> None:
    """A forward and a backward; what comes from the other side is random."""
    import torch

    ids = torch.randint(0, vocabulary, (1, min(TOKENS, parts[0].config.max_position_embeddings)))
    if role == "whole":
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            parts[0](input_ids=ids, labels=ids).loss.backward()
    elif role == "client":
        bottom, top = parts
        sent = bottom(ids)
        received = sent.detach().requires_grad_()
        top(received, ids).backward()
        sent.backward(received.grad)
    else:
        hidden = torch.randn(*ids.shape, parts[0].config.hidden_size, dtype=dtype, requires_grad=True)
        parts[0](hidden).sum().backward()


def measure(role: str, model: Mapping[str, Any], name: str, tiny: bool) -> dict[str, Any]:
    """Starts a process that measures one role."""
    asked = json.dumps({"role": role, "model": name, "dtype": model["dtype"], "cut": model["cut"], "tiny": tiny})
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    call = [sys.executable, "-m", "experiments.memory.measure", "--hold", asked]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _held(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a measuring process answers."""
    from fedsplit.model.sources import config_folder
    from fedsplit.settings.documents import build

    config = build({key: asked[key] for key in ("model", "dtype", "cut")})
    document = json.loads((config_folder(config.model) / "config.json").read_text())
    if not asked["tiny"]:
        return hold(asked["role"], config, document["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        small = {"model": tiny_of(document["model_type"], Path(folder)), "dtype": asked["dtype"], "cut": "1:2"}
        return hold(asked["role"], build(small), 64)


def text(result: Mapping[str, Any]) -> str:
    """The table."""
    rows = []
    for record in result["records"]:
        over = record["loaded"] - record["libraries"]
        rows.append(
            [
                record["model"],
                record["role"],
                *(f"{record[key] / 1e6:,.0f}" for key in ("weights", "libraries", "loaded")),
                f"{over / record['weights']:.2f}",
                f"{record['mapped'] / 1e6:,.0f}",
                f"{record['step'] / 1e6:,.0f}",
            ]
        )
    head = [
        "model",
        "process",
        "its weights",
        "libraries",
        "peak, loaded",
        "over libraries / weights",
        "mapped",
        "peak, a step",
    ]
    return f"{conditions(result['machine'])}\n\n{chr(10).join(table(head, rows))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/speed-cache"), help="where the random model lies")
    parser.add_argument("--folder", type=Path, default=HERE, help="where README.md and result.json are")
    parser.add_argument("--hold", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.hold:
        print(json.dumps(_held(json.loads(asked.hold))))
        return
    for label, model in tomllib.loads((HERE / "config.toml").read_text())["models"].items():
        name = folder_of(model, asked.cache) if model.get("random") else _named(model)
        for role in ROLES:
            if (label, role) not in _done(asked.folder):
                libraries = measure(role, model, name, tiny=True)
                found = measure(role, model, name, tiny=False)
                _keep({"model": label, "role": role, "libraries": libraries["step"], **found}, asked.folder)
    if (asked.folder / "README.md").exists():
        result = json.loads((asked.folder / "result.json").read_text())
        write_between(asked.folder / "README.md", "result.json", text(result))


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "result.json"
    return json.loads(file.read_text())["records"] if file.exists() else []


def _done(folder: Path) -> set[tuple[str, str]]:
    """What has been measured already; remove result.json to measure it again."""
    return {(record["model"], record["role"]) for record in _records(folder)}


def _keep(record: dict[str, Any], folder: Path) -> None:
    """Adds a record to the result."""
    print(record, flush=True)
    result = {"machine": machine(), "tokens": TOKENS, "records": [*_records(folder), record]}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def _named(model: Mapping[str, Any]) -> str:
    """A model's name; the folder it is unpacked into in one type, where it is to be loaded in another."""
    if "stored" not in model:
        return str(model["model"])
    from fedsplit.model.sources import weights_folder
    from fedsplit.settings.documents import build

    return str(weights_folder(build({"model": model["model"], "dtype": model["stored"]})))


if __name__ == "__main__":
    main()
