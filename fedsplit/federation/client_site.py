"""A client at a site of its own: its data, its state and its way to the trunk are the site's business.

A server's request carries the settings of the run. The site replaces the settings that are its own, refuses a run that
would have the site import code, and keeps data and state in a folder of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import tomli_w

from fedsplit.corpora.loaders import path_of
from fedsplit.corpora.partition import shard_of_site
from fedsplit.corpora.shards import remove_left, shard_file, write_shard
from fedsplit.durable import write_text
from fedsplit.errors import InputError, SettingError, check_all
from fedsplit.federation.manifest import digest
from fedsplit.federation.messages import Request
from fedsplit.model.sources import config_folder, weights_folder
from fedsplit.model.token_ids import check_largest
from fedsplit.model.weight_files import find_tensors
from fedsplit.settings.config import OPTIONS, SETTINGS, Config
from fedsplit.settings.documents import as_document, dotted, draft, from_document, suggest
from fedsplit.settings.flags import read_toml

_PLACES = ("dataset", "data.held_out", "init_adapter", "trunk.server", "trunk.token_file", "trunk.tls")
"""Settings that name files and servers. What a run says of them is ignored: no server chooses them for a site."""

_OF_SERVER = ("data.at", "data.folder", "data.show")

OWN = (
    *_PLACES,
    *("model", "device", "threads", "trunk.wait"),
    *(name for name in SETTINGS if name.startswith("data.") and name not in (*_PLACES, *_OF_SERVER)),
)
"""Settings of a run that a site may set."""

NODE_KEY = "fedsplit-site"
"""Key of a SuperNode's configuration: the file of a site. Without it, the SuperNode is one of a simulation."""

_FIELDS = ("client", "name", "folder", "allow-code")
"""Values of a site beside its settings."""

_NAME_OF_RUN = "run-of-sites"
"""File at the server with the name by which sites know a run."""


@dataclass(frozen=True)
class Site:
    """A client at a site of its own.

    Attributes:
        client: Number of the client, from 0: at the trunk, the number of the certificate's name.
        name: Name of the client, which the server learns.
        folder: Folder of the site for data and state of runs.
        settings: Settings that replace those of a run, by dotted name.
        allows_code: True if a run may name code that the site imports, beside fedsplit's own.

    Example:
        >>> site = Site(0, "ward a", Path("state"), {"dataset": "notes.jsonl", "trunk.server": "127.0.0.1:50052"})
        >>> from fedsplit.settings.documents import build
        >>> site.settings_for(build({"data.at": "site", "rounds": 3})).dataset
        'notes.jsonl'
    """

    client: int
    name: str
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    allows_code: bool = False

    def settings_for(self, run: Config) -> Config:
        """Returns the settings of a run at this site.

        Raises:
            InputError: The site does not play the run. All reasons are reported together.
        """
        check_all(self._objections(run))
        document = as_document(run)
        options = {setting: document.pop(table) for setting, table in OPTIONS.items()}
        of_run = {name: value for name, value in dotted(document).items() if name not in _PLACES}
        return draft({**of_run, **self.settings}, options).checked()

    def _objections(self, run: Config) -> Iterator[InputError]:
        """Yields the reasons for which the site does not play a run."""
        if run.data.at != "site":
            yield SettingError("data.at", run.data.at, "site: this client keeps its data for itself")
        if run.init_adapter and "init_adapter" not in self.settings:
            allowed = f"none, since the site {self.name} has no adapter to start from"
            yield SettingError("init_adapter", "the run's", allowed)
        if self.allows_code:
            return
        named = {
            "strategy": (run.strategy,),
            "objective": (run.objective,),
            "metric": run.metric,
            "mods": run.mods,
        }
        for setting, specs in named.items():
            for spec in specs:
                # Flower's own mods and strategies are installed with fedsplit.
                if ":" in spec and not spec.startswith("flwr."):
                    allowed = f"code that comes with fedsplit; the site {self.name} imports no other for a run"
                    yield SettingError(setting, spec, allowed)

    def received(self, request: Request) -> Request:
        """Returns a server's request as this site carries it out: with its own settings, data and state.

        The first request of a run reads the data set, and writes the sequences of the client to the site's folder.

        Raises:
            InputError: The site does not play the run, or its data cannot be used.
        """
        config = self.settings_for(from_document(json.loads(request.briefing.run)))
        # Absolute, since the processes of a SuperNode work in another folder.
        root = (self.folder / _checked_name(request.briefing.store)).absolute()
        if not shard_file(root, self.client).exists():
            check_model(config, request.briefing.model)
            shard = shard_of_site(config, self.name)
            in_training = int(shard.train.ids.max())
            in_held_out = int(shard.held_out.ids.max())
            largest = max(in_training, in_held_out)
            check_largest(config_folder(config.model), config.model, largest)
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Last: a file that is there says that the checks above have passed.
            write_shard(root, self.client, shard)
        threads = config.threads or request.briefing.threads
        run = json.dumps(as_document(config))
        briefing = replace(request.briefing, run=run, store=str(root), threads=threads)
        return replace(request, client=self.client, briefing=briefing)

    def remove_data(self) -> int:
        """Removes the sequences that runs have left in the site's folder. The state stays, for runs that go on.

        Returns:
            The number of runs with data.
        """
        if not self.folder.is_dir():
            return 0
        roots = [path for path in self.folder.iterdir() if path.is_dir()]
        return sum(bool(remove_left(root)) for root in roots)


def check_model(config: Config, digests: str) -> None:
    """Checks that the base model at this site is the run's. Losses of another model would be wrong without a sign.

    A site may have only the files with the weights of bottom and top: files that both have are compared.

    Args:
        config: Settings of the run at this site.
        digests: Digests of the files of the run's model by name, as JSON; empty if the run tells none.

    Raises:
        SettingError: A file differs.
    """
    of_run = json.loads(digests or "{}")
    weights = weights_folder(config, ["bottom", "top"])
    files = {config_folder(config.model) / "config.json", *find_tensors(weights).values()}
    for file in sorted(files):
        if file.name in of_run and file.is_file() and digest(file) != of_run[file.name]:
            raise SettingError("model", config.model, f"the run's model; {file.name} at this site is another file")


def _checked_name(run: str) -> str:
    """Returns the name by which sites know a run. A server must not choose a path at a site.

    Raises:
        SettingError: It is no name that `name_of_run` has made.
    """
    if not (len(run) == 32 and run.isascii() and run.isalnum()):
        raise SettingError("data.at", "site", "a server that names its run for sites")
    return run


def name_of_run(folder: Path) -> str:
    """Returns the name by which sites know a run: their state of other runs must not be taken for the run's.

    Args:
        folder: Folder in which the run's server keeps the name, so that a resumed run has the same.
    """
    file = folder / _NAME_OF_RUN
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid4().hex)
    return file.read_text(encoding="utf-8")


def read_site(path: Path) -> Site:
    """Reads a site's file.

    Args:
        path: A TOML file with the values that `make_site` takes.

    Raises:
        InputError: The file cannot be read, or a value is not possible. All errors are reported together.
    """
    return make_site(*read_toml(path))


def make_site(values: Mapping[str, object], options: Mapping[str, Any]) -> Site:
    """Makes a site from the values of its file.

    Args:
        values: Values by dotted name: `client`, `name`, `folder` and, if the site wants it, `allow-code`; and the
            site's settings.
        options: Tables of options by setting. A site has none.

    Raises:
        InputError: A value is not possible. All errors are reported together.
    """
    # Collected, so that a user reads all errors of the file at once.
    errors: list[InputError] = []
    errors += [SettingError(table, "a table", "none of a site") for table, given in options.items() if given]
    fields = {name: values.get(name) for name in _FIELDS}
    settings = {name: value for name, value in values.items() if name not in _FIELDS}
    errors += _wrong_fields(fields)
    for name in settings:
        if name not in OWN:
            hint = "it is the run's to set" if name in SETTINGS else suggest(name, [*_FIELDS, *OWN])
            errors.append(InputError(f"a site cannot set {name}; {hint}"))
    for name, words in (("dataset", "the data set of the site"), ("trunk.server", "the address of the trunk")):
        if name not in settings:
            errors.append(SettingError(name, "nothing", words))
    known = {name: value for name, value in settings.items() if name in SETTINGS}
    errors += draft(known, {}).errors
    check_all(errors)
    return Site(
        client=int(str(fields["client"])),
        name=str(fields["name"]),
        folder=Path(str(fields["folder"])),
        settings=settings,
        allows_code=bool(fields["allow-code"]),
    )


def write_site(site: Site) -> Path:
    """Writes a site's file into the site's folder, for `read_site`. Paths in the file are absolute.

    Returns:
        The file.
    """
    settings = dict(site.settings)
    for name in (*_PLACES, "model"):
        value = settings.get(name)
        if isinstance(value, str) and value and path_of(value).exists():
            settings[name] = str(Path(value).absolute())  # the processes of a SuperNode work in another folder
    document: dict[str, Any] = {
        "client": site.client,
        "name": site.name,
        "folder": str(site.folder.absolute()),
    }
    document["allow-code"] = site.allows_code
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        table = document.setdefault(section, {}) if section else document
        table[key] = value
    file = site.folder.absolute() / "site.toml"
    site.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(file, tomli_w.dumps(document))
    return file


def _wrong_fields(fields: Mapping[str, object]) -> Iterator[SettingError]:
    """Yields an error for each wrong value of a site's own fields."""
    client = fields["client"]
    if type(client) is not int or client < 0:
        yield SettingError("client", client, "a whole number from 0")
    for name in ("name", "folder"):
        value = fields[name]
        if not isinstance(value, str) or not value:
            yield SettingError(name, value, "a text")
    if fields["allow-code"] not in (None, True, False):
        yield SettingError("allow-code", fields["allow-code"], "true | false")
