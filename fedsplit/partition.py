"""Which client owns which text, and what of it is held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.config import SettingError
from fedsplit.corpus import Document, pack, read_documents, tokenise
from fedsplit.seeds import derive_seed

HELD_OUT_DOCUMENTS = 4
"""Of an owner's texts, every fourth by date is held out; the last one where there are fewer."""

HELD_OUT_BLOCKS = 8
"""Of a client's blocks without owners, every eighth is held out, and at least one."""


@dataclass(frozen=True)
class Shard:
    """One client's data.

    Attributes:
        name: Whose it is.
        train: Token ids (n, T).
        held_out: Token ids (m, T), never trained on.
    """

    name: str
    train: Tensor
    held_out: Tensor


def batch(blocks: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The batch of a step: passes over the blocks, each shuffled anew, cut into batches without a gap.

    A function of its arguments alone, so that a client that starts again in the middle continues in order.

    Args:
        blocks: Token ids (n, T).
        step: Steps made before this one, over all rounds.
        size: Sequences a batch.
        seed: Decides the order.

    Returns:
        Token ids (size, T).
    """
    positions = range(step * size, (step + 1) * size)
    orders = {epoch: _shuffled(len(blocks), seed, epoch) for epoch in {p // len(blocks) for p in positions}}
    return blocks[[orders[p // len(blocks)][p % len(blocks)] for p in positions]]


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def spread(blocks: Tensor, most: int) -> Tensor:
    """At most so many blocks (n, T), evenly spaced over all of them, so that no text is favoured."""
    if len(blocks) <= most:
        return blocks
    return blocks[[index * len(blocks) // most for index in range(most)]]


def _texts_by_owner(documents: Sequence[Document], tokens: Sequence[list[int]]) -> dict[str, list[list[int]]]:
    """The tokens of each owner's texts; owners and texts in the order of the documents."""
    texts: dict[str, list[list[int]]] = {}
    for document, ids in zip(documents, tokens, strict=True):
        texts.setdefault(document.owner, []).append(ids)
    return texts


def _by_owner(documents: Sequence[Document], tokens: Sequence[list[int]], length: int, end: int) -> list[Shard]:
    """The shards of all owners who have enough text for a training and a held-out block."""
    shards = []
    for owner, own in _texts_by_owner(documents, tokens).items():
        held_out = own[HELD_OUT_DOCUMENTS - 1 :: HELD_OUT_DOCUMENTS] or own[-1:]
        train = [ids for ids in own if not any(ids is other for other in held_out)]
        blocks = [pack(texts, length, end) for texts in (train, held_out)]
        if all(blocks):
            shards.append(Shard(owner, torch.tensor(blocks[0]), torch.tensor(blocks[1])))
    return shards


def _indices(spec: str, owners: Sequence[str], clients: int, seed: int) -> list[list[int]]:
    """Deals blocks out with a partitioner of flwr-datasets."""
    import datasets  # with flwr_datasets, takes seconds to import; the default run needs neither
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

    datasets.disable_progress_bars()
    generator = torch.Generator().manual_seed(derive_seed(seed, "partition"))
    order = torch.randperm(len(owners), generator=generator).tolist()
    kind, _, alpha = spec.partition(":")
    partitioner: Partitioner = IidPartitioner(num_partitions=clients)
    if kind == "dirichlet":
        partitioner = DirichletPartitioner(clients, "owner", float(alpha), min_partition_size=2, seed=seed)
    partitioner.dataset = datasets.Dataset.from_dict({"block": order, "owner": [owners[i] for i in order]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each draw that leaves a client too little, before the error
        return [list(partitioner.load_partition(client)["block"]) for client in range(clients)]


def _by_block(
    documents: Sequence[Document],
    tokens: Sequence[list[int]],
    length: int,
    end: int,
    spec: str,
    clients: int,
    seed: int,
) -> list[Shard]:
    """Shards of single blocks, whoever wrote them."""
    blocks: list[list[int]] = []
    owners: list[str] = []
    for owner, own in _texts_by_owner(documents, tokens).items():
        packed = pack(own, length, end)
        blocks += packed
        owners += [owner] * len(packed)
    if clients * 2 > len(blocks):
        words = f"1 to {len(blocks) // 2} (two sequences of {length} tokens a client, of {len(blocks)} there are)"
        if len(blocks) < 2:
            found = f"a text of {len(blocks)} sequences ({documents[0].name}, {len(documents)} in all)"
            raise SettingError("dataset", found, f"two sequences of {length} tokens or more")
        raise SettingError("clients", clients, words)
    try:
        dealt = _indices(spec, owners, clients, seed)
    except ValueError:
        words = f"fewer clients than {clients}, or a larger ALPHA, so that each client gets two sequences"
        raise SettingError("partition", spec, words) from None
    data = torch.tensor(blocks)
    shards = []
    for client, indices in enumerate(dealt):
        held_out = indices[::HELD_OUT_BLOCKS]
        chosen = set(held_out)
        train = [index for index in indices if index not in chosen]
        shards.append(Shard(f"client {client}", data[train], data[held_out]))
    return shards


def make_shards(
    dataset: str, spec: str, clients: int, length: int, seed: int, model_path: Path, end: int
) -> list[Shard]:
    """Reads a data set and deals it out.

    Args:
        dataset: As `fedsplit.corpus.read_documents` takes it.
        spec: "natural" (a client an owner), "iid" or "dirichlet:ALPHA" (over the owners); "auto" is natural for
            the bundled corpus as far as its presidents go, and iid otherwise.
        clients: How many.
        length: Tokens a sequence.
        seed: Decides what is dealt to whom, other than by nature.
        model_path: The model's folder, for its tokenizer.
        end: The id of the token that ends a text.

    Returns:
        A shard a client.

    Raises:
        SettingError: There is too little text for so many clients.
    """
    documents = read_documents(dataset)
    tokens = tokenise(documents, model_path)
    natural = _by_owner(documents, tokens, length, end) if spec in ("auto", "natural") else []
    if spec == "natural" or (spec == "auto" and dataset == "sotu" and clients <= len(natural)):
        if clients > len(natural):
            words = f"1 to {len(natural)} (owners with text enough), or --partition iid"
            raise SettingError("clients", clients, words)
        return natural[:clients]
    return _by_block(documents, tokens, length, end, "iid" if spec == "auto" else spec, clients, seed)


def all_text(dataset: str, length: int, model_path: Path, end: int) -> dict[str, Tensor]:
    """A data set that nobody trains on, as it is: nothing is held back, and nothing dealt out.

    Args:
        dataset: As `fedsplit.corpus.read_documents` takes it.
        length: Tokens a sequence.
        model_path: The model's folder, for its tokenizer.
        end: The id of the token that ends a text.

    Returns:
        Token ids (n, T) of each owner who has text for a sequence at least.

    Raises:
        SettingError: Nobody has.
    """
    documents = read_documents(dataset)
    owned = _texts_by_owner(documents, tokenise(documents, model_path))
    packed = {owner: blocks for owner, texts in owned.items() if (blocks := pack(texts, length, end))}
    if not packed:
        raise SettingError("dataset", dataset, f"a text of {length} tokens or more")
    return {owner: torch.tensor(blocks) for owner, blocks in packed.items()}
