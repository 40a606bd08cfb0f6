"""The command for what is done with adapters after a run."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft_adapters
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fedsplit.commands import adapters
from fedsplit.commands.evaluate import main as evaluate_command
from fedsplit.commands.generate import main as generate_command
from fedsplit.model.unsplit import load_unsplit
from fedsplit.results.measuring import evaluate, held_out_loss
from fedsplit.scores import pooled

Said = tuple[int, list[str], str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs the command; its exit code, its lines and its error."""

    def run(*argv: object) -> Said:
        code = adapters.main([str(word) for word in argv])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return run


def test_a_summary_counts_every_part(finished_run: Callable[..., Path], say: Callable[..., Said]) -> None:
    """By hand for GPT-2 of width 32: a block has 4 adapted layers of rank 2."""
    code, lines, _ = say("summary", finished_run("gpt2", "fedsa"))
    assert code == 0 and lines[0].endswith("cut 1:2; strategy fedsa; ranks 2")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    block = 2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    plain = 12 * 32 * 32 + 13 * 32
    assert rows["trunk"][:4] == [f"{n:,}" for n in (block, plain, block + plain, block)]
    whole = load_unsplit(adapters.open_run(finished_run("gpt2")).config.model_path).num_parameters()
    assert rows["whole"][:4] == [f"{n:,}" for n in (3 * block, whole, 3 * block + whole, 3 * block)]
    size = (finished_run("gpt2", "fedsa") / "trunk_lora" / "adapter_model.safetensors").stat().st_size
    assert " ".join(rows["trunk"][4:]) == f"{size / 1000:.1f} kB"
    assert [line.split()[:2] for line in lines[-3:]] == [["client", str(n)] for n in range(3)]
    _, lines, _ = say("summary", finished_run("gpt2", "fedex"))
    assert lines[0].endswith("ranks 10")  # 2, and 2 rounds of what three clients of rank 2 leave out: at most 4


def test_merge_and_unmerge(finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]) -> None:
    run = finished_run("gpt2", "fedsa")
    code, _, error = say("merge", run, "--out", tmp_path / "merged")
    assert code == 2 and "every client has an adapter of its own: say --client, one of 0, 1, 2" in error
    assert say("merge", run, "--client", 1, "--out", tmp_path / "merged")[0] == 0
    base = adapters.open_run(run).config.model_path
    one = PeftModel.from_pretrained(load_unsplit(base), str(run / "personal" / "0001")).eval()
    ids = torch.arange(12)[None]
    assert torch.allclose(load_unsplit(tmp_path / "merged").eval()(ids).logits, one(ids).logits, atol=1e-5)
    assert say("unmerge", tmp_path / "merged", "--out", tmp_path / "back")[0] == 0
    for name, weight in load_file(base / "model.safetensors").items():
        assert torch.allclose(load_file(tmp_path / "back" / "model.safetensors")[name], weight, atol=1e-6)


def test_tasks_are_switched_by_peft(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """Every adapter, each client's own too, under a name of its own; the lines that are shown do it."""
    shared, own = finished_run("gpt2", "fedex"), finished_run("gpt2", "fedsa")
    names = ["speech", "own", "ann", "bob", "cid"]
    code, lines, _ = say("export", shared, own, "--names", ",".join(names), "--out", tmp_path / "tasks")
    assert code == 0 and sorted(path.name for path in (tmp_path / "tasks").iterdir()) == sorted(names)
    base = adapters.open_run(shared).config.model_path
    space = {"PeftModel": PeftModel, "base": load_unsplit(base)}
    exec("\n".join(lines[1:]), space)
    model, ids = space["model"], torch.arange(12)[None]
    for task, source in (("speech", shared / "adapter"), ("bob", own / "personal" / "0001")):
        model.set_adapter(task)
        alone = PeftModel.from_pretrained(load_unsplit(base), str(source)).eval()
        assert torch.equal(model.eval()(ids).logits, alone(ids).logits)


def test_classifiers_are_merged_and_exported(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """Each task has a head of its own; an adapter that predicts tokens does not lie on the same base."""
    settings = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}
    runs = [finished_run("gpt2", **settings), finished_run("gpt2", lora__method="dora", **settings)]
    code, lines, _ = say("merge", runs[0], "--out", tmp_path / "merged")
    assert code == 0 and lines[0].endswith("in fp32; AutoModelForSequenceClassification opens it, with 4 classes")
    code, lines, _ = say("export", *runs, "--names", "one,two", "--out", tmp_path / "tasks")
    assert code == 0 and lines[0].endswith("; AutoModelForSequenceClassification opens it, with 4 classes")
    path = adapters.open_run(runs[0]).config.model_path
    space = {"PeftModel": PeftModel, "base": load_unsplit(path, classes=4, pad=0)}
    exec("\n".join(lines[1:]), space)
    model, ids = space["model"], torch.arange(12)[None]
    for task, run in zip(("one", "two"), runs, strict=True):
        model.set_adapter(task)
        alone = PeftModel.from_pretrained(load_unsplit(path, classes=4, pad=0), str(run / "adapter")).eval()
        assert torch.equal(model.eval()(ids).logits, alone(ids).logits)
    code, _, error = say("export", runs[0], finished_run("gpt2"), "--out", tmp_path / "mixed")
    assert code == 2 and "on models with different heads" in error and "tells 4 classes" in error
    assert not (tmp_path / "mixed").exists()


def test_combine_weighs_and_says_what_it_wrote(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    runs = [finished_run("gpt2", seed=seed) for seed in (1, 2)]
    code, lines, _ = say("combine", *runs, "--weights=-1,2", "--out", tmp_path / "out")
    assert code == 0
    assert lines == [f"{tmp_path}/out: -1 * gpt2_fedavg_seed=1 + 2 * gpt2_fedavg_seed=2 by cat, of rank 4"]
    assert say("combine", *runs, "--how", "svd", "--rank", 1, "--out", tmp_path / "thin")[1][0].endswith("of rank 1")
    assert say("merge", tmp_path / "out", "--out", tmp_path / "merged")[0] == 0


@pytest.mark.parametrize(("family", "method"), [("gpt2", "dora"), pytest.param("llama", "oft", marks=pytest.mark.slow)])
def test_adapters_that_are_no_pairs_of_factors(
    family: str, method: str, finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """What can be done with them is done right, and the rest is refused with the reason."""
    rank = {} if method == "dora" else {"lora__rank": 8, "lora__alpha": 16.0, "lora__dropout": 0.1}
    options = {"lora__options": '{"oft_block_size": 8}'} if method == "oft" else {}
    run = finished_run(family, lora__method=method, **rank, **options)
    opened = adapters.open_run(run)
    _, lines, _ = say("summary", run)
    assert lines[0].endswith(f"strategy fedavg; {method}, ranks none")
    assert say("merge", run, "--out", tmp_path / "merged")[0] == 0
    loss = opened.summary["eval_loss"]
    assert held_out_loss(load_unsplit(tmp_path / "merged"), run) == pytest.approx(loss["after"], abs=1e-4)
    assert abs(loss["after"] - loss["before"]) > 1e-3
    assert evaluate(opened)[0].tuned.tokens > 0
    everyone = pooled(result.tuned for result in evaluate(opened))
    assert everyone.loss == pytest.approx(loss["after"], abs=1e-5)
    code, _, error = say("unmerge", tmp_path / "merged", "--out", tmp_path / "back")
    assert code == 2 and "does more than to add something to the weights (" in error and "; the base is" in error
    code, _, error = say("combine", run, run, "--out", tmp_path / "both")
    assert code == 2 and "cannot be combined: it is no LoRA" in error
    assert say("export", run, "--names", "speech", "--out", tmp_path / "tasks")[0] == 0
    model = PeftModel.from_pretrained(load_unsplit(opened.config.model_path), str(tmp_path / "tasks" / "speech"))
    assert held_out_loss(model, run) == pytest.approx(loss["after"], abs=1e-5)
    code, lines, _ = say("compare", run, run)
    assert code == 0 and lines[-1].split()[-2:] == ["0.0000", "1.0000"]
    assert f"{method} adds no product of factors: its tensors are compared as they are" in lines
    code, lines, _ = say("compare", run, finished_run(family))
    assert code == 0
    assert lines[-1] == f"the adapters are of different kinds, {method} and lora, which have no common measure"
    assert not list((tmp_path / "back").parent.glob("b*"))


def test_a_start_out_of_the_base_weights_is_left_as_an_ordinary_adapter_of_the_base(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """PiSSA takes its start out of the base; what is saved adds to the base as it was, at twice the rank."""
    run = finished_run("gpt2", lora__method="pissa")
    opened = adapters.open_run(run)
    _, lines, _ = say("summary", run)
    assert lines[0].endswith("pissa, ranks 4")
    model = PeftModel.from_pretrained(load_unsplit(opened.config.model_path), str(run / "adapter"))
    loss = opened.summary["eval_loss"]
    assert held_out_loss(model, run) == pytest.approx(loss["after"], abs=1e-5)
    assert held_out_loss(load_unsplit(opened.config.model_path), run) == pytest.approx(loss["before"], abs=1e-5)
    assert abs(loss["after"] - loss["before"]) > 1e-3
    assert say("merge", run, "--out", tmp_path / "merged")[0] == 0
    assert say("unmerge", tmp_path / "merged", "--out", tmp_path / "back")[0] == 0
    base, back = (load_unsplit(path).state_dict() for path in (opened.config.model_path, tmp_path / "back"))
    assert all(torch.allclose(tensor, back[name], atol=1e-6) for name, tensor in base.items())


def test_compare_shows_settings_losses_bytes_and_layers(
    finished_run: Callable[..., Path], say: Callable[..., Said]
) -> None:
    one, two = finished_run("gpt2", seed=1), finished_run("gpt2", seed=2)
    code, lines, _ = say("compare", one, two)
    assert code == 0
    rows = {line.split("  ")[0]: line.split()[-2:] for line in lines if line}
    assert rows["seed"] == ["1", "2"] and "strategy" not in rows
    loss = adapters.open_run(two).summary["eval_loss"]["after"]
    assert rows["held-out loss after"][1] == f"{loss:.4f}"
    assert "bytes adapter_up" in rows and "transformer.h.2.mlp.c_proj" in rows
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    key = "base_model.model.transformer.h.2.mlp.c_proj.lora_{}.weight"
    w, v = (1.5 * t[key.format("B")] @ t[key.format("A")] for t in (first, second))
    expected = [f"{float((w - v).norm() / w.norm()):.4f}", f"{float((w * v).sum() / w.norm() / v.norm()):.4f}"]
    assert rows["transformer.h.2.mlp.c_proj"] == expected
    _, lines, _ = say("compare", one, one)
    assert lines[-1].split()[-2:] == ["0.0000", "1.0000"]
    _, lines, _ = say("compare", one, finished_run("llama"))
    assert lines[-1] == "the adapters have nothing to compare"


def test_compare_shows_tensors_where_there_is_no_product(
    finished_run: Callable[..., Path], say: Callable[..., Said]
) -> None:
    """All of DoRA's; of a LoRA with a head of classes, the head beside the layers."""
    settings = {"dataset": "synthetic", "data__format": "classification", "train__max_length": 32}
    for name, more in (
        ("transformer.h.1.attn.c_attn.lora_magnitude_vector", {"lora__method": "dora"}),
        ("score.weight", settings),
    ):
        one, two = finished_run("gpt2", **more), finished_run("gpt2", **more, seed=1)
        code, lines, _ = say("compare", one, two)
        rows = {line.split()[0]: line.split()[-2:] for line in lines if line}
        files = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two)]
        w, v = (file[f"base_model.model.{name}"].double() for file in files)
        expected = [f"{float((w - v).norm() / w.norm()):.4f}", f"{float((w * v).sum() / w.norm() / v.norm()):.4f}"]
        assert code == 0 and rows[name] == expected
        assert ("layer" in rows) == (name == "score.weight") and "tensor" in rows


def test_what_is_asked_for_wrongly_gets_one_line_and_writes_nothing(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    run, llama = finished_run("gpt2"), finished_run("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    out = ("--out", tmp_path / "out")
    for argv, words in (
        ([], "the following arguments are required: COMMAND; see --help"),
        (["summary", "nowhere"], "nowhere is no folder of a run: there is no such folder"),
        (["summary", tmp_path], f"{tmp_path} is no folder of a run: there is no config.toml"),
        (["merge", run], "the following arguments are required: --out"),
        (["merge", run, "--out", tmp_path / "full"], f"out: {tmp_path}/full (there already) is not possible"),
        (["merge", run, "--client", "0", *out], "client: 0 is not possible; allowed: none: in this run"),
        (["merge", run, "--dtype", "fp8", *out], "argument --dtype: invalid choice: 'fp8'"),
        (["unmerge", run, *out], f"{run} is no merged model"),
        (["unmerge", "nowhere", *out], "nowhere is no merged model: there is no such folder"),
        (["combine", run, *out], "combine: one adapter is not possible"),
        (["combine", run, run, "--weights", "1", *out], "weights: 1 is not possible; allowed: 2 numbers"),
        (["combine", run, run, "--weights", "1,nan", *out], "weights: 1,nan is not possible"),
        (["combine", run, run, "--rank", "2", *out], "rank: 2 is not possible; allowed: a whole number of at least 1"),
        (["combine", run, llama, *out], "the adapters belong to different base models"),
        (["export", run, llama, *out], "the adapters belong to different base models"),
        (["export", run, run, *out], "names: gpt2_fedavg is there twice"),
        (["compare", run, "nowhere"], "nowhere is no folder of a run"),
    ):
        code, lines, error = say(*argv)
        assert (code, lines) == (2, []), argv
        assert error.startswith(f"fedsplit: {words}") and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


FILE = "adapter_model.safetensors"


def _nan(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, path)


def _without_one(path: Path) -> None:
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path)


def _with_one_more(path: Path) -> None:
    save_file({**load_file(path), "base_model.model.more.weight": torch.zeros(2)}, path)


def _misshapen(path: Path) -> None:
    tensors = load_file(path)
    tensors[min(tensors)] = torch.zeros(3)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_nan, "holds NaN or infinite values in "),
        (_without_one, "is not whole: it lacks "),
        (_with_one_more, "it has more.weight, for which there is no place"),
        (_misshapen, "is (3,), its place "),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read ("),
        (lambda path: path.write_bytes(b""), "cannot be read ("),
    ],
)
def test_every_command_names_what_is_wrong_with_an_adapter(
    damage: Callable[[Path], object],
    words: str,
    finished_run: Callable[..., Path],
    tmp_path: Path,
    say: Callable[..., Said],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And writes nothing: evaluation and generation, too."""
    whole = finished_run("gpt2")
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    damage(run / "adapter" / FILE)
    out = ("--out", tmp_path / "out")
    for argv in (
        ["summary", run],
        ["merge", run, *out],
        ["merge", run / "adapter", *out],
        ["combine", run, whole, *out],
        ["combine", whole, run, *out],
        ["export", run, *out],
        ["compare", run, whole],
        ["compare", whole, run],
    ):
        code, lines, error = say(*argv)
        assert (code, lines) == (2, []) and error.count("\n") == 1, (argv, error)
        assert f"the adapter in {run}/adapter" in error and words in error, (argv, error)
    for command, more in ((evaluate_command, []), (generate_command, ["--prompt", "a"])):
        assert command(["--run", str(run), *more]) == 2
        said = capsys.readouterr()
        assert said.out == "" and words in said.err and said.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_summary_looks_at_every_file(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    run = Path(shutil.copytree(finished_run("gpt2", "fedsa"), tmp_path / "run"))
    for place in ("trunk_lora", "personal/0001"):
        kept = (run / place / FILE).read_bytes()
        (run / place / FILE).write_bytes(kept[:20])
        code, lines, error = say("summary", run)
        assert (code, lines) == (2, []) and error.startswith(f"fedsplit: the adapter in {run}/{place} cannot be read")
        (run / place / FILE).write_bytes(kept)
    (run / "personal" / "notes").mkdir()
    (run / "personal" / "0001-old").mkdir()
    assert say("summary", run)[0] == 0


def test_a_summary_a_comparison_and_an_export_need_no_model(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """But say that nobody looked whether the adapter fits it."""
    shutil.copytree(tiny_models["gpt2"], tmp_path / "model")
    run = finished_run(str(tmp_path / "model"))
    shutil.rmtree(tmp_path / "model")
    code, lines, _ = say("summary", run)
    assert code == 0 and lines[-1] == "the model is not here: nobody can tell whether the adapter fits it"
    assert say("compare", run, run)[0] == 0
    code, lines, _ = say("export", run, run, "--names", "one,two", "--out", tmp_path / "tasks")
    assert code == 0 and lines[-1] == "# the model is not here: nobody can tell whether the adapter fits it"
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["one", "two"]


@pytest.mark.parametrize("content", ['{"rounds": 2}', '{"rounds": 2, "parameters": []}', '{"rou', "[]"])
def test_a_damaged_summary_is_one_line(
    content: str, finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    run = Path(shutil.copytree(finished_run("gpt2"), tmp_path / "run"))
    (run / "summary.json").write_text(content)
    for argv in (["summary", run], ["compare", run, run]):
        code, lines, error = say(*argv)
        assert (code, lines) == (2, []) and "summary.json" in error and error.count("\n") == 1


def test_a_folder_that_is_no_single_adapter_in_safetensors_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, say: Callable[..., Said]
) -> None:
    """PEFT puts several adapters of one model into folders below; and once wrote files that may hold code."""
    for kind in ("plain", "dora"):
        peft_adapters.make("llama", kind, tiny_models["llama"], tmp_path / "both" / kind)
    _, _, error = say("merge", tmp_path / "both", "--out", tmp_path / "out")
    assert error.endswith("holds several adapters, dora, plain: name the folder of one of them\n")
    (tmp_path / "both" / "dora" / FILE).rename(tmp_path / "both" / "dora" / "adapter_model.bin")
    code, _, error = say("merge", tmp_path / "both" / "dora", "--out", tmp_path / "out")
    assert code == 2 and "(adapter_model.bin is not read, since it may hold code)" in error


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("rank = 2", "rank = 4"), "its r is 2, by the run's settings 4"),
        (("alpha = 3.0", "alpha = 5.0"), "its lora_alpha is 3.0, by the run's settings 5.0"),
        (("rslora = false", "rslora = true"), "its use_rslora is False, by the run's settings True"),
        (('method = "lora"', 'method = "dora"'), "its use_dora is False, by the run's settings True"),
        (('lm_head = "frozen"', 'lm_head = "full"'), "its modules_to_save is None, by the run's settings lm_head"),
    ],
)
def test_text_is_not_written_with_an_adapter_of_other_settings(
    edit: tuple[str, str],
    words: str,
    finished_run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(finished_run("gpt2"), tmp_path / "run"))
    text = (run / "config.toml").read_text()
    assert edit[0] in text
    (run / "config.toml").write_text(text.replace(*edit))
    assert generate_command(["--run", str(run), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error == f"fedsplit: the adapter in {run}/adapter is not what its run made: {words}\n"


def test_what_peft_put_into_a_run_is_measured_and_leaves_nothing_behind(
    finished_run: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT writes biases into the base: the next client's base must be opened anew."""
    run = Path(shutil.copytree(finished_run("gpt2", "fedsa"), tmp_path / "run"))
    before = evaluate(adapters.open_run(run))
    for kind, client in (("all biases", 0), ("whole norm", 1)):
        shutil.rmtree(run / "personal" / f"{client:04d}")
        peft_adapters.make("gpt2", kind, tiny_models["gpt2"], run / "personal" / f"{client:04d}")
    after = evaluate(adapters.open_run(run))
    assert [result.base for result in after] == [result.base for result in before]
    assert after[2] == before[2] and after[0].tuned != before[0].tuned
    for client in (0, 1):
        model = peft_adapters.opened(tiny_models["gpt2"], run / "personal" / f"{client:04d}")
        assert after[client].tuned.loss == pytest.approx(held_out_loss(model, run, [client]), abs=1e-6)


def test_a_full_disk_is_one_line(
    finished_run: Callable[..., Path], tmp_path: Path, say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and nothing half-written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = finished_run("gpt2")
    for argv in (["merge", run], ["combine", run, run], ["export", run, "--names", "one"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            code, lines, error = say(*argv, "--out", tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (code, lines) == (1, []) and error.count("\n") == 1 and "could not be written" in error, error
        assert list(tmp_path.iterdir()) == []


def test_help_and_refusals_load_no_library(tmp_path: Path) -> None:
    for name, argv in (("adapters", "['merge', '--help']"), ("adapters", "['summary', 'x']"), ("evaluate", "['-h']")):
        code = (
            f"import sys\nfrom fedsplit.{name} import main\n"
            f"try: main({argv})\n"
            "except SystemExit: pass\n"
            "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
            "{'torch', 'peft', 'flwr', 'ray', 'transformers', 'rich', 'safetensors'}), file=sys.stderr)"
        )
        env = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0 and done.stderr.splitlines()[-1] == "", done.stderr


@pytest.mark.slow
def test_the_commands_as_a_user_types_them(finished_run: Callable[..., Path], tmp_path: Path) -> None:
    """No library's chatter among the lines, and nothing on the error stream."""
    run, env = str(finished_run("gpt2")), {**os.environ, "PYTHONPATH": str(Path.cwd())}
    env.pop("TRANSFORMERS_VERBOSITY"), env.pop("HF_HUB_DISABLE_PROGRESS_BARS")
    for argv, count in (
        (["adapters", "merge", run, "--out", "merged"], 1),
        (["adapters", "combine", run, run, "--out", "both"], 1),
        (["evaluate", "--run", run], 5),
    ):
        call = [sys.executable, "-m", f"fedsplit.{argv[0]}", *argv[1:]]
        done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == count
