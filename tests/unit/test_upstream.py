"""Each private name of another package, changed the way a release may change it, stops with one line."""

import importlib
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch

from finetune import upstream
from finetune.upstream import NAMES, READ_BY, UpstreamError, native_dequantize, private, require, require_reads

NATIVE = ("fp32", "nf4_fp32", "nf4_bf16", "nf4_fp16")


def holder(name: str) -> tuple[Any, str]:
    """The object that has the entry as an attribute, and the attribute's name."""
    module, _, path = name.partition(":")
    importlib.import_module("bitsandbytes")
    target: Any = importlib.import_module(module)
    *parents, last = path.split(".")
    for parent in parents:
        target = getattr(target, parent)
    return target, last


def one_line(error: UpstreamError, name: str) -> None:
    text, package = str(error), upstream._package(name)
    assert "\n" not in text
    assert text.startswith((f"{package}: {name} no longer ", f"{package}: {name} now needs "))
    assert f"(tested with {package} {upstream.TESTED[package]}); got {package} " in text
    assert text.endswith(f"; pip install {package}=={upstream.TESTED[package]}")


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_exists_here(name: str) -> None:
    require(name)


class Empty:
    """Has no attribute of another package."""


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("torch:")])
def test_a_removed_name_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, path = name.partition(":")
    first, dot, _ = path.partition(".")
    if dot:  # an attribute of a class may be inherited from another one
        monkeypatch.setattr(importlib.import_module(module), first, Empty)
    else:
        monkeypatch.delattr(importlib.import_module(module), first)
    with pytest.raises(UpstreamError) as stopped:
        private(name)
    one_line(stopped.value, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("torch:")])
def test_an_operation_that_was_removed_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_name = name.partition(":")[2].partition(".")[0]
    monkeypatch.setattr(torch, torch_name, Empty)
    with pytest.raises(UpstreamError) as stopped:
        private(name)
    one_line(stopped.value, name)


@pytest.mark.parametrize("name", [name for name, parameters in NAMES.items() if parameters and "torch:" not in name])
def test_another_signature_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(other: Any) -> None: ...

    monkeypatch.setattr(*holder(name), renamed)
    with pytest.raises(UpstreamError, match=f"no longer takes {', '.join(NAMES[name])}") as stopped:
        private(name)
    one_line(stopped.value, name)


SEVERAL = [name for name, parameters in NAMES.items() if len(parameters) > 1 and "torch:" not in name]


@pytest.mark.parametrize("name", SEVERAL)
def test_parameters_in_another_order_stop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call by position would hand each value to another parameter."""
    function = FunctionType(compile(f"def f({', '.join(reversed(NAMES[name]))}): ...", "", "exec").co_consts[0], {})
    monkeypatch.setattr(*holder(name), function)
    with pytest.raises(UpstreamError, match=f"no longer takes {', '.join(NAMES[name])} in this order") as stopped:
        private(name)
    one_line(stopped.value, name)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_new_required_parameter_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = FunctionType(compile(f"def f({', '.join(NAMES[name])}, new): ...", "", "exec").co_consts[0], {})
    monkeypatch.setattr(*holder(name), function)
    with pytest.raises(UpstreamError, match="now needs new") as stopped:
        private(name)
    one_line(stopped.value, name)


def without(attribute: str) -> Callable[[Any], Any]:
    def function(self: Any) -> Any:
        return self.other

    return function


@pytest.mark.parametrize("name", READ_BY)
def test_an_attribute_that_nothing_reads_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_reads(name)
    monkeypatch.setattr(*holder(name), without(READ_BY[name]))
    with pytest.raises(UpstreamError, match=f"no longer reads {READ_BY[name]}") as stopped:
        require_reads(name)
    one_line(stopped.value, name)


class Library:
    """bitsandbytes' library with functions that read their second array from where the first one is."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        return lambda first, second, *others: function(first, first, *others)


@pytest.mark.parametrize("name", NATIVE)
def test_native_function_with_other_arguments_stops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    native_dequantize.cache_clear()
    assert native_dequantize(name) is not None
    native_dequantize.cache_clear()
    monkeypatch.setattr(functional, "lib", Library(functional.lib))
    with pytest.raises(UpstreamError, match="gives other values than the operation") as stopped:
        native_dequantize(name)
    assert "\n" not in str(stopped.value)
    native_dequantize.cache_clear()


@pytest.mark.parametrize("place", [0, upstream._MARGIN - 1, upstream._MARGIN + 512, -1])
def test_native_function_that_writes_beyond_its_block_stops(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_far(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, expected = small_block(*arguments)
        out[place] = 0
        return out, expected

    small_block = upstream._small_block
    native_dequantize.cache_clear()
    monkeypatch.setattr(upstream, "_small_block", too_far)
    with pytest.raises(UpstreamError):
        native_dequantize("nf4_fp32")
    native_dequantize.cache_clear()


def test_a_library_without_the_function_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import functional

    native_dequantize.cache_clear()
    monkeypatch.setattr(functional, "lib", Empty())
    assert native_dequantize("nf4_fp32") is None
    native_dequantize.cache_clear()
