"""DeepSpeed's ZeRO (Rajbhandari et al. 2020): moments, gradients and weights are sharded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DeepSpeedPlugin
from torch import Tensor, nn

from dist_train.config import TrainSettings
from dist_train.distributed.backends.base import Backend, MakeOptimizer, updates_done
from dist_train.errors import BackendError

#: Accelerate's DeepSpeed plugin imports transformers.
NEEDED = ("deepspeed", "transformers")


class ZeroBackend(Backend):
    """ZeRO stage 1 (moments are sharded), 2 (gradients too) or 3 (weights too)."""

    runs_as = ("DEEPSPEED",)
    sharding = "ZeRO"

    def __init__(self, settings: TrainSettings, *, clip_norm: float | None) -> None:
        self.stage = int(settings.backend.removeprefix("zero"))
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing:
            raise BackendError(
                f"{settings.backend} needs {' and '.join(missing)}, not installed here",
                where="train.backend",
                fix=f"Run 'pip install {' '.join(missing)}', or choose ddp or fsdp2.",
            )
        super().__init__(settings, clip_norm=clip_norm)

    def _accelerator(self, cuda: bool, handlers: list[Any]) -> Accelerator:
        # Without it Accelerate ignores the plugin.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not cuda:
            # DeepSpeed picks its device when it is first imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed

            # DeepSpeed would compile a C++ module for shared memory; gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(cuda))
        # Autocast is DeepSpeed's own here, and cpu=True would train without DeepSpeed.
        return Accelerator(deepspeed_plugin=plugin, mixed_precision="no", kwargs_handlers=handlers)

    def _deepspeed_config(self, cuda: bool) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        if self.settings.offload:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # unused: the loader makes the batches
            "gradient_accumulation_steps": 1,  # unused: ``accumulating`` marks the last one
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": zero,
            # torch's optimizers, for the same numbers as under DDP.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.settings.precision == "bf16":
            # Not the "bf16" section, which casts the parameters and BatchNorm's statistics too.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                # DeepSpeed would reduce the gradients of these modules (by default linear layers)
                # and gather their weights in bf16: logits would be rounded to 8 bits.
                "lower_precision_safe_modules": [],
            }
        return config

    def _wrap(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # ZeRO keeps parameters as views of one flat buffer, and broadcasts their bytes.
        model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.module = model.to(self.device)
        # Imported late, as DeepSpeed picks its device at its first import.
        from deepspeed import utils

        self._utils: Any = utils
        # Stage 3 leaves parameters without a shape.
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        if self.model.zero_optimization_stage() != self.stage:
            raise BackendError(
                f"asked for ZeRO {self.stage}, got {self.model.zero_optimization_stage()}"
            )

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def update(self) -> float:
        # DeepSpeed clips and steps at once: a norm that is not finite spoils the weights.
        self.model.step()
        return float(self.model.get_global_grad_norm() or 0.0)

    def drop_gradients(self) -> None:
        self.model.optimizer.zero_grad()

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        return super().replicated() if self.stage < 3 else iter(())

    def local_tensors_changed(self) -> None:
        if self.stage < 3:
            return
        self._partition_all()
        persistent = self.model.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def gather_full(self, name: str, shard: Tensor) -> Tensor:
        shape = self._shapes.get(name)
        if self.stage < 3 or shape is None:
            return shard
        return self._joined(shard, shape)

    def _joined(self, shard: Tensor, shape: torch.Size) -> Tensor:
        """Gather the full tensor of which each rank has a ``_slice``."""
        padded = shard.new_empty(shard.numel() * self.world)
        torch.distributed.all_gather_into_tensor(padded, shard.contiguous())
        return padded[: shape.numel()].view(shape)

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        return self._slice(full) if self.stage == 3 and name in self._shapes else full

    def _local(self, parameter: Any) -> Tensor:
        mine: Tensor = parameter.ds_tensor if self.stage == 3 else parameter
        return mine.detach()

    def _partition_all(self) -> None:
        """Drop the gathered copies of weights under stage 3: new shards do not change them."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters: list[Any] = list(self.module.parameters())
        gathered = [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
        if gathered:
            gathered[0].partition(gathered)

    def _slice(self, full: Tensor) -> Tensor:
        """This rank's shard, flat: of the same size on all ranks, padded at the end."""
        size = -(-full.numel() // self.world)
        padded = F.pad(full.reshape(-1), (0, size * self.world - full.numel()))
        return padded.narrow(0, size * self.rank, size)

    def _full_weight(self, parameter: Any) -> Tensor:
        if self.stage < 3:
            return cast(Tensor, parameter)
        if not parameter.requires_grad:
            # The optimizer does not know it.
            return self._joined(parameter.ds_tensor, parameter.ds_shape)
        full: Tensor = self._utils.safe_get_full_fp32_param(parameter)
        return full

    def _full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage < 3:
            self._link_moments()
        for name, tensor in super()._full_tensors():
            shape = self._shapes.get(name.partition("/")[2])
            yield name, tensor if shape is None else tensor.view(shape)

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        full: Tensor = self._utils.safe_get_full_optimizer_state(parameter, moment)
        return full

    def _load(self, state: Mapping[str, Tensor], updates: int) -> None:
        zero = self.model.optimizer
        for partition in self._partitions():
            zero.optimizer.state[partition] = {
                "step": updates_done(zero.optimizer, updates, partition),
                **{moment: torch.zeros_like(partition) for moment in self.moments},
            }
        if self.stage < 3:
            self._link_moments()
        else:
            self._partition_all()
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                frozen = self._local(parameter)
                frozen.copy_(self.local_shard(name, state[f"model/{name}"]).view(frozen.shape))
        for name, parameter in self.trained():
            # Each lookup may be a broadcast.
            weight = state[f"model/{name}"]
            self._set_master(parameter, weight, None)
            for moment in self.moments:
                self._set_master(parameter, state[f"{moment}/{name}"], moment)
            if self.stage < 3:
                # Before the first step nothing else copies the partitions into the parameters.
                parameter.copy_(weight)
        if self.stage == 3:
            # Copy the float32 partitions into the weights that the model computes with.
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            self.local_tensors_changed()

    def _set_master(self, parameter: Any, full: Tensor, moment: str | None) -> None:
        """Copy this rank's shard of a weight, or of its moment, to its float32 partition."""
        if self.stage < 3:
            self._utils.set_full_hp_param(parameter, full, moment)
        else:
            # DeepSpeed's own function for full tensors forgets the padding (seen in 0.19.8).
            self.model.optimizer.set_local_hp_param(self._slice(full), parameter, moment)

    def _partitions(self) -> list[Tensor]:
        """The flat float32 tensors that this rank's optimizer steps."""
        name = (
            "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        )
        return list(getattr(self.model.optimizer, name))

    def _link_moments(self) -> None:
        """Let DeepSpeed find each parameter's moments in its flat partitions.

        DeepSpeed does so once, after the step of the first parameter group, when the moments of the
        other groups do not exist yet (seen in 0.19.8).
        """
        zero, link = self.model.optimizer, self._utils.lazy_init_hp_params_optimizer_state
        for parameters, partition in zip(zero.bit16_groups, self._partitions(), strict=True):
            link(parameters, partition, zero.optimizer.state)
