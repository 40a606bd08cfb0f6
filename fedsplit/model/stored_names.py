"""Names of a model's parameters in checkpoints, by the library's own rules of conversion.

A checkpoint may have other names than the library's classes, and may have a parameter in several tensors, such as one
for each expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

_NESTED = "language_model."
"""Part of a parameter's name in the checkpoint of a model that has the text model nested in it."""


@dataclass
class Source:
    """The tensors in the files of which a parameter is made.

    Attributes:
        converter: The library's rule; None for a parameter that is one tensor under some name.
        target: Name of the first parameter that the rule results in.
        found: Names in the files, by the pattern of the rule; without a rule by an empty text.
    """

    converter: WeightConverter | None
    target: str
    found: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names in the files, piece by piece."""
        return [name for names in self.pieces for name in names]

    @property
    def patterns(self) -> list[str]:
        """Patterns of the rule for which the files have tensors, in the order of the pieces."""
        if self.converter is None:
            return list(self.found)
        return [pattern for pattern in self.converter.source_patterns if pattern in self.found]

    @property
    def pieces(self) -> list[list[str]]:
        """Names in the files of each piece, in the order of the pieces."""
        return [self.found[pattern] for pattern in self.patterns]

    @property
    def is_plain(self) -> bool:
        """True for a parameter that is one tensor in the files."""
        return self.converter is None

    @property
    def is_complete(self) -> bool:
        """True if the files have every piece."""
        return self.converter is None or len(self.pieces) == len(self.converter.source_patterns)

    @property
    def is_stack(self) -> bool:
        """True for a parameter that stacks the experts' tensors, and joins pieces by rows (dimension -2)."""
        operations = [] if self.converter is None else self.converter.operations
        kinds = [type(operation) for operation in operations]
        stacks = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
        return stacks and operations[0].dim == 0 and all(operation.dim == 1 for operation in operations[1:])

    def converted(self, name: str, tensors: Sequence[Sequence[Tensor]], model: PreTrainedModel) -> Tensor:
        """Converts the tensors of the files to the parameter.

        Args:
            name: Name of the parameter.
            tensors: Tensors of each piece, as in `pieces`.
            model: The model without weights, for the library's rules.

        Raises:
            ValueError: The library's rule does not result in the parameter.
        """
        assert self.converter is not None
        by_pattern = zip(self.patterns, map(list, tensors), strict=True)
        values: dict[str, object] = dict(by_pattern)
        for operation in self.converter.operations:
            values = operation.convert(
                values,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.target,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        for pattern, value in values.items():
            if pattern in name:
                tensor = value[0] if isinstance(value, list) else value
                assert isinstance(tensor, Tensor)
                return tensor
        raise ValueError(f"transformers' rule of conversion has no value for {name}")


class _Rules:
    """The library's rules of conversion for one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Asks the library for the rules."""
        self.known = model.state_dict(keep_vars=True)
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}

    def renamed(self, name: str) -> tuple[str, str | None]:
        """Returns the name of a parameter, and the pattern of its converter, for a name in the files."""
        candidates = [name]
        if _NESTED in name:
            # The text model alone has the name behind the nesting, with or without the name of its decoder before it.
            inner = name.rpartition(_NESTED)[2]
            candidates += [inner, f"{self._prefix}.{inner}"]
        for candidate in candidates:
            target, pattern = rename_source_key(candidate, self._renamings, self._converters, self._prefix, self.known)
            if target in self.known:
                return target, pattern
        return name, None

    def converter(self, pattern: str) -> WeightConverter:
        """Returns the converter with a pattern."""
        return self._by_pattern[pattern]


def sources_of(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Source]:
    """Finds the tensors of each parameter.

    Args:
        model: The model without weights.
        stored: Names of all tensors in the files.

    Returns:
        The sources, by the name of the parameter or persistent buffer.

    Raises:
        ValueError: The files have one parameter under two names.
    """
    rules = _Rules(model)
    sources: dict[str, Source] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
        target, pattern = rules.renamed(name)
        if pattern is None:
            _refuse_second(sources.get(target), name)
            sources[target] = Source(None, target, {"": [name]})
            continue
        converter = rules.converter(pattern)
        # A rule may make several parameters of the same tensors. Each of them gets a source with all tensors.
        for other in converter.target_patterns:
            sibling = target.replace(converter.target_patterns[0], other)
            source = sources.setdefault(sibling, Source(converter, target))
            if source.converter is not converter:
                _refuse_second(source, name)
            source.found.setdefault(pattern, []).append(name)
    return sources


def _refuse_second(first: Source | None, name: str) -> None:
    """Refuses a second source of a parameter.

    Raises:
        ValueError: There is a first source.
    """
    if first is not None:
        raise ValueError(f"the checkpoint has one tensor twice, as {first.names[0]} and as {name}")
