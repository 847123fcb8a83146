"""EngramCallback: what makes transformers' Trainer train the rows along with the weights.

The Trainer knows parameters. So while it trains, the rows are one of the model's: `RowGradients`, a stand-in of no
elements whose `.grad` is the rows' gradient. The Trainer puts it into its optimizer, counts it when it clips,
unscales it where losses are scaled, forgets it after the step, and lets its schedule set the rate. Just before the
optimizer's own step, a hook takes the gradient away and lets a row optimizer store the rows. A step that a gradient
scaler skips skips the hook, or tells it to.

    backward ──▶ rows' gradients ──Trainer: unscale, clip──▶ optimizer.step ──hook──▶ rows on disk
                                                                            └───────▶ weights

A checkpoint commits the table and keeps what is needed to come back to it (`checkpoint.py`).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sense_v2.core.config import DURABILITIES, ROW_OPTIMIZERS
from sense_v2.core.errors import with_way_out
from sense_v2.engram.optim import RowAdam, RowGradients, RowWiseAdagrad
from sense_v2.engram.reading.safetensors_headers import find_tensors
from sense_v2.hf.adapters import MemoryOfReference, follow_wrapper
from sense_v2.hf.load import load_fusion
from sense_v2.hf.memory import EngramMemory, living_memories, memory_of
from sense_v2.hf.saving.folder import MEMORY_FOLDER, TABLE_FILE
from sense_v2.hf.training.checkpoint import TABLES, restore_rows, sync_checkpoint, write_checkpoint

STAND_IN = "rows"
STAND_IN_NAME = f"engram.{STAND_IN}.gradients"
_WAY_OUT = "pass ref_model=sense_v2.hf.from_pretrained(FOLDER) of the model as it was saved before training"


class RowStandIn(nn.Module):
    """Holds the rows' stand-in among a model's parameters, and keeps it out of what is saved."""

    def __init__(self, gradients: RowGradients) -> None:
        super().__init__()
        self.gradients = gradients
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_not_missing)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}gradients")


def _not_missing(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name != STAND_IN_NAME]


class EngramCallback(TrainerCallback):
    """Trains the rows of a model with memory attached, in a plain `Trainer`, an `SFTTrainer` or an `EngramTrainer`.

    `row_rate` is how many times the Trainer's learning rate the rows get, at each moment of its schedule; they have
    no weight decay. `row_optimizer`: "adagrad" (one float of state a row) or "adam" (two a value).

    `checkpoints` says what a checkpoint does with the table. "copy": each holds a copy (a reflink, which takes
    neither time nor room, where the file system has them), and each can be resumed and loaded as the best model.
    "reference": a checkpoint names the commit, and only the last one can be resumed. "stay": the same, for a run that
    has its table to itself and keeps two checkpoints (`save_total_limit=2`): whatever ends it, even while it saves,
    one of the two can be resumed.

    With "copy" the table is committed every `commit_steps` steps (0: only with checkpoints), so that the journal of
    old rows stays small. `durability` is the storage's.

    `train_backbone=False` freezes every weight outside of the memory. Otherwise what asks for a gradient is trained,
    and beside a PEFT adapter, which froze them, the fusion layers.

    The log gets the mean gate of each memory layer, the rows a step touched and their rate. An EngramTrainer's
    reporters get them, too. A plain Trainer's (`report_to`) come before its callbacks and don't: give it
    `report_to="none"` and `callbacks=[EngramCallback(), TensorBoardCallback()]`.

    A plain Trainer resumes from `output_dir/checkpoint-STEP`; where `resume_from_checkpoint` is another folder,
    give it here too. (An EngramTrainer knows.)

    >>> from transformers import Trainer
    >>> Trainer(model, arguments, train_dataset=blocks, callbacks=[EngramCallback()]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        row_rate: float = 20.0,
        row_optimizer: str = "adagrad",
        checkpoints: str = "copy",
        commit_steps: int = 100,
        durability: str = "process",
        train_backbone: bool = True,
        resume_from_checkpoint: str | Path | None = None,
    ) -> None:
        for name, value, allowed in (
            ("row_optimizer", row_optimizer, ROW_OPTIMIZERS),
            ("checkpoints", checkpoints, TABLES),
            ("durability", durability, DURABILITIES),
        ):
            if value not in allowed:
                raise ValueError(f"EngramCallback: {name} = {value!r}: must be one of {', '.join(allowed)}")
        if not (row_rate >= 0 and math.isfinite(row_rate)):
            raise ValueError(f"EngramCallback: row_rate = {row_rate}: must be 0 or more")
        if commit_steps < 0:
            raise ValueError(f"EngramCallback: commit_steps = {commit_steps}: must be 0 or more")
        self.row_rate, self.row_optimizer, self.checkpoints = row_rate, row_optimizer, checkpoints
        self.commit_steps, self.durability, self.train_backbone = commit_steps, durability, train_backbone
        self.resume_from_checkpoint = resume_from_checkpoint
        self.averages_ranks = False
        """Whether somebody averages the rows' gradients over the processes before each step: EngramTrainer does."""
        self._memory: EngramMemory | None = None
        self._stand_in: RowGradients | None = None
        self._rows: RowWiseAdagrad | RowAdam | None = None
        self._group: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._reference: _WatchedReference | None = None
        self._num_ranks = 1
        self._step, self._rate = 0, 0.0
        self._gates: dict[int, list[torch.Tensor]] = {}
        self._touched: list[int] = []

    @property
    def memory(self) -> EngramMemory:
        if self._memory is None:
            raise RuntimeError("EngramCallback: no Trainer has been made with it yet")
        return self._memory

    @property
    def stand_in(self) -> RowGradients | None:
        """The parameter that the rows are to the Trainer; None where they are frozen."""
        return self._stand_in

    @property
    def writes(self) -> bool:
        """Whether this process stores the rows."""
        return self.memory.storage.mode == "r+"

    # Events of the Trainer, in their order.

    def on_init_end(self, args: TrainingArguments, *_: Any, model: Any = None, **more: Any) -> None:
        self._memory = memory_of(model)
        self._num_ranks = args.world_size
        storage = self._memory.storage
        if storage.rows_require_grad and not self.writes:
            raise with_way_out(
                ValueError(f"{storage.path} is open read-only"),
                "attach with mode='r+' to train its rows, or freeze them (storage.requires_grad_(False))",
            )
        if self.checkpoints != "copy" and storage.is_in_shards:
            raise with_way_out(
                ValueError(
                    f"EngramCallback(checkpoints={self.checkpoints!r}) is for one file, and this table lies in shards"
                ),
                "use checkpoints='copy'",
            )
        if self.checkpoints != "copy" and args.load_best_model_at_end:
            raise with_way_out(
                ValueError(
                    "load_best_model_at_end goes back to earlier rows, which "
                    f"EngramCallback(checkpoints={self.checkpoints!r}) doesn't keep"
                ),
                "use checkpoints='copy'",
            )
        if hasattr(model, "get_base_model") and "save_pretrained" not in vars(model):  # attached to what is inside
            follow_wrapper(model, self._memory)
        if _has_reference(args) and hasattr(model, "get_base_model"):
            self._memory.reference = MemoryOfReference(model, self._memory)
        _choose_weights(model, self._memory, self.train_backbone)
        if not storage.rows_require_grad:
            return
        self._stand_in = RowGradients(storage)
        self._memory.add_module(STAND_IN, RowStandIn(self._stand_in))
        _keep_from_ddp(model, self._stand_in)
        if more.get("optimizer") is not None:
            if more.get("lr_scheduler") is not None:
                raise with_way_out(
                    ValueError(
                        "EngramCallback: the optimizer that was given doesn't hold the rows, and its schedule is "
                        "made already"
                    ),
                    "pass optimizers=(optimizer, None), or let the Trainer make both",
                )
            more["optimizer"].add_param_group({"params": [self._stand_in], "weight_decay": 0.0})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *_: Any,
        model: Any = None,
        optimizer: Any = None,
        **more: Any,
    ) -> None:
        if memory_of(model) is not self.memory:
            raise ValueError(
                "the Trainer has another model than at its beginning (model_init?): a table has one writer, so give "
                "the Trainer the model itself"
            )
        is_shared = self.memory.storage.needs_all_ranks
        if (is_shared or self._num_ranks > 1) and not self.averages_ranks:
            raise with_way_out(
                ValueError(
                    "several processes train, and a plain Trainer doesn't bring their rows' gradients together"
                ),
                "use EngramTrainer, or put EngramTraining before your Trainer's class",
            )
        if self._num_ranks > 1 and not is_shared:
            raise with_way_out(
                ValueError(f"{self._num_ranks} processes train, and this one has attached the table for itself"),
                "use sense_v2.hf.training.ranks.attach_on_every_rank",
            )
        self._step = state.global_step
        self._stop_listening()
        if _has_reference(args):
            self._reference = _WatchedReference(args, state, self.memory)
            self._handles += self._reference.handles
        if self.writes:
            self.memory.storage.durability = self.durability
        if self._stand_in is not None:
            while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
                optimizer = optimizer.optimizer
            self._group = _group_of(self._stand_in, optimizer)
            kind: Any = RowAdam if self.row_optimizer == "adam" else RowWiseAdagrad
            self._rows = self.memory.storage.row_optimizer(kind)
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        if state.global_step > 0:
            self._resume(args, state, model)
        self._handles += [layer.gate.register_forward_hook(self._gate_hook(layer.layer_id)) for layer in self.memory]

    def on_step_begin(self, *_: Any, **more: Any) -> None:
        self.memory.checkpoint = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **more: Any) -> None:
        self._step = state.global_step
        if self._reference is not None:
            self._reference.settle()
            self._reference = None
        self.memory.checkpoint = _checkpoint_folder(args, state.global_step)
        due = self.commit_steps and state.global_step % self.commit_steps == 0
        # By reference a checkpoint holds while no commit follows it.
        if due and self.writes and self.checkpoints == "copy":
            self._commit(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any = None, **more: Any) -> None:
        folder, states = _checkpoint_folder(args, state.global_step), not args.save_only_model
        if self.checkpoints == "stay" and args.should_save:
            write_checkpoint(model, folder, table="stay", states=states)
            sync_checkpoint(folder)
        if self.writes:
            self._commit(state)
        if self.checkpoints == "stay":
            return
        table, storage = self.checkpoints, self.memory.storage
        if storage.is_in_shards:
            # No rank has all rows: each copies its own.
            storage.copy_to(folder / MEMORY_FOLDER / TABLE_FILE, states=states)
            table = "stay"
        if args.should_save:
            write_checkpoint(model, folder, table=table, states=states)

    def on_log(
        self, args: Any, state: TrainerState, *_: Any, logs: dict[str, float] | None = None, **more: Any
    ) -> None:
        # EngramTrainer has added them already.
        if logs is not None and "loss" in logs and not any(name.startswith("engram/") for name in logs):
            metrics = self.take_metrics()
            logs.update(metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **more: Any) -> None:
        self._stop_listening()
        self.memory.checkpoint = self.memory.reference = None
        self.memory.storage.clear_gradients()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            restore_rows(self.memory, best)
            load_fusion(self.memory, best / MEMORY_FOLDER)
        storage = self.memory.storage
        # One more commit would be another one than the last reference names.
        if self.writes and (self.checkpoints != "reference" or storage.updates != storage.manifest.updates):
            storage.flush(step=state.global_step)
        if self._num_ranks > 1:
            torch.distributed.barrier()

    # What they do.

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The hook before the weights' step: the rows' step, after which there is no gradient left to be seen."""
        storage = self.memory.storage
        # Of a table over several ranks: the norm of all ranks' rows, so that all scale, and find infinities, alike.
        gradients = storage.gradients()
        # An optimizer that unscales by itself (fused AdamW) gets these from a gradient scaler, for the step.
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if gradients is not None and not (found_inf is not None and found_inf.item()):
            _, grads_UD = gradients
            if scale is not None:
                grads_UD.div_(scale.to(grads_UD.device))
            if not torch.isfinite(grads_UD).all():
                raise with_way_out(
                    FloatingPointError(
                        f"the rows' gradient isn't finite at step {self._step + 1}; the rows are those of step "
                        f"{self._step}"
                    ),
                    "Lower learning_rate or EngramCallback(row_rate=)",
                )
            self._touched.append(storage.num_rows_met)
            self._rate = float(self._group["lr"] * self.row_rate)
            assert self._rows is not None
            self._rows.param_groups[0]["lr"] = self._rate
            if storage.needs_all_ranks:
                # What was clipped is a stand-in for all ranks' rows.
                norm = storage.gradient_norm()
                storage.scale_gradients(float(grads_UD) / norm if norm else 1.0)
            storage.step_rows(self._rows)
        storage.clear_gradients()

    def _commit(self, state: TrainerState) -> None:
        self.memory.storage.commit(step=state.global_step, extra={"epoch": state.epoch})

    def _resume(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        given = self.resume_from_checkpoint
        checkpoint = Path(given) if given is not None else _checkpoint_folder(args, state.global_step)
        if not checkpoint.is_dir():
            raise with_way_out(
                FileNotFoundError(
                    f"{checkpoint} isn't there: training resumes at step {state.global_step}, and the memory of "
                    "that step is looked for there"
                ),
                "Give the folder: EngramCallback(resume_from_checkpoint=FOLDER)",
            )
        _refuse_fresh_weights(checkpoint, model)
        restore_rows(self.memory, checkpoint)
        loaded = {name: value.clone() for name, value in self.memory.layers.state_dict().items()}
        load_fusion(self.memory, checkpoint / MEMORY_FOLDER)
        # The Trainer loads all weights, or an adapter's alone.
        differs = [
            name for name, value in self.memory.layers.state_dict().items() if not torch.equal(value, loaded[name])
        ]
        if differs and not hasattr(model, "peft_config"):
            raise with_way_out(
                ValueError(
                    f"the Trainer resumed from another folder than {checkpoint}, whose memory has another "
                    f"{differs[0]}"
                ),
                "Give that folder: EngramCallback(resume_from_checkpoint=FOLDER)",
            )

    def take_metrics(self) -> dict[str, float]:
        """What the steps since the last call did: the mean gate of each memory layer, the rows a step touched (the
        mean), the rows' rate. {} where there was no step."""
        metrics = {}
        for layer_id, alphas in self._gates.items():
            metrics[f"engram/gate_layer_{layer_id}"] = float(torch.stack(alphas).mean())
        if self._touched:
            metrics["engram/rows_touched"] = sum(self._touched) / len(self._touched)
            metrics["engram/row_learning_rate"] = self._rate
        self._gates, self._touched = {}, []
        return metrics

    def _gate_hook(self, layer_id: int) -> Any:
        def hook(gate: nn.Module, inputs: Any, alpha_BTS: torch.Tensor) -> None:
            if gate.training and not torch.compiler.is_compiling():
                self._gates.setdefault(layer_id, []).append(alpha_BTS.detach().float().mean())

        return hook

    def let_go(self) -> None:
        """Take the stand-in and all hooks off the model, which can then be trained in another way."""
        self._stop_listening()
        if self._memory is not None:
            self._memory.checkpoint = self._memory.reference = None
            self._memory.storage.clear_gradients()
        if self._stand_in is not None:
            delattr(self.memory, STAND_IN)
            self._stand_in = None

    def _stop_listening(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._rows = self._reference = None


def _refuse_fresh_weights(checkpoint: Path, model: nn.Module) -> None:
    """Raises `ValueError` if the Trainer, which loads weights by name, can't have found one that it trains."""
    if hasattr(model, "peft_config") or not list(checkpoint.glob("model*.safetensors")):
        return
    saved = find_tensors(checkpoint, lambda name: True).tensors
    weights = model.state_dict(keep_vars=True)
    found = {value.data_ptr() for name, value in weights.items() if name in saved}
    fresh = [
        name
        for name, value in model.named_parameters()
        if value.requires_grad and value.numel() and value.data_ptr() not in found
    ]
    if fresh:
        raise with_way_out(
            ValueError(
                f"{checkpoint} has no {fresh[0]}: its weights were saved under names that transformers converts, "
                "and a Trainer doesn't, so it goes on with fresh ones"
            ),
            f"Begin a new run with the model that sense_v2.hf.from_pretrained({str(checkpoint)!r}, mode='r+') opens",
        )


def _has_reference(args: TrainingArguments) -> bool:
    """True for TRL's trainers that compare a model with a reference: DPO, GRPO, KTO, RLOO, …"""
    is_trl = any(kind.__module__.partition(".")[0] == "trl" for kind in type(args).__mro__)
    return is_trl and bool(getattr(args, "beta", 0))


class _WatchedReference:
    """Sees in a Trainer's first step whether its reference has a memory: the one that is looked up in, whatever other
    memories the process has. Trainers of TRL tell a callback nothing of their reference."""

    def __init__(self, args: TrainingArguments, state: TrainerState, memory: EngramMemory) -> None:
        is_early = getattr(args, "precompute_ref_log_probs", False)  # it was asked before the callback
        self._is_seen = is_early or memory.reference is not None
        self._lost = with_way_out(
            ValueError(
                f"the run goes on at step {state.global_step}, and the rows of a reference on {memory.storage.path} "
                "are those of that step, not those before it"
            ),
            _WAY_OUT,
        )
        if memory.reference is not None and state.global_step > 0:
            memory.reference.error = self._lost
        others = [other for other in living_memories() if other is not memory]
        path = memory.table.path
        self._same = [o for o in others if state.global_step > 0 and any(s.table.path == path for s in o.storages)]
        if is_early and self._same:
            raise self._lost
        self.handles = [layer.register_forward_pre_hook(self._hook(other)) for other in others for layer in other]

    def _hook(self, other: EngramMemory) -> Any:
        is_lost = any(other is one for one in self._same)

        def hook(layer: nn.Module, inputs: Any) -> None:
            if is_lost:
                raise self._lost
            self._is_seen = True

        return hook

    def settle(self) -> None:
        """Warn of a reference without memory, and look no longer."""
        for handle in self.handles:
            handle.remove()
        if not self._is_seen:
            warnings.warn(
                "the reference of this Trainer has no memory, as it was made from the name of the model alone, so it "
                f"is another model than the one that is trained: pass ref_model=copy.deepcopy(model), or {_WAY_OUT}",
                UserWarning,
                stacklevel=2,
            )


def _choose_weights(model: Any, memory: EngramMemory, train_backbone: bool) -> None:
    own = set(memory.parameters())
    if not train_backbone:
        for parameter in model.parameters():
            if parameter not in own:
                parameter.requires_grad_(False)
    if hasattr(model, "peft_config"):
        memory.refuse_adapters()
        memory.requires_grad_(True)


def _keep_from_ddp(model: Any, stand_in: RowGradients) -> None:
    """DDP would wait for a gradient of the stand-in, which never comes.

    It could go once DDP takes the names to ignore as an argument (pytorch's TODO at this very method).
    """
    name = next(name for name, parameter in model.named_parameters() if parameter is stand_in)
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), name}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


def _group_of(stand_in: RowGradients, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(parameter is stand_in for parameter in group["params"]):
            return group
    raise with_way_out(
        ValueError(
            f"{type(optimizer).__name__} doesn't hold the rows' stand-in: it was made before the Trainer had an "
            "EngramCallback"
        ),
        "Give the callback to the Trainer: Trainer(..., callbacks=[EngramCallback()])",
    )


def _checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    assert args.output_dir is not None  # TrainingArguments fills it in
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
