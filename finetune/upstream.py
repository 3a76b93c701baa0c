"""Every private or undocumented name of other packages that this one uses, checked before its first use.

A release may rename or change such a name without notice. `private` returns one after comparing it with what this
package relies on; `require` checks methods that are overridden. Both raise UpstreamError with the versions at hand.
Nothing is imported before it is asked for: recipes are checked without torch, and `finetune.moe` runs without TRL.
"""

import inspect
import re
from collections.abc import Callable
from ctypes import c_longlong, c_void_p
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

from finetune.errors import FinetuneError, Problem

TESTED = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "tqdm": "4.70.1",
    "trackio": "0.43.0",
    "transformers": "5.24.0",
    "trl": "1.16.0",
    "wandb": "0.31.0",
}
"""The versions of constraints.txt, with which the suite passes."""

_SDPA = "torch:ops.aten._scaled_dot_product_"
_QUANTIZER = "transformers.quantizers.quantizer_bnb_4bit:Bnb4BitHfQuantizer"
_LOADER = "transformers.core_model_loading"

NAMES: dict[str, tuple[str, ...]] = {
    # What a config file and the defaults make of the launcher's arguments.
    "accelerate.commands.launch:_validate_launch_command": ("args",),
    # Stay out of DDP's broadcast: frozen weights, which each rank reads itself.
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "module",
        "params_and_buffers_to_ignore",
    ),
    # Heartbeats through the process group's own store, and every group's timeout, which differs before and in training.
    "torch.distributed.distributed_c10d:_get_default_store": (),
    "torch.distributed.distributed_c10d:_world": (),
    "torch.distributed.distributed_c10d:_set_pg_timeout": ("timeout", "group"),
    # Progress bars that are on the screen when an error is printed.
    "tqdm:tqdm._instances": (),
    # Tensors inside nested arguments.
    "torch.utils._pytree:tree_map_only": ("type_or_types_or_pred", "func", "tree"),
    "torch.utils._pytree:tree_leaves": ("tree",),
    # Operations below autograd: checkpointing and the routing of a merge.
    "torch.utils._python_dispatch:TorchDispatchMode": (),
    # The 4-bit stack, a tensor subclass.
    "torch:Tensor._make_wrapper_subclass": (),
    "torch:_C._disabled_torch_function_impl": (),
    "torch:ops.aten._to_copy.default": ("self", "dtype", "device"),
    # Leave a dispatch key out while a kept product is replayed.
    "torch:_C._SetExcludeDispatchKeyGuard": (),
    "torch:_C.DispatchKey": (),
    # Kept by checkpointing instead of being computed again.
    "torch:ops.aten._unsafe_view.default": ("self", "size"),
    f"{_SDPA}flash_attention.default": (),
    f"{_SDPA}efficient_attention.default": (),
    f"{_SDPA}cudnn_attention.default": (),
    f"{_SDPA}flash_attention_for_cpu.default": (),
    # Convolutions, of which no weight counts as an expert.
    "torch.nn.modules.conv:_ConvNd": (),
    # NF4: the block maxima, the values, and the written-in-place form on CUDA.
    "torch:ops.bitsandbytes.quantize_4bit.default": ("A", "blocksize", "quant_type", "quant_storage"),
    "torch:ops.bitsandbytes.dequantize_blockwise.default": ("A", "absmax", "code", "blocksize", "dtype"),
    "torch:ops.bitsandbytes.dequantize_4bit.default": ("A", "absmax", "blocksize", "quant_type", "shape", "dtype"),
    "torch:ops.bitsandbytes.dequantize_4bit.out": ("A", "absmax", "blocksize", "quant_type", "shape", "dtype", "out"),
    "torch:ops.bitsandbytes.gemm_4bit.default": (),
    # The rules by which a checkpoint's tensors become stacks, run expert by expert.
    f"{_LOADER}:ConversionOps": (),
    f"{_LOADER}:ConversionOps.convert": ("self", "input_dict", "source_patterns", "target_patterns"),
    f"{_LOADER}:MergeModulelist": ("dim",),
    f"{_LOADER}:WeightRenaming": ("source_patterns", "target_patterns"),
    f"{_LOADER}:WeightConverter": ("source_patterns", "target_patterns", "operations"),
    f"{_LOADER}:WeightConverter.materialize_tensors": ("self",),
    f"{_LOADER}:WeightConverter._original_source_patterns": (),
    f"{_LOADER}:WeightConverter._original_target_patterns": (),
    f"{_LOADER}:WeightConverter.collected_tensors": (),
    f"{_LOADER}:WeightConverter.scope_prefix": (),
    f"{_LOADER}:WeightConverter.base_model_prefix": (),
    f"{_LOADER}:rename_source_key": (
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ),
    "transformers.conversion_mapping:get_model_conversion_mapping": ("model",),
    # Overridden by the quantiser that also covers stacks.
    f"{_QUANTIZER}.get_modules_to_not_convert": ("model",),
    f"{_QUANTIZER}.param_needs_quantization": ("model", "param_name"),
    f"{_QUANTIZER}.get_quantize_ops": ("self",),
    f"{_QUANTIZER}.update_weight_conversions": ("weight_conversions", "model"),
    f"{_QUANTIZER}._process_model_after_weight_loading": ("model", "kwargs"),
    # Which gate an experts module has.
    "transformers.integrations.moe:_default_apply_gate": ("self", "gate_up_out"),
    # The sandbox in which transformers runs chat templates.
    "transformers.utils.chat_template_utils:_compile_jinja_template": ("chat_template",),
    # Pre-tokenizers that transformers can rebuild from a GGUF file.
    "transformers.integrations.gguf.gguf_tokenizer_mapping:GGUF_PRE_TOKENIZER_SPLITS": (),
    # Overridden or called by the trainers.
    "transformers.trainer:Trainer._clip_grad_norm": ("model",),
    "transformers.trainer:Trainer._defer_fsdp_gradient_reduction": (),
    "transformers.trainer:Trainer._save_checkpoint": ("model", "trial"),
    "transformers.trainer:Trainer._load_optimizer_and_scheduler": ("checkpoint",),
    "transformers.trainer:Trainer._load_scaler": ("checkpoint",),
    "transformers.trainer:Trainer._load_rng_state": ("checkpoint",),
    "transformers.trainer:Trainer._init_training_state": (
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ),
    "transformers.trainer:Trainer._determine_best_metric": ("metrics", "trial"),
    "transformers.trainer:Trainer._maybe_log_save_evaluate": (),
    "transformers.trainer:Trainer._evaluate": ("trial", "ignore_keys_for_eval"),
    "transformers.trainer:Trainer._prepare_inputs": ("self", "inputs"),
    "transformers.trainer:Trainer._load_from_checkpoint": ("self", "resume_from_checkpoint"),
    "transformers.trainer:Trainer.get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "transformers.trainer:Trainer.get_decay_parameter_names": ("model",),
    "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    # Switch the adapter off without changing which parameters train.
    "peft.tuners.tuners_utils:BaseTunerLayer._disable_adapters": (),
    "peft.tuners.tuners_utils:check_target_module_exists": ("config", "key"),
    "peft.utils.other:get_pattern_key": ("pattern_keys", "key_to_match"),
    # LoRA on the linear layers among `target_parameters`.
    "peft.tuners.lora.model:LoraModel._create_and_replace": (
        "lora_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
    ),
    "peft.tuners.lora.layer:ParamWrapper._check_forward_args": ("x", "args", "kwargs"),
    # The local cache of datasets, read without waiting for the network.
    "datasets.packaged_modules.cache.cache:Cache": ("dataset_name", "config_name", "version", "hash", "repo_id"),
    # Whether W&B has an account on this machine, without asking its server.
    "wandb.sdk.lib.wbauth:authenticate_session": ("host", "source", "prompt", "update_session"),
    "trackio.utils:TRACKIO_DIR": (),
}
"""`module:name`, and the parameters relied on, in their order; no other may be required. None: only the name counts."""

READ_BY = {
    # Set to False on a linear layer; a release that no longer reads it would lose the gradient on AVX512-BF16 CPUs.
    "bitsandbytes.nn:Linear4bit.forward": "support_avx512bf16_for_cpu",
    "peft.tuners.tuners_utils:BaseTunerLayer.disable_adapters": "_disable_adapters",
    # An evaluation before the training would leave the model without DDP.
    "accelerate.accelerator:Accelerator.prepare_model": "_is_accelerate_prepared",
    # The loss since the last line, and the step of that line: a skipped step is taken out of both.
    "transformers.trainer:Trainer._run_epoch": "_tr_loss",
    "transformers.trainer:Trainer._maybe_log_save_evaluate": "_globalstep_last_logged",
}
"""`module:function` and an attribute that it must read for a value set by this package to count."""


_MARGIN = 1792  # values before and behind a block that must stay as they are


class UpstreamError(FinetuneError):
    """Another package's release differs from the tested one in a name that this package uses."""


def changed(package: str, name: str, difference: str) -> UpstreamError:
    """The error to raise: `difference` says what `name` no longer does."""
    found, tested = version(package), TESTED[package]
    what = f"{name} {difference} (tested with {package} {tested})"
    do = f"pip install {package}=={tested}"
    return UpstreamError(Problem(package, what, do, got=f"{package} {found}"))


def private(name: str) -> Any:
    """The object of an entry of `NAMES`, after its check."""
    target, wanted = _find(name), NAMES[name]
    if not wanted:
        return target
    required_of = _parameters(target)
    if missing := [parameter for parameter in wanted if parameter not in required_of]:
        raise changed(_package(name), name, f"no longer takes {', '.join(missing)}")
    if [parameter for parameter in required_of if parameter in wanted] != list(wanted):
        raise changed(_package(name), name, f"no longer takes {', '.join(wanted)} in this order")
    if new := [parameter for parameter, required in required_of.items() if required and parameter not in wanted]:
        raise changed(_package(name), name, f"now needs {', '.join(new)}")
    return target


def require(*names: str) -> None:
    """Check entries of `NAMES` that are overridden, subclassed or set, not called from here."""
    for name in names:
        private(name)


def require_reads(name: str) -> None:
    """Check an entry of `READ_BY`: a value set under a name that nothing reads would have no effect, in silence."""
    function, attribute = _find(name), READ_BY[name]
    function = getattr(function, "fget", function)
    if attribute not in function.__code__.co_names:
        raise changed(_package(name), name, f"no longer reads {attribute}")


def _package(name: str) -> str:
    package = name.partition(".")[0].partition(":")[0]
    return "bitsandbytes" if "ops.bitsandbytes." in name else package


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    package = _package(name)
    try:
        import_module(package)  # registers its operations
        target = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}.") or error.name == package:
            raise
        raise changed(package, name, "no longer exists") from error
    try:
        for part in path.split("."):
            target = getattr(target, part)
    except AttributeError as error:
        raise changed(package, name, "no longer exists") from error
    return target


def _parameters(target: Any) -> dict[str, bool]:
    """The parameters of a function, an operation or a method, and whether each must be given (`self` need not)."""
    if hasattr(target, "_schema"):
        return {argument.name: not argument.has_default_value() for argument in target._schema.arguments}
    if not callable(target):
        return {}
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(target).parameters
    return {
        name: parameter.default is parameter.empty and parameter.kind not in optional and name != "self"
        for name, parameter in parameters.items()
    }


@cache
def native_dequantize(name: str) -> Callable[..., None] | None:
    """bitsandbytes' own C function `cdequantize_blockwise_cpu_{name}`; None where its library lacks it.

    Its operations with `out` exist for CUDA only (0.50). On the CPU they allocate, which costs more than the
    arithmetic; so the C function is called directly, as the operation does. C checks no argument: another order would
    write anywhere, so the function must give the operation's values on a small block, and touch nothing beyond it.
    """
    import torch

    library = import_module("bitsandbytes.functional").lib
    function: Callable[..., None] | None = getattr(library, f"cdequantize_blockwise_cpu_{name}", None)
    if function is None:
        return None
    out, expected = _small_block(function, name)
    precision = 4 * torch.finfo(out.dtype).eps
    before, values, behind = out.split([_MARGIN, expected.numel(), _MARGIN])
    untouched = bool((before == 7).all() and (behind == 7).all())
    if not untouched or not torch.allclose(values, expected, rtol=precision, atol=precision):
        symbol = f"cdequantize_blockwise_cpu_{name}"
        raise changed("bitsandbytes", symbol, "gives other values than the operation, so its arguments differ")
    return function


def _small_block(function: Callable[..., None], name: str) -> tuple[Any, Any]:
    """512 values by the C function, between two margins filled with 7, and by bitsandbytes' operation."""
    import torch

    values = torch.linspace(-1, 1, 512).sin()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name.removeprefix("nf4_"), torch.float32)
    whole = torch.full((512 + 2 * _MARGIN,), 7.0, dtype=dtype)
    out = whole[_MARGIN : _MARGIN + 512]
    if name.startswith("nf4_"):
        packed, maxima = private("torch:ops.bitsandbytes.quantize_4bit.default")(values, 64, "nf4", torch.uint8)
        operation = private("torch:ops.bitsandbytes.dequantize_4bit.default")
        expected = operation(packed, maxima, 64, "nf4", (4, 128), dtype)
        arguments = [packed, maxima, out, 64, 4, 128]
    else:
        functional = import_module("bitsandbytes.functional")
        code = functional.create_dynamic_map()
        packed, state = functional.quantize_blockwise(values, blocksize=256)
        operation = private("torch:ops.bitsandbytes.dequantize_blockwise.default")
        expected = operation(packed, state.absmax, code, 256, dtype)
        arguments = [code, packed, state.absmax, out, 256, 512]
    function(*(c_longlong(value) if isinstance(value, int) else c_void_p(value.data_ptr()) for value in arguments))
    return whole, expected.view(-1)


def clean_name(name: str) -> str:
    """A parameter's name without PEFT's and the launcher's wrapping."""
    return re.sub(r"(^|\.)(base_model\.model|base_layer|token_adapter|module)(?=\.)", "", name).lstrip(".")
