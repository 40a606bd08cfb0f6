"""Uploads an adapter to the Hugging Face Hub, with its model card; only when asked.

What is uploaded names no folder of this machine: the adapter's configuration gets the base model's name on the Hub.
With the base model, the repository is that model, with the adapter in a folder of its own: transformers takes a folder
with both for the adapter alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit.errors import InputError, SettingError, one_line
from fedsplit.model.hub import parse
from fedsplit.model.sources import ON_HUB, config_folder, hub_name, weights_folder
from fedsplit.model.vocabulary import tokenizer_files
from fedsplit.results.finished import ADAPTER_FILES, CARD, Adapter, copy_adapter
from fedsplit.settings.config import Config

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ALLOWED = "a repository of the Hub, as org/name, that a token in HF_TOKEN or of 'hf auth login' may write to"
"""Describes possible values of `push_to_hub`, for error messages."""

WITHIN = "adapter"
"""Folder of the adapter in a repository that is the base model."""


def check_access(repository: str) -> None:
    """Checks that there is a token which the Hub accepts, before hours of training.

    Args:
        repository: Name of the repository, as org/name.

    Raises:
        SettingError: The name is none, there is no token, the Hub refuses the token, or the Hub cannot be reached.
    """
    name = parse(repository)
    if name is None or "/" not in repository or name.revision:
        raise SettingError("push_to_hub", repository, ALLOWED)
    try:
        _api().whoami()
    except Exception as error:  # noqa: BLE001  # the Hub's library raises its own errors, httpx's and the system's
        raise SettingError("push_to_hub", f"{repository} ({_reason(error)})", ALLOWED) from None


def push(
    adapter: Adapter,
    repository: str,
    private: bool = True,
    with_base: bool = False,
) -> str:
    """Uploads an adapter into a repository, which is made if need be.

    Args:
        adapter: The adapter.
        repository: Name of the repository, as org/name.
        private: Makes a new repository private. An existing one stays as it is.
        with_base: Uploads the base model, too. The adapter is then in the folder `adapter` of the repository.

    Returns:
        Address of the upload.

    Raises:
        InputError: The Hub refused the upload, or cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="fedsplit-") as draft:
        folder = Path(draft) / "adapter"
        fill(folder, adapter, repository, with_base)
        api = _api()
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=str(folder), commit_message="Upload the adapter of a run of fedsplit"
            )
        except Exception as error:  # noqa: BLE001  # as in `check_access`
            raise InputError(f"{adapter.folder} was not uploaded to {repository}: {_reason(error)}") from None
    return str(getattr(done, "repo_url", "") or f"https://huggingface.co/{repository}")


def fill(folder: Path, adapter: Adapter, repository: str, with_base: bool) -> None:
    """Writes what is uploaded into a new folder. For the other arguments see `push`."""
    place = folder / WITHIN if with_base else folder
    copy_adapter(adapter, place)
    path = place / ADAPTER_FILES[0]
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    on_hub = hub_name(adapter.model)
    if with_base:
        _copy_base(adapter, folder)
        document["base_model_name_or_path"] = repository
        document["revision"] = None
    else:
        document["base_model_name_or_path"] = on_hub or Path(adapter.model).name
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    card = place / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    # The Hub shows the card at the top of a repository, and none of a folder inside.
    card.unlink(missing_ok=True)
    (folder / CARD).write_text(_with_use(text, adapter, repository, with_base), encoding="utf-8")


def _copy_base(adapter: Adapter, folder: Path) -> None:
    """Copies the base model: configuration, tokenizer and weights in safetensors."""
    weights = weights_folder(Config(model=adapter.model, dtype=adapter.dtype))
    about = config_folder(adapter.model)
    described = [about / "config.json", about / "generation_config.json", *tokenizer_files(about)]
    for file in [*filter(Path.is_file, described), *sorted(weights.glob("*.safetensors*"))]:
        shutil.copyfile(file, folder / file.name)


def _with_use(card: str, adapter: Adapter, repository: str, with_base: bool) -> str:
    """Returns a card whose section on use opens the adapter from the repository."""
    kind = "SequenceClassification" if adapter.classes else "CausalLM"
    lines = [
        f"from peft import AutoPeftModelFor{kind}",
        "",
        f'model = AutoPeftModelFor{kind}.from_pretrained("{repository}", dtype="float32")',
    ]
    if with_base:
        # transformers would take a repository with both for the adapter alone, so that base and adapter are opened in
        # turn.
        classes = f", num_labels={len(adapter.classes)}" if adapter.classes else ""
        opening = f'from_pretrained("{repository}", dtype="float32"{classes})'
        lines = [
            "from peft import PeftModel",
            f"from transformers import AutoModelFor{kind}",
            "",
            f"base = AutoModelFor{kind}.{opening}",
            f'model = PeftModel.from_pretrained(base, "{repository}", subfolder="{WITHIN}")',
        ]
    use = "\n".join(["## Use", "", "```python", *lines, "```"])
    if not with_base and hub_name(adapter.model) is None:
        where = "`base_model_name_or_path` of adapter_config.json"
        use += f"\n\nThe base model is not on the Hub: put its folder into {where}."
    if not with_base and adapter.model in ON_HUB:
        use += "\n\nThe run's base had these weights in fewer bits: losses differ a little."
    # Only the section on use is replaced, whose code opens a folder of the run.
    before, found, rest = card.partition("## Use\n")
    if not found:
        return f"{card}\n{use}\n" if card else f"---\nlibrary_name: peft\n---\n\n{use}\n"
    after = rest[rest.index("\n## ") :] if "\n## " in rest else "\n"
    return f"{before}{use}\n{after}"


def _api() -> HfApi:
    """Returns the client of the Hub."""
    from huggingface_hub import HfApi

    return HfApi()


def _reason(error: Exception) -> str:
    """Explains an error of the Hub's library in a few words."""
    kind = type(error).__name__
    if kind == "LocalTokenNotFoundError":
        return "there is no token"
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE=1 forbids to ask the Hub"
    if "Connect" in kind or "Timeout" in kind or "Network" in kind:
        return "the Hub cannot be reached"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not accept the token"
    if status == 403:
        return "the token may not write there"
    return one_line(error)
