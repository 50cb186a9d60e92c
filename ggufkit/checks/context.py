"""What a rule is given: the opened file, and everything derived from it, each thing computed once and when first
asked for. Nothing here judges; what could not be had says why (`Context.lacks`), so that no rule is silently
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufkit import arch, chat, quants
from ggufkit.chat import TemplateError, TemplateFacts
from ggufkit.checks.rule import Found, Need, Profile
from ggufkit.checks.words import Words
from ggufkit.container import GGUF, Tensor, ValueType
from ggufkit.errors import FormatError, GgufkitError
from ggufkit.findings import Skipped

if TYPE_CHECKING:
    from ggufkit.checks.running import Running
    from ggufkit.manifest import Manifest
    from ggufkit.stats import TensorStats

#: called with the bytes measured so far and the bytes in all
Progress = Callable[[int, int], None]
#: called with the name of a kernel that has to be compiled first
Announce = Callable[[str], None]


class Scan(Protocol):
    """What measures tensors, with the signature of `ggufkit.stats.scan`: on the CPU, or on a GPU."""

    def __call__(
        self,
        gguf: GGUF,
        tensors: Iterable[Tensor],
        *,
        threads: int | None,
        progress: Callable[[int], None],
        announce: Announce | None,
    ) -> Iterator[tuple[Tensor, TensorStats | GgufkitError]]: ...


#: a vector larger than this is no bias or norm
_VECTOR_BYTES = 4 << 20
_TEMPLATE = "tokenizer.chat_template"
#: values of general.type, and architectures, that are no language model by themselves
_OTHER_TYPES = frozenset({"adapter", "mmproj", "imatrix", "projector"})
_OTHER_ARCHITECTURES = frozenset({"clip", "controlvector", "imatrix"})


class Context:
    """One opened file as the rules see it.

    Attributes:
        gguf: the file or split set.
        profile: whose reading decides where parsers disagree.
        reference, manifest: something known to be good to compare with, when the user gave it.
        running: the model at work, once the static rules are through and if it is run at all.
    """

    def __init__(
        self,
        gguf: GGUF,
        profile: Profile = "llama.cpp",
        *,
        jobs: int | None = None,
        progress: Progress | None = None,
        announce: Announce | None = None,
        scan: Scan | None = None,
        reference: GGUF | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.gguf = gguf
        self.reference = reference
        self.manifest = manifest
        self.running: Running | None = None
        self.profile = profile
        self.unmeasured: dict[str, GgufkitError] = {}
        self.skipped: list[Skipped] = []
        self._jobs = jobs
        self._progress = progress
        self._announce = announce
        self._scan = scan

    def lacks(self, need: Need) -> str | None:
        """Why a rule with this need has nothing to look at; None when it has."""
        return _LACKS[need](self)

    def skip(self, what: str, why: str, *, asked: bool = False, newer: bool = False) -> None:
        """Say in the report that something could not be judged."""
        self.skipped.append(Skipped(what, why, asked=asked, newer=newer))

    def problems(self, *kinds: str, help_: str | None = None) -> Iterator[Found]:
        """What the reader reported of these kinds."""
        for problem in self.gguf.problems:
            if problem.kind in kinds:
                in_set = len(self.gguf.shards) > 1 and not problem.kind.startswith("shard-")
                where = f"{self.gguf.shards[problem.shard].source.path.name}: " if in_set else ""
                message = where + problem.message
                yield Found(message, problem.tensor, problem.key, offset=problem.offset, help=help_)

    # -- metadata ---------------------------------------------------------------------------------------------

    @property
    def architecture(self) -> str | None:
        return self.gguf.architecture

    @cached_property
    def is_model(self) -> bool:
        """Whether this is a language model with weights: not an adapter, a projector, a vocabulary, an image model."""
        if self.text("general.type") in _OTHER_TYPES or self.architecture in _OTHER_ARCHITECTURES:
            return False
        named = any(name == "token_embd.weight" or name.startswith("blk.") for name in self.gguf.tensors)
        return named or (bool(self.gguf.tensors) and self.architecture in arch.ARCHITECTURES)

    def arch_key(self, key: str) -> str:
        """`context_length` → `qwen2.context_length`."""
        return f"{self.architecture}.{key}"

    def integer(self, key: str) -> int | None:
        """The value of a key when it is an integer."""
        value = self.scalar(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def number(self, key: str) -> float | None:
        """The value of a key when it is an integer or a float."""
        value = self.scalar(key)
        return None if value is None or isinstance(value, bool) else float(value)

    def flag(self, key: str) -> bool | None:
        """The value of a key when it is a bool."""
        value = self.scalar(key)
        return value if isinstance(value, bool) else None

    def text(self, key: str) -> str | None:
        """The value of a key when it is a string."""
        field = self.gguf.fields.get(key)
        return str(self.gguf.metadata[key]) if field and field.type is ValueType.STRING else None

    def scalar(self, key: str) -> int | float | bool | None:
        field = self.gguf.fields.get(key)
        return field.scalar if field else None

    def place(self, key: str) -> int | None:
        """The byte offset of a key's value."""
        field = self.gguf.fields.get(key)
        return field.value_offset if field else None

    @cached_property
    def words(self) -> Words:
        """The tokens, for rules that need a vocabulary."""
        assert self.lacks(Need.VOCABULARY) is None
        return Words(self.gguf)

    @cached_property
    def templates(self) -> Mapping[str, TemplateFacts | TemplateError]:
        """Every chat template by its key: what it says about itself, or why it cannot be read. None is ever run."""
        read: dict[str, TemplateFacts | TemplateError] = {}
        for key in self.gguf.fields:
            if (key == _TEMPLATE or key.startswith(_TEMPLATE + ".")) and (text := self.text(key)) is not None:
                try:
                    read[key] = chat.facts(text)
                except TemplateError as error:
                    read[key] = error
        return read

    # -- derived ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> arch.Config | None:
        """The hyperparameters, when the architecture is modelled and they are consistent."""
        return self._config_or_error if isinstance(self._config_or_error, arch.Config) else None

    @property
    def config_error(self) -> GgufkitError | None:
        """Why there is no config."""
        return self._config_or_error if isinstance(self._config_or_error, GgufkitError) else None

    @cached_property
    def _config_or_error(self) -> arch.Config | GgufkitError:
        try:
            return arch.read_config(self.gguf)
        except GgufkitError as error:
            return error

    @cached_property
    def readable(self) -> list[Tensor]:
        """The tensors whose bytes are there.

        What a header merely claims costs nothing, and where tensors overlap, no more than twice the file is read.
        """
        readable = []
        left = 2 * self.gguf.size
        for tensor in self.gguf.tensors.values():
            try:
                self.gguf.read(tensor, tensor.nbytes or 0, 0)
                left -= tensor.nbytes or 0
                if left < 0:
                    raise FormatError("its bytes belong to other tensors as well")
                readable.append(tensor)
            except GgufkitError as error:
                self.unmeasured[tensor.name] = error
        return readable

    @cached_property
    def vectors(self) -> Mapping[str, NDArray[np.float32]]:
        """The float tensors of one dimension (biases, norms) that can be read, as float32 by name.

        They are small and looked at from many sides, so that they are kept; larger ones are left to `stats`.
        """
        found = {}
        for tensor in self.readable:
            if tensor.type is None or tensor.type.kind != "float" or len(tensor.dims) != 1:
                continue
            if 0 < (tensor.nbytes or 0) <= _VECTOR_BYTES:
                with suppress(GgufkitError):  # the rules of the structure speak of what cannot be read
                    raw = self.gguf.read(tensor)
                    found[tensor.name] = quants.dequantize(tensor.type, raw, byteorder=self.gguf.byteorder)
        return found

    def element_offset(self, name: str, index: int) -> int:
        """The byte of the file where element `index` of a float tensor stands."""
        tensor = self.gguf.tensors[name]
        return tensor.offset + index * (tensor.type.type_size if tensor.type else 0)

    def block_offset(self, name: str, block: int) -> int:
        """The byte of the file where block `block` of a tensor begins."""
        tensor = self.gguf.tensors[name]
        return tensor.offset + block * (tensor.type.type_size if tensor.type else 0)

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor's values are packed into blocks."""
        type_ = self.gguf.tensors[name].type
        return type_ is not None and type_.is_block

    @property
    def was_measured(self) -> bool:
        """Whether a rule asked for `stats`."""
        return "stats" in self.__dict__

    @cached_property
    def stats(self) -> Mapping[str, TensorStats]:
        """The statistics of every tensor that could be read, by name, in the file's order.

        Computed in one pass when first asked for; `unmeasured` then says which tensors are missing, and why.
        """
        from ggufkit import stats

        tensors = self.readable
        total, done = sum(tensor.nbytes or 0 for tensor in tensors), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self._progress:
                self._progress(done, total)

        scan = self._scan or stats.scan
        found: dict[str, TensorStats] = {}
        for tensor, result in scan(self.gguf, tensors, threads=self._jobs, progress=advance, announce=self._announce):
            if isinstance(result, GgufkitError):
                self.unmeasured[tensor.name] = result
            else:
                found[tensor.name] = result
        return found


def _no_header(context: Context) -> str | None:
    return None if context.gguf.complete else "the header breaks off"


def _no_tensors(context: Context) -> str | None:
    return _no_header(context) or (None if context.gguf.tensors else "the file has no tensors")


def _no_model(context: Context) -> str | None:
    reason = _no_tensors(context)
    return reason or (None if context.is_model else "the file is no language model")


def _no_config(context: Context) -> str | None:
    reason = _no_model(context)
    return reason or (str(context.config_error.message) if context.config_error else None)


def _no_vocabulary(context: Context) -> str | None:
    field = context.gguf.fields.get("tokenizer.ggml.tokens")
    if field is not None and field.element_type is ValueType.STRING:
        return None
    return "the file has no vocabulary"


def _no_template(context: Context) -> str | None:
    has_one = any(key == _TEMPLATE or key.startswith(_TEMPLATE + ".") for key in context.gguf.fields)
    return None if has_one else "the file has no chat template"


def _no_reference(context: Context) -> str | None:
    reason = _no_tensors(context)
    return reason or (None if context.reference else "no reference was given")


def _no_manifest(context: Context) -> str | None:
    return _no_header(context) or (None if context.manifest else "no manifest was given")


def _not_running(context: Context) -> str | None:
    return None if context.running else "the model was not run"


_LACKS: dict[Need, Callable[[Context], str | None]] = {
    Need.HEADER: _no_header,
    Need.TENSORS: _no_tensors,
    Need.MODEL: _no_model,
    Need.CONFIG: _no_config,
    Need.VOCABULARY: _no_vocabulary,
    Need.TEMPLATE: _no_template,
    Need.DATA: _no_tensors,
    Need.REFERENCE: _no_reference,
    Need.MANIFEST: _no_manifest,
    Need.ENGINE: _not_running,
}
