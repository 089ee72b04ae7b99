"""Weights of another network on their way into a model, with an account of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dist_train.errors import ModelError

#: Taken as they are; taken in another form; not taken; not given, so as the model drew them.
How = Literal["taken", "adapted", "left out", "random"]
RGB = ("red", "green", "blue")
#: Tensors of batch normalisation; files of old versions of torch lack the last one.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Row(NamedTuple):
    """What became of a tensor: of the model, or, if it is left out, of the file."""

    how: How
    name: str
    numel: int
    reason: str = ""


class Normalised(NamedTuple):
    """The input of a network: (x - mean) / std of each channel, of pixels x from 0 to 1."""

    mean: Sequence[float]
    std: Sequence[float]


class Given(NamedTuple):
    """Weights from a file.

    Attributes:
        tensors: by name, without a prefix such as "module.".
        is_parallel: whether the names had the prefix "module.", of torch's DataParallel.
    """

    tensors: dict[str, Tensor]
    is_parallel: bool = False


class Transfer:
    """Collects a model's weights from ``given``; nothing is written into the model.

    Attributes:
        given: the weights by the names that the methods take.
        channels: names of the channels of the model's clips.
        state: weights and statistics by the model's names, so far.
        rows: what became of the tensors.
        notes: how the networks differ, in sentences without a full stop.
    """

    def __init__(
        self, given: Mapping[str, Tensor], model: nn.Module, channels: Sequence[str]
    ) -> None:
        self.given, self.model, self.channels = dict(given), model, tuple(channels)
        self.own = model.state_dict()
        self.state: dict[str, Tensor] = {}
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._told: dict[str, str] = {}
        self._done: set[str] = set()

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Give the weights other names; messages show those of the file."""
        self._told = {new_name(name): name for name in self.given}
        self.given = {new_name(name): tensor for name, tensor in self.given.items()}

    def take(
        self, source: str, name: str, reason: str = "", *, value: Tensor | None = None
    ) -> None:
        """Use the tensor ``source``, or ``value`` that is made of it, as the model's ``name``.

        Args:
            reason: why the value is not that of the file; empty if it is.

        Raises:
            ModelError: it has another shape, or one of the two does not exist.
        """
        tensor = self.tensor(source) if value is None else value
        if name not in self.own:
            raise self._refused(f"the model has no tensor {name}, for {self._shown(source)}")
        wanted = self.own[name]
        if tensor.shape != wanted.shape:
            raise self._refused(
                f"{self._shown(source)} is {list(tensor.shape)}, and the model's {name} "
                f"{list(wanted.shape)}"
            )
        if tensor.dtype != wanted.dtype:
            if tensor.is_floating_point() and value is None:
                reason = reason or f"converted from {str(tensor.dtype).removeprefix('torch.')}"
            tensor = tensor.to(wanted.dtype)
        self.state[name] = tensor
        self._done.add(source)
        self.rows.append(Row("adapted" if reason else "taken", name, wanted.numel(), reason))

    def take_norm(
        self, source: str, name: str, *, shift: Tensor | None = None, why: str = ""
    ) -> None:
        """Use a batch normalisation. ``shift`` [C] is what its input has more in the network that
        the weights are of, which is taken from its mean."""
        for tensor in NORM:
            if tensor == NORM[-1] and f"{source}.{tensor}" not in self.given:
                continue
            if tensor == "running_mean" and shift is not None:
                mean = self.tensor(f"{source}.{tensor}").double() - shift.double()
                self.take(f"{source}.{tensor}", f"{name}.{tensor}", why, value=mean)
            else:
                self.take(f"{source}.{tensor}", f"{name}.{tensor}")

    def make(self, name: str, value: Tensor, reason: str) -> None:
        """Give the model's ``name`` a value that no tensor of the file has."""
        self.state[name] = value.to(self.own[name].dtype)
        self.rows.append(Row("adapted", name, value.numel(), reason))

    def leave(self, sources: Iterable[str], reason: str) -> None:
        """Leave tensors of the file out."""
        for source in sources:
            self._done.add(source)
            shown, numel = self._shown(source), self.given[source].numel()
            self.rows.append(Row("left out", shown, numel, reason))

    def take_head(self, source: str, name: str = "head") -> None:
        """Use a linear layer as the head if it has as many outputs, else leave it out."""
        sources = [f"{source}.weight", f"{source}.bias"]
        found = [each for each in sources if each in self.given]
        there = len(self.given[found[0]]) if found else 0
        here = len(self.own[f"{name}.weight"])
        if len(found) == len(sources) and there == here:
            for each, tensor in zip(sources, ("weight", "bias"), strict=True):
                self.take(each, f"{name}.{tensor}")
        else:
            self.leave(found, f"it has {there} outputs, and the model {here}")

    def finish(self, *, random: Sequence[str] = ("head.",)) -> None:
        """Check that every tensor is accounted for.

        Args:
            random: prefixes of the model's tensors that may stay as they are drawn.

        Raises:
            ModelError: one of the file is not used, or one of the model not given.
        """
        unused = [self._shown(name) for name in self.given if name not in self._done]
        if unused:
            raise self._refused(f"no tensor of the model takes {_few(unused)}")
        missing = [name for name in self.own if name not in self.state]
        absent = [
            name for name in missing
            if not name.startswith(tuple(random)) and not name.endswith(NORM[-1])
        ]  # fmt: skip
        if absent:
            raise self._refused(f"nothing is given for the model's {_few(absent)}")
        for name in missing:
            self.state[name] = self.own[name]
            if not name.endswith(NORM[-1]):
                self.rows.append(Row("random", name, self.own[name].numel(), "drawn from the seed"))

    def tensor(self, source: str) -> Tensor:
        """A tensor of the file. ModelError if there is none."""
        if source not in self.given:
            raise self._refused(f"there is no tensor {self._shown(source)}")
        return self.given[source]

    def fitted(self, kernel: Tensor, name: str) -> tuple[Tensor, list[str]]:
        """A kernel in the size of the model's ``name``, and what was done to it.

        A kernel of 2D is repeated over depth and divided by the number of its frames, as in I3D
        (Carreira & Zisserman 2017). A smaller one is put into the middle, among zeros: with as much
        more padding that computes the same.
        """
        size, done = self.own[name].shape[2:], []
        if kernel.ndim == 4 and len(size) == 3:
            depth = size[0]
            kernel = kernel.unsqueeze(2).expand(-1, -1, depth, -1, -1) / depth
            done.append("inflated from 2D" if depth > 1 else "one frame deep")
        if kernel.ndim == 5 and kernel.shape[2:] != size:
            lacks = [here - there for here, there in zip(size, kernel.shape[2:], strict=True)]
            if all(n >= 0 and n % 2 == 0 for n in lacks):
                pads = [n // 2 for n in reversed(lacks) for _ in range(2)]
                done.append(f"{'x'.join(map(str, kernel.shape[2:]))} among zeros")
                kernel = nn.functional.pad(kernel, pads)
        return kernel, done

    def for_channels(
        self, kernel: Tensor, there: Sequence[str] | None = None
    ) -> tuple[Tensor, list[str]]:
        """A first kernel [O, C, ...] for the model's channels, and what was done to it.

        Args:
            there: names of the channels that the kernel is for; None if they are not known, and
                three are red, green and blue.
        """
        given, here = kernel.shape[1], self.channels
        there = RGB if there is None and given == len(RGB) else there
        if there is not None and set(there) == set(here) and len(there) == len(here):
            order = [list(there).index(name) for name in here]
            return kernel[:, order], [] if tuple(there) == here else ["channels in our order"]
        if given == len(here):
            same = f"its {given} channels are now {', '.join(here)}"
            return kernel, [same] if there is not None else []
        # One channel sees the sum, which is what equal channels give; several share it.
        kernel = kernel.sum(1, keepdim=True).expand(-1, len(here), *kernel.shape[2:]) / len(here)
        done = [f"sum over {given} channels"] if given > 1 else []
        return kernel, [*done, f"shared by {len(here)} channels"] if len(here) > 1 else done

    def normalised(self, kernel: Tensor, how: Normalised) -> tuple[Tensor, Tensor]:
        """A first kernel for pixels of 0 to 1 instead of normalised ones, and one for a channel of
        ones, [O, 1, ...], which takes the mean off; both in float64."""
        if kernel.shape[1] != len(how.mean):
            raise self._refused(
                f"the first kernel is for {kernel.shape[1]} channels and not {len(how.mean)}"
            )
        shape = [1, -1] + [1] * (kernel.ndim - 2)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(shape) for v in how)
        kernel = kernel.double() / std
        return kernel, -(kernel * mean).sum(1, keepdim=True)

    def _shown(self, source: str) -> str:
        return self._told.get(source, source)

    def _refused(self, what: str, fix: str = "Use the weights of this model.") -> ModelError:
        return ModelError(what, fix=fix)


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
