"""Layer and neuron forms of a method: the same method, asked by a layer or of a neuron.

``@layer_form`` and ``@neuron_form`` give a subclass the constructor and the ``attribute`` of these
forms, in Captum's order of parameters; nothing else is written for a form but its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from onnxplain.errors import LayerError
from onnxplain.methods.base import Attribution, Layers
from onnxplain.model import Model

_Parameters = dict[str, inspect.Parameter]

_LAYER_DOC = """Explain examples by a layer.

Arguments and errors as :meth:`{base}.attribute`; inputs that hold integers (token ids) are allowed,
their default baseline is 0. ``attribute_to_layer_input``: explain by what enters the layer.

Returns:
    An array of the layer's shape; a tuple where several values leave the scope; a list for a list
    of layers; with the delta if asked for.
"""

_NEURON_DOC = """Explain a neuron of the layer.

``neuron_selector``: int, or tuple of ints and slices (summed), without the examples axis;
``attribute_to_neuron_input``: of what enters the layer. Other arguments, result and errors as
:meth:`{base}.attribute`; NeuronError: the selector doesn't fit the layer's shape.
"""


def layer_form(cls: type[Attribution]) -> Any:
    """Make a subclass the form of its base that explains by a layer (or a list of layers)."""

    def ask(p: _Parameters) -> None:
        _insert(p, "attribute_to_layer_input", False, bool, "return_convergence_delta")

    return _form(cls, "wrt", "layer", Layers, _LAYER_DOC, ask)


def neuron_form(cls: type[Attribution]) -> Any:
    """Make a subclass the form of its base that explains a neuron of a layer."""

    def ask(p: _Parameters) -> None:
        _insert(p, "attribute_to_neuron_input", False, bool, "return_convergence_delta")
        p.pop("return_convergence_delta", None)
        del p["target"]
        _insert(p, "neuron_selector", inspect.Parameter.empty, Any, "inputs")

    return _form(cls, "of", "neuron", str, _NEURON_DOC, ask)


def _form(
    cls: type[Attribution],
    keyword: str,
    kind: str,
    annotation: Any,
    doc: str,
    ask: Callable[[_Parameters], None],
) -> Any:
    base: Any = cls.__mro__[1]
    made = _parameters(base.__init__)
    del made[keyword]
    _insert(made, "layer", inspect.Parameter.empty, annotation, "model")
    call = _parameters(base.attribute)
    ask(call)

    def __init__(self: Any, model: Model, layer: Any, *args: Any, **options: Any) -> None:
        given = _bind(made, cls.__name__, (self, model, layer, *args), options)
        del given["self"]
        given[keyword] = given.pop("layer")
        if given[keyword] is None:
            raise LayerError("no layer was given: name one; model.layers() lists them")
        base.__init__(self, **given)

    def attribute(self: Any, *args: Any, **options: Any) -> Any:
        return self._call(_bind(call, f"{cls.__name__}.attribute", (self, *args), options))

    attribute.__doc__ = doc.format(base=base.__name__)
    functions: list[tuple[Any, _Parameters]] = [(__init__, made), (attribute, call)]
    for function, parameters in functions:
        function.__signature__ = inspect.Signature(list(parameters.values()))
        function.__qualname__ = f"{cls.__name__}.{function.__name__}"
        function.__module__ = cls.__module__
        setattr(cls, function.__name__, function)
    own = vars(cls)
    for attribute_name, value in (
        ("name", f"{kind}-{base.name}"),
        ("title", f"{kind.capitalize()} {base.title}"),
        ("needs", (*base.needs, *(("layer",) if kind == "layer" else ("layer", "neuron")))),
        ("explains", "layer" if kind == "layer" else "inputs"),
        ("check", base.check if kind == "layer" else base.check.replace("output", "neuron")),
    ):
        if attribute_name not in own:
            setattr(cls, attribute_name, value)
    return cls


def _parameters(function: Any) -> _Parameters:
    return dict(inspect.signature(function).parameters)


def _insert(parameters: _Parameters, name: str, default: Any, kind: Any, after: str) -> None:
    """Add a parameter behind another one; at the end (before keywords) where that is missing."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    found = list(parameters.values())
    names = list(parameters)
    at = (
        names.index(after) + 1
        if after in names
        else next((i for i, p in enumerate(found) if p.kind is keyword), len(found))
    )
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found.insert(at, inspect.Parameter(name, positional, default=default, annotation=kind))
    parameters.clear()
    parameters.update((p.name, p) for p in found)


def _bind(
    parameters: _Parameters, what: str, args: tuple[Any, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, defaults filled in; a wrong one is a TypeError that names the callable."""
    try:
        bound = inspect.Signature(list(parameters.values())).bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)
