"""The fields of TRL's SFTConfig and DPOConfig, read from the installed source with `ast`: importing would import torch.

Each inherits `_BaseConfig` inherits transformers' `TrainingArguments`; all three are read, oldest first.
"""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finetune.errors import Problem, RecipeError

_TRAINING_ARGUMENTS = ("transformers", "training_args.py")
_COMMON = ((*_TRAINING_ARGUMENTS, "TrainingArguments"), ("trl", "trainer/base_config.py", "_BaseConfig"))
TRAINER_CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
"""TRL's name of a method's settings."""

# Simple annotations whose values can be checked here; what else a field may take (enums, dicts) is written as text.
_SIMPLE: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class TrainerField:
    """One field: its annotation as written, and the scalar types it accepts."""

    annotation: str
    accepts: tuple[type, ...]

    def takes(self, value: object) -> bool:
        """True where `value` fits the annotation; true and false are no integers."""
        if isinstance(value, bool):
            return bool in self.accepts
        return isinstance(value, self.accepts)


@cache
def trainer_fields(kind: str) -> dict[str, TrainerField]:
    """Name -> field of the method's settings in TRL, inherited ones included."""
    fields: dict[str, TrainerField] = {}
    for package, file, name in (*_COMMON, ("trl", f"trainer/{kind}_config.py", TRAINER_CONFIGS[kind])):
        for statement in _class(package, file, name).body:
            # A dataclass field is an annotated name; a ClassVar is not one.
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if not ast.unparse(statement.annotation).startswith("ClassVar"):
                fields[statement.target.id] = _field(statement.annotation)
    return fields


@cache
def optimizer_names() -> frozenset[str]:
    """The values of transformers' `OptimizerNames`."""
    body = _class(*_TRAINING_ARGUMENTS, "OptimizerNames").body
    constants = [statement.value for statement in body if isinstance(statement, ast.Assign)]
    return frozenset(str(constant.value) for constant in constants if isinstance(constant, ast.Constant))


def _field(annotation: ast.expr) -> TrainerField:
    accepts: list[type] = []
    for option in ast.unparse(annotation).split(" | "):
        # Enums and dicts have a spelling as text: the trainer's own __post_init__ reads it.
        accepts.extend(_SIMPLE.get(option, (str,)))
    return TrainerField(ast.unparse(annotation), tuple(accepts))


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    for statement in _module(package, file).body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return statement
    raise _unreadable(package, f"{package}/{file} has no class {name}")


@cache
def _module(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / file
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    raise _unreadable(package, f"{package}/{file} was not found")


def _unreadable(package: str, what: str) -> RecipeError:
    do = f"install the versions of constraints.txt ({package} is missing or another version)"
    return RecipeError(Problem("training", f"the trainer's own settings cannot be checked: {what}", do))
