"""How one step runs on many devices: the only importer of accelerate and deepspeed.

The rest of the package sees one process's view: its rank, its device, a model to call, and a
training state by parameter name that looks the same under DDP and under every ZeRO stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config import TrainSettings
from dist_train.errors import BackendError

# AdamW keeps these beside each parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Backend:
    """The process group, the wrapped model and its optimizer.

    Args:
        settings: precision, accumulation and backend.
        clip_norm: largest global gradient norm, or None.

    Raises:
        BackendError: the machine cannot do what is asked, or another backend than the one asked
            for would run.
    """

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        self.zero_stage = {"ddp": 0, "zero1": 1, "zero2": 2}[settings.backend]
        self.clip_norm = clip_norm
        self.precision = settings.precision
        cuda = torch.cuda.is_available()
        if not self.zero_stage and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise BackendError(
                "train.backend asks for DDP, but the launcher for DeepSpeed",
                fix="Choose the backend by train.backend, not by the launch file.",
            )
        if settings.precision == "fp16" and not cuda:
            raise BackendError(
                "fp16 needs a CUDA device", where="train.precision", fix="Use bf16 or fp32."
            )
        if settings.precision == "fp16" and self.zero_stage:
            raise BackendError(
                "fp16 is not offered under ZeRO", where="train.precision", fix="Use bf16 or fp32."
            )
        self.accelerator = _accelerator(settings, self.zero_stage, clip_norm, cuda)
        self.rank = int(self.accelerator.process_index)
        self.world = int(self.accelerator.num_processes)
        self.device: torch.device = self.accelerator.device
        self._check_world()
        self._check_active()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _check_world(self) -> None:
        """Launchers may start processes that do not find each other; each would train alone."""
        promised = int(os.environ.get("WORLD_SIZE", "1"))
        if promised != self.world:
            raise BackendError(
                f"the launcher started {promised} processes, but only {self.world} found each other"
            )

    def _check_active(self) -> None:
        """Accelerate may fall back to another backend in silence."""
        running = str(self.accelerator.distributed_type.value)
        if (running == "DEEPSPEED") != (self.zero_stage > 0):
            raise BackendError(
                f"train.backend asks for {'ZeRO' if self.zero_stage else 'DDP'}, but {running} is "
                "what Accelerate runs",
                fix="Choose the backend by train.backend alone, not by the launcher's settings.",
            )

    def wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the model and the optimizer (both on any device, before the first step)."""
        if self.zero_stage:
            # ZeRO keeps parameters as views of one flat buffer, and broadcasts them as plain bytes.
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.module = model.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.zero_stage and self.model.zero_optimization_stage() != self.zero_stage:
            raise BackendError(
                f"asked for ZeRO {self.zero_stage}, got {self.model.zero_optimization_stage()}"
            )

    def micro_step(self) -> AbstractContextManager[Any]:
        """Context of one micro-batch; gradients are exchanged in the last one of a step only."""
        context: AbstractContextManager[Any] = self.accelerator.accumulate(self.model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Backward of the mean loss of one micro-batch; the division by their number is done."""
        self.accelerator.backward(loss)

    def update(self) -> float:
        """Clip, step and clear the gradients, after the last micro-batch.

        Returns:
            The global gradient norm before clipping.
        """
        if self.zero_stage:
            # DeepSpeed clipped and stepped inside the last backward.
            return float(self.model.get_global_grad_norm() or 0.0)
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def set_lr(self, lr: float) -> None:
        """The learning rate of the coming step, to be set before its first micro-batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    # Training state by parameter name.

    def sync_buffers(self) -> None:
        """Give every rank rank 0's BatchNorm statistics, as DDP does at each forward pass."""
        if self.world > 1:
            for buffer in self.module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def state_names(self) -> list[str]:
        """Names of all tensors of the training state, the same on every rank."""
        model = [f"model/{name}" for name in self.module.state_dict()]
        moments = [f"{moment}/{name}" for name, _ in self._trained() for moment in MOMENTS]
        return [*model, *moments]

    def state(self, mine: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors for which ``mine(name)``, on the host. A collective call under ZeRO."""
        self.sync_buffers()
        kept = {
            f"model/{name}": _host_copy(tensor)
            for name, tensor in self.module.state_dict().items()
            if mine(f"model/{name}")
        }
        for name, moment, tensor in self._moments():
            if mine(f"{moment}/{name}"):
                kept[f"{moment}/{name}"] = _host_copy(tensor)
        return kept

    def load_state(self, state: Mapping[str, Tensor], *, updates: int) -> None:
        """Put a whole training state in place, after ``wrap``.

        Args:
            state: every tensor of ``state_names``, of any world size and backend.
            updates: optimizer steps taken so far, for AdamW's bias correction.
        """
        self.module.load_state_dict(
            {name: state[f"model/{name}"] for name in self.module.state_dict()}
        )
        if self.zero_stage:
            self._load_zero(state, updates)
        else:
            self._load_plain(state, updates)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        if self.zero_stage:
            from deepspeed.utils import safe_get_full_optimizer_state

            self._link_zero_moments()
            for name, parameter in self._trained():
                for moment in MOMENTS:
                    yield name, moment, safe_get_full_optimizer_state(parameter, moment)
            return
        states = self.optimizer.optimizer.state
        for name, parameter in self._trained():
            for moment in MOMENTS:
                held = states.get(parameter, {}).get(moment)
                yield name, moment, torch.zeros_like(parameter) if held is None else held

    def _load_plain(self, state: Mapping[str, Tensor], updates: int) -> None:
        for name, parameter in self._trained():
            self.optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates)),
                # In the parameter's own memory layout.
                **{m: torch.empty_like(parameter).copy_(state[f"{m}/{name}"]) for m in MOMENTS},
            }

    def _load_zero(self, state: Mapping[str, Tensor], updates: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self.model.optimizer
        for partition in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[partition] = {
                "step": torch.tensor(float(updates)),
                **{moment: torch.zeros_like(partition) for moment in MOMENTS},
            }
        self._link_zero_moments()
        for name, parameter in self._trained():
            safe_set_full_fp32_param(parameter, state[f"model/{name}"].to(parameter.device))
            for moment in MOMENTS:
                value = state[f"{moment}/{name}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)

    def _link_zero_moments(self) -> None:
        """Let DeepSpeed find each parameter's moments in its flat partitions.

        It does so itself once, but after the step of the first parameter group, when the moments of
        the others do not exist yet (seen in 0.19.8).
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.model.optimizer
        for parameters, partition in zip(
            zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the run, for calling ``module`` itself (held-out clips)."""
        return autocast(self.precision, self.device)

    # Talk between ranks.

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over the ranks."""
        if self.world == 1:
            return float(value)
        total = value.detach().float().clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.world

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.gather(value)[0]

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()


def _host_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    # Files hold tensors in C order, whatever the layout of the convolutions.
    return copy.contiguous()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast for "bf16" and "fp16", nothing for "fp32"."""
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=kind, enabled=kind is not None)


def _accelerator(
    settings: TrainSettings, zero_stage: int, clip_norm: float | None, cuda: bool
) -> Any:
    launched = "WORLD_SIZE" in os.environ
    if zero_stage:
        _prepare_deepspeed(launched, cuda)
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[settings.precision]
    handlers = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")] if launched else []
    if not zero_stage:
        return Accelerator(
            cpu=not cuda,
            mixed_precision=precision,
            gradient_accumulation_steps=settings.accumulate,
            kwargs_handlers=handlers,
        )
    plugin = DeepSpeedPlugin(hf_ds_config=_deepspeed_config(settings, zero_stage, clip_norm))
    # Autocast is DeepSpeed's own here, and cpu=True would train without DeepSpeed.
    return Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=handlers)


def _prepare_deepspeed(launched: bool, cuda: bool) -> None:
    """What must be so before Accelerate and DeepSpeed are imported."""
    if not launched:
        raise BackendError(
            "ZeRO needs a launcher, also for one process",
            where="train.backend",
            fix="Start with 'accelerate launch' and a file of launch/.",
        )
    # Else Accelerate quietly ignores the plugin.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not cuda:
        # DeepSpeed picks its device when it is first imported.
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        # It would compile a C++ module for shared memory; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _deepspeed_config(
    settings: TrainSettings, zero_stage: int, clip_norm: float | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # the loader decides; DeepSpeed only wants a number
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": {"stage": zero_stage},
        # torch's AdamW, for the same numbers as under DDP.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if settings.precision == "bf16":
        # Not the "bf16" section, which casts the parameters and BatchNorm's statistics too.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config
