"""Files of a folder that count: parts read what transformers' `from_pretrained` reads, or refuse the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_models import batch_of, logits_of

from fedsplit.errors import SettingError
from fedsplit.model.checkpoint_reader import check_checkpoint
from fedsplit.model.sources import weights_folder
from fedsplit.model.split import load_parts
from fedsplit.model.unsplit import load_unsplit
from fedsplit.model.weight_files import ADAPTER, INDEX, WEIGHTS, check_weight_files, find_tensors
from fedsplit.settings.config import Config

KINDS = ("bottom", "trunk", "top")
FIRST = "model.embed_tokens.weight"


def write_scaled(source: Path, target: Path, factor: float) -> None:
    """Writes a file's tensors times a factor: another model, which fits the same config.json."""
    tensors = {name: tensor * factor for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def shard(folder: Path, factor: float = 1.0) -> None:
    """Writes shards and an index into a folder with a single file, of which only the others stay."""
    write_scaled(folder / WEIGHTS, folder / "scaled", factor)
    (folder / "scaled").rename(folder / WEIGHTS)
    whole = load_unsplit(folder)
    (folder / WEIGHTS).unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")


def index_of(folder: Path) -> dict[str, dict[str, str]]:
    document: dict[str, dict[str, str]] = json.loads((folder / INDEX).read_text())
    return document


def with_other_names(folder: Path) -> None:
    for name in ("model_before", "adapter_model", "a", "z", "model-00001-of-00002"):
        write_scaled(folder / WEIGHTS, folder / f"{name}.safetensors", 2.0)


def with_an_index_beside_the_single_file(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "kept")
    shard(folder, 2.0)
    (folder / "kept").rename(folder / WEIGHTS)


def with_shards_of_an_earlier_save(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "kept")
    shard(folder)
    write_scaled(folder / "kept", folder / "model-00001-of-00099.safetensors", 2.0)
    write_scaled(folder / "kept", folder / "zzz.safetensors", 2.0)
    (folder / "kept").unlink()


def with_a_tensor_in_two_shards(folder: Path) -> None:
    """The index names the first one, and transformers loads the last one."""
    shard(folder)
    weight_map = index_of(folder)["weight_map"]
    last = folder / max(weight_map.values())
    assert weight_map[FIRST] != last.name
    first = load_file(folder / weight_map[FIRST])[FIRST]
    save_file({**load_file(last), FIRST: first * 2}, last, metadata={"format": "pt"})


def with_a_tensor_elsewhere_than_the_index_says(folder: Path) -> None:
    shard(folder)
    document = index_of(folder)
    document["weight_map"][FIRST] = max(document["weight_map"].values())
    (folder / INDEX).write_text(json.dumps(document))


def with_a_pickle(folder: Path) -> None:
    torch.save({FIRST: torch.zeros(97, 32)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "arrange",
    [
        with_other_names,
        with_an_index_beside_the_single_file,
        with_shards_of_an_earlier_save,
        with_a_tensor_in_two_shards,
        with_a_tensor_elsewhere_than_the_index_says,
        with_a_pickle,
    ],
)
def test_parts_hold_the_weights_that_transformers_loads(
    arrange: Callable[[Path], None], tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    arrange(folder)
    assert weights_folder(Config(model=str(folder))) == folder
    check_checkpoint(folder)
    ids, mask, _ = batch_of("none")
    expected = load_unsplit(folder)(input_ids=ids).logits
    assert torch.equal(logits_of(load_parts(folder, (1, 2), KINDS), ids, mask), expected)


def test_a_part_needs_its_own_shards_only(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    load_unsplit(folder).save_pretrained(folder, max_shard_size="9KB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    weight_map = index_of(folder)["weight_map"]
    everything = find_tensors(folder)
    assert everything == {name: folder / file for name, file in weight_map.items()}
    (whole,) = load_parts(folder, (1, 2), ["trunk"])
    for file in {*weight_map.values()} - {file for name, file in weight_map.items() if ".layers.1." in name}:
        (folder / file).unlink()
    assert find_tensors(folder) == everything
    (trunk,) = load_parts(folder, (1, 2), ["trunk"])
    assert all(torch.equal(value, trunk.state_dict()[name]) for name, value in whole.state_dict().items())


def lacks_a_shard(folder: Path) -> str:
    shard(folder)
    (folder / (gone := max(index_of(folder)["weight_map"].values()))).unlink()
    return rf"its model\.safetensors\.index\.json names {gone}, which is not there"


def has_a_part_of_the_weights_in_the_single_file(folder: Path) -> str:
    """As transformers, which draws the others at random: the shards beside it do not count."""
    with_an_index_beside_the_single_file(folder)
    some = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".layers.2." not in name}
    save_file(some, folder / WEIGHTS, metadata={"format": "pt"})
    return r"the checkpoint has no tensor model\.layers\.2\."


def has_an_index_without_metadata(folder: Path) -> str:
    shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": index_of(folder)["weight_map"]}))
    return r"its model\.safetensors\.index\.json has no metadata"


def has_a_broken_index(folder: Path) -> str:
    shard(folder)
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": [')
    return r"its model\.safetensors\.index\.json cannot be read"


def has_an_index_that_leaves_the_folder(folder: Path) -> str:
    shard(folder)
    document = index_of(folder)
    document["weight_map"][FIRST] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps({"metadata": {}, **document}))
    return r"its model\.safetensors\.index\.json names \.\./elsewhere\.safetensors, which is not in the folder"


def has_names_in_its_index_that_are_no_text(folder: Path) -> str:
    shard(folder)
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"a": 1}}')
    return r"its model\.safetensors\.index\.json cannot be read"


@pytest.mark.parametrize(
    "arrange",
    [
        lacks_a_shard,
        has_a_part_of_the_weights_in_the_single_file,
        has_an_index_without_metadata,
        has_a_broken_index,
        has_an_index_that_leaves_the_folder,
        has_names_in_its_index_that_are_no_text,
    ],
)
def test_a_folder_whose_weights_are_not_all_there_is_refused(
    arrange: Callable[[Path], str], tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    words = arrange(folder)
    with pytest.raises(SettingError, match=rf"^model: .*\({words}"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], r"neither model\.safetensors nor model\.safetensors\.index\.json in it"),
        (["model_before.safetensors"], r"in it, only model_before\.safetensors"),
        (["pytorch_model.bin"], r"in it, only pytorch_model\.bin"),
        ([WEIGHTS, ADAPTER], r"adapter_config\.json in it: transformers would add that adapter to the weights"),
        ([WEIGHTS, "shard-00000-model-00001-of-00002.safetensors"], "a part of a distributed checkpoint"),
    ],
)
def test_a_folder_that_transformers_reads_otherwise_is_refused(tmp_path: Path, files: list[str], words: str) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    with pytest.raises(SettingError, match=rf"^model: .*{words}.* allowed: a folder with weights"):
        check_weight_files(tmp_path, "a folder with weights")


def test_an_adapter_beside_a_model_would_change_what_transformers_loads(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    """The reason for which such a folder is refused."""
    from peft import LoraConfig, get_peft_model

    folder = shutil.copytree(tiny_models["llama"], tmp_path / "model")
    model = get_peft_model(load_unsplit(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    ids, _, _ = batch_of("none")
    plain = load_unsplit(tiny_models["llama"])(input_ids=ids).logits
    assert not torch.equal(load_unsplit(folder)(input_ids=ids).logits, plain)
    with pytest.raises(SettingError, match=rf"{ADAPTER} in it"):
        weights_folder(Config(model=str(folder)))
