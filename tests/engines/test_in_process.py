"""The engine in this process: it needs neither Ray nor Flower, and leaves the same bytes as theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fedsplit.engines import in_process
from fedsplit.engines.in_process import LocalClients
from fedsplit.engines.planning import Plan
from fedsplit.federation.clients import ClientNode, Interrupted
from fedsplit.federation.introductions import Introduction, introduce
from fedsplit.federation.messages import Answer, Briefing, Evaluate, Failure, Introduce, Reply, Request
from fedsplit.settings.config import Config
from fedsplit.updates import Adapters
from fedsplit.watchdog import Watchdog
from fedsplit.wire.packets import new_incarnation, new_trunk_name

BRIEFING = Briefing(run="{}", trunk="t", incarnation="first", threads=1, store="/nowhere")
ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Refused(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "flwr", "datasets"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refused())
from fedsplit.commands.simulate import main
sys.exit(main(sys.argv[1:]))
"""
"""A program that runs the command where three libraries cannot be imported."""

SMALL = ["--clients", "2", "--rounds", "1", "--train.steps", "1", "--batch-size", "1", "--max-length", "16"]
SMALL += ["--eval.samples", "1", "--lora-rank", "2", "--threads", "1", "--trunk.threads", "1"]


@pytest.mark.slow
def test_the_command_needs_neither_ray_nor_flower_nor_datasets(tmp_path: Path) -> None:
    """With the model and the texts that are bundled."""
    call = [sys.executable, "-c", ALONE, "--engine", "local", *SMALL, "--out", str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["last_round"] == 1


def test_the_program_refuses_the_libraries() -> None:
    """Or the test above could not fail."""
    refused = subprocess.run(
        [sys.executable, "-c", ALONE.replace("from fedsplit.commands.simulate import main", "import ray.actor")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1 and "ImportError: ray is not to be imported" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--trunk.schedule", "copies"], ["--deterministic"]], ids=str)
def test_both_engines_leave_the_same_adapters_to_the_bit(flags: list[str], tmp_path: Path) -> None:
    """Whatever the number of workers, and the order of Python's sets."""
    left, summaries = {}, []
    for hash_seed, engine in enumerate((["local"], ["ray", "--workers", "3"])):
        out = tmp_path / engine[0]
        call = [sys.executable, "-m", "fedsplit.simulate", *SMALL, *flags, "--engine", *engine, "--out", str(out)]
        call += ["--clients", "4", "--rounds", "2", "--train.steps", "3"]
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        files = sorted(out.glob("checkpoints/*/*.safetensors")) + sorted(out.glob("*/adapter_model.safetensors"))
        left[engine[0]] = {str(file.relative_to(out)): load_file(file) for file in files}
        summaries.append(json.loads((out / "summary.json").read_text()))
    assert left["local"].keys() == left["ray"].keys() and len(left["ray"]) >= 6
    for name, tensors in left["local"].items():
        other = left["ray"][name]
        assert tensors.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in tensors.items()), name
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[0]["forgotten"] == summaries[1]["forgotten"]


class Service:
    """Introduces clients, and answers evaluations with the number of the client."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def answer(self, request: Request) -> Answer:
        if request.client == self.broken:
            return Failure(request.client, "ValueError", "ValueError: no luck")
        if isinstance(request, Introduce):
            nothing = Adapters({}, {})
            start = {"bottom": nothing, "top": nothing} if request.client == 0 else {}
            return introduce(Introduction(request.client, f"owner {request.client}", {}, start))
        return Reply(request.client)


def test_clients_answer_one_after_the_other() -> None:
    clients = LocalClients([Service()], threading.Event(), Watchdog(60))  # type: ignore[list-item]
    assert [one.client for one in clients.meet(BRIEFING, 3)] == [0, 1, 2]
    assert clients.nodes == [ClientNode(1, "owner 0"), ClientNode(2, "owner 1"), ClientNode(3, "owner 2")]
    assert [answer.client for answer in clients.ask(Evaluate(BRIEFING, client) for client in (2, 0))] == [2, 0]


def test_a_client_that_cannot_load_its_parts_is_absent() -> None:
    clients = LocalClients([Service(broken=1)], threading.Event(), Watchdog(60))  # type: ignore[list-item]
    assert [one.client for one in clients.meet(BRIEFING, 3)] == [0, 2]
    assert clients.nodes[1] == ClientNode(2, "client 1", absent="ValueError: no luck")


def test_a_stop_is_seen_before_the_next_client() -> None:
    clients = LocalClients([Service()], threading.Event(), Watchdog(60))  # type: ignore[list-item]
    answers = clients.ask(Evaluate(BRIEFING, client) for client in range(3))
    next(answers)
    clients.stop.set()
    with pytest.raises(Interrupted):
        next(answers)


class Together(Service):
    """Answers when a second client is under way, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier
        self.visits: list[str] = []

    def visit(self, request: Request) -> None:
        self.visits.append(threading.current_thread().name)

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Evaluate):
            self.barrier.wait(timeout=60)
        return super().answer(request)


def pair() -> tuple[LocalClients, list[Together]]:
    """Clients of which two are played at once."""
    barrier = threading.Barrier(2)
    services = [Together(barrier), Together(barrier)]
    return LocalClients(services, threading.Event(), Watchdog(60)), services  # type: ignore[arg-type]


def test_two_clients_are_played_at_once_where_there_are_two_services() -> None:
    clients, services = pair()
    assert [one.client for one in clients.meet(BRIEFING, 4)] == [0, 1, 2, 3]
    answers = list(clients.ask(Evaluate(BRIEFING, client) for client in range(4)))
    clients.close()
    assert sorted(answer.client for answer in answers) == [0, 1, 2, 3]
    assert all(isinstance(answer, Reply) for answer in answers)
    # Parts are loaded in the caller's thread, since loading and training draw from the same random state.
    assert {name for service in services for name in service.visits} == {threading.current_thread().name}
    assert not any(thread.name == "client" for thread in threading.enumerate())


def test_requests_that_are_under_way_can_be_abandoned() -> None:
    clients, _ = pair()
    answers = clients.ask(Evaluate(BRIEFING, client) for client in range(2))
    next(answers)
    clients.abandon()
    assert list(answers) == []
    assert len(list(clients.ask(Evaluate(BRIEFING, client) for client in range(2)))) == 2
    clients.close()


def test_a_stop_is_seen_before_the_next_client_of_several() -> None:
    clients, _ = pair()
    answers = clients.ask(Evaluate(BRIEFING, client) for client in range(4))
    next(answers)
    clients.stop.set()
    with pytest.raises(Interrupted):
        next(answers)
    clients.abandon()
    clients.close()


def test_the_caller_has_its_threads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the run."""
    before = torch.get_num_threads()
    monkeypatch.setattr(in_process, "load_trunks", lambda *_, **__: [[SimpleNamespace(close=lambda: None)]])
    plan = Plan(workers=1, client_threads=1, trunk_threads=before + 1, micro_batches=1, trunk_lanes=1)
    with pytest.raises(KeyError), in_process.running(Config(), plan):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_headers_are_as_long_as_on_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each packet has the name of the trunk and of its start, so that framing depends on their lengths."""
    calls: list[tuple[str, str]] = []

    def load(config: Config, name: str, incarnation: str, **_: object) -> list[list[SimpleNamespace]]:
        calls.append((name, incarnation))
        return [[SimpleNamespace(close=lambda: None)]]

    monkeypatch.setattr(in_process, "load_trunks", load)
    monkeypatch.setattr(in_process, "stage_maker", lambda *_: None)
    plan = Plan(workers=1, client_threads=1, trunk_threads=1, micro_batches=1, trunk_lanes=1)
    host = in_process.LocalSession(Config(), plan)
    host.renew()
    for name, incarnation in calls:
        assert (len(name), len(incarnation)) == (len(new_trunk_name()), len(new_incarnation()))
    assert len({word for call in calls for word in call}) == 4  # a new name and a new identity for each start
