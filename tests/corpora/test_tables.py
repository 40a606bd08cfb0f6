"""Tables from everywhere: files, folders, what save_to_disk wrote, and a repository as the Hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsplit.corpora.tables import check_dataset, read_held_out, read_table
from fedsplit.errors import SettingError
from fedsplit.settings.sections import DataSettings

ROWS = [{"text": "one, two", "owner": "ann"}, {"text": " three\n", "owner": "bob"}, {"text": "", "owner": "ann"}]


def read(path: Path, **settings: str) -> dict[str, list[object]]:
    return {name: list(values) for name, values in read_table(str(path), DataSettings(**settings)).columns.items()}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_all_types(tmp_path: Path, suffix: str) -> None:
    import datasets

    path, rows = tmp_path / f"notes.{suffix}", datasets.Dataset.from_list(ROWS)
    if suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](str(path))
    found = read(path)
    assert found["owner"] == ["ann", "bob", "ann"]
    assert [str(text or "").strip() for text in found["text"]] == ["one, two", "three", ""]


def test_texts_in_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("one\n")
    assert read(tmp_path / "ann.txt") == {"text": ["one"], "owner": ["ann"]}
    (tmp_path / "bob").mkdir()
    for name in ("1", "2"):
        (tmp_path / "bob" / f"{name}.txt").write_text(name)
    assert read(tmp_path) == {"text": ["one", "1", "2"], "owner": ["ann", "bob", "bob"]}


def test_a_folder_of_two_kinds_of_files_is_refused_with_one_of_each(tmp_path: Path) -> None:
    """The rarer kind would be passed over without a word."""
    (tmp_path / "notes").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "notes" / name).write_text(json.dumps(ROWS[0]))
    (tmp_path / "notes" / "old").mkdir()
    (tmp_path / "notes" / "old" / "c.txt").write_text("lost")
    words = r"a folder whose data files are of one kind \(a.jsonl and old/c.txt are of two\)"
    for check in (check_dataset, lambda folder: read_table(folder, DataSettings())):
        with pytest.raises(SettingError, match=rf"^dataset: .*notes is not possible; allowed: {words}$"):
            check(str(tmp_path / "notes"))
    with pytest.raises(SettingError, match=rf"^data.held_out: .*notes is not possible; allowed: {words}$"):
        read_held_out("sotu", DataSettings(held_out=str(tmp_path / "notes")))


def test_what_is_no_data_does_not_count_as_a_kind(tmp_path: Path) -> None:
    """Both spellings of JSON are one kind; what lies beside data and what is hidden are none."""
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS[1]) + "\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.txt").write_text("hidden")
    assert read(tmp_path)["owner"] == ["ann", "bob"]
    (tmp_path / "b.json").unlink()
    (tmp_path / "a.jsonl").rename(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("text,owner\none,ann\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    check_dataset(str(tmp_path))
    assert read(tmp_path)["owner"] == ["ann"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A data set of two configurations and two splits, laid out as on the Hub, without a script."""
    folder = tmp_path / "wikitext"
    lines = ["---", "configs:"]
    for config in ("small", "large"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(json.dumps({"text": f"{config} {split} {n}"}) for n in range(4)))
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---"]))
    return folder


def test_a_repository_with_configurations_and_splits(repository: Path) -> None:
    assert read(repository, config="small") == {"text": [f"small train {n}" for n in range(4)]}
    (repository / "LICENSE.txt").write_text("Of another kind, and no data: the README.md says what is.")
    assert read(repository, config="large", split="test[:50%]") == {"text": ["large test 0", "large test 1"]}
    held_out = read_held_out(str(repository), DataSettings(config="small", held_out="test"))
    assert list(held_out.columns["text"]) == [f"small test {n}" for n in range(4)]
    for settings, words in (
        ({}, "Config name is missing"),
        ({"config": "huge"}, "huge"),
        ({"config": "small", "split": "dev"}, "dev"),
    ):
        with pytest.raises(SettingError, match=f"dataset: .*{words}") as caught:
            read(repository, **settings)
        assert "\n" not in str(caught.value)


def test_classes_keep_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).save_to_disk(str(tmp_path / "one"))
    table = read_table(str(tmp_path / "one"), DataSettings())
    assert (list(table.columns["label"]), table.classes) == ([1, 0], {"label": ["bad", "good"]})


def test_held_out_texts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    table = read_held_out("sotu", DataSettings(held_out=str(tmp_path / "held.txt")))
    assert table.columns == {"text": ["held out"], "owner": ["held"]}
    for dataset, held_out in (("sotu", "test"), (str(tmp_path / "held.txt"), "test")):
        with pytest.raises(SettingError, match=r"data.held_out: test is not possible; allowed: a file or folder"):
            read_held_out(dataset, DataSettings(held_out=held_out))


@pytest.mark.parametrize("dataset", ["missing.jsonl", "notes.pdf", "./nowhere", "a/b/c", "user/file.csv"])
def test_what_is_not_there_is_refused_without_reading(dataset: str) -> None:
    with pytest.raises(SettingError, match=f"dataset: {dataset} is not possible; allowed: sotu, synthetic, a Hub id"):
        check_dataset(dataset)


def test_what_has_no_configurations_gets_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for dataset, data, words in (
        ("sotu", DataSettings(config="x"), "data.config: x is not possible; allowed: none"),
        ("synthetic", DataSettings(split="test"), "data.split: test is not possible; allowed: train"),
        (str(tmp_path / "empty"), DataSettings(), "no data files in it"),
    ):
        with pytest.raises(SettingError, match=words):
            check_dataset(dataset, data)


def test_a_hub_that_cannot_be_reached_gets_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_dataset("someone/notes")
    with pytest.raises(
        SettingError, match=r"dataset: someone/notes is not possible; allowed: a data set of the Hub"
    ) as e:
        read_table("someone/notes", DataSettings())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "it is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n{"text": "b"}', "line 3 is not JSON"),
        ("a.json", '[\n{"text": "a"},\n{"text": b}]', "line 3 column"),
        ("a.csv", "text\n", "it is empty"),
        ("a.parquet", "PAR", "a .parquet file that can be read"),
        ("a.txt", b"\xff\xfe", "a text in UTF-8"),
    ],
)
def test_wrong_files_get_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingError, match=f"^dataset: .*{message}") as caught:
        read_table(str(path), DataSettings())
    assert "\n" not in str(caught.value)


def test_a_part_of_a_split(tmp_path: Path) -> None:
    """Of every kind of file, and of files that are splits by their names."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": str(n)}) for n in range(4)))
    (tmp_path / "a.txt").write_text("one")
    assert read(tmp_path / "a.jsonl", split="train[:50%]+train[3:]") == {"text": ["0", "1", "3"]}
    assert read(tmp_path / "a.txt", split="train[:100%]") == {"text": ["one"], "owner": ["a"]}
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(SettingError, match=r"dataset: .* can be read \(Unknown split"):
            read(tmp_path / name, split="test")
    (tmp_path / "folder").mkdir()
    for split, text in (("train", "NA"), ("test", "2021-03-04")):
        (tmp_path / "folder" / f"{split}.csv").write_text(f"text,label\n{text},1\n")
    assert read(tmp_path / "folder") == {"text": ["NA"], "label": [1]}
    assert read(tmp_path / "folder", split="test") == {"text": ["2021-03-04"], "label": [1]}
    for split in ("train+test", "all"):
        assert read(tmp_path / "folder", split=split)["text"] == ["NA", "2021-03-04"]
    assert read(tmp_path / "a.jsonl", split="all") == {"text": ["0", "1", "2", "3"]}


README = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: owner
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': bad
          '1': good
---
"""


@pytest.mark.parametrize("labels", [("good", "bad", ""), ("1", "0", "")])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_types_in_a_readme_change_no_value_and_name_the_classes(
    tmp_path: Path, suffix: str, labels: tuple[str, ...]
) -> None:
    """`datasets` would read a text `NA` as none, and an owner `007` as 7."""
    (tmp_path / "README.md").write_text(README)
    rows = list(zip(("NA", "null", "2021-03-04"), ("007", "1e5", "true"), labels, strict=True))
    lines = ["text,owner,label", *map(",".join, rows)]
    if suffix == "jsonl":
        lines = [json.dumps({"text": text, "owner": owner, "label": label or None}) for text, owner, label in rows]
    (tmp_path / f"train.{suffix}").write_text("\n".join(lines) + "\n")
    table = read_table(str(tmp_path), DataSettings())
    assert table.columns == {
        "text": ["NA", "null", "2021-03-04"],
        "owner": ["007", "1e5", "true"],
        "label": [1, 0, None],
    }
    assert table.classes == {"label": ["bad", "good"]}


def test_a_class_that_a_readme_does_not_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "train.csv").write_text("text,owner,label\na,b,great\n")
    with pytest.raises(SettingError, match=r"^dataset: .*Invalid string class label great"):
        read(tmp_path)


def test_columns_of_one_name_matter_where_a_setting_names_them(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("text,note,note\na,b,c\n")
    table = read_table(str(path), DataSettings())
    assert table.column("data.text", "text") == ["a"]
    words = r"^data.text: note is not possible; allowed: a column whose name no other column of .*notes.csv has$"
    with pytest.raises(SettingError, match=words):
        table.column("data.text", "note")


def test_a_readme_that_says_how_to_read_is_heard(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("text;owner\na,b;ann\n")
    configs = '---\nconfigs:\n- config_name: default\n  data_files: notes.csv\n  sep: ";"\n---\n'
    (tmp_path / "README.md").write_text(configs)
    assert read(tmp_path) == {"text": ["a,b"], "owner": ["ann"]}
