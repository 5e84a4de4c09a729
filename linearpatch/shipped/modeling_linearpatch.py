"""A causal language model without some of its layers, and with a matrix (a patch) at each gap.

linearpatch copies this file, as it is, into the folder of every student, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds the classes that
`config.json` names. It needs PyTorch and transformers, and not linearpatch. What differs from
student to student is read from `config.json`, under "linearpatch".
"""

import copy
import functools
import json
import shutil
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

STEM = "modeling_linearpatch"
HINT = (
    "load it with linearpatch.load(folder), "
    "or AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
)

# The patch of a layer: where it sits, and what it does there.

# side of the layer -> name of the module
NAMES = {"input": "linear_patch", "output": "linear_patch_out"}


# how near to the state of the first token another has to be to count as that, by its length
FIRST = 0.05
# number formats that hidden states are computed in; others only store (integers, 8-bit floats)
COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PatchMatrix(nn.Module):
    """P transposed, (C, C), as `weight`: a linear map that is no `nn.Linear`.

    What quantizes a model, or puts adapters on "all linear layers", looks for `nn.Linear`. The
    patch is small, and 8 or 4 bits of it would be worth nothing."""

    def __init__(self, hidden, device=None, dtype=None):
        super().__init__()
        self.in_features = self.out_features = hidden
        self.weight = nn.Parameter(torch.empty(hidden, hidden, device=device, dtype=dtype))

    def forward(self, h):
        return nn.functional.linear(h, self.weight)

    def extra_repr(self):
        return f"{self.in_features} x {self.out_features}"


class FirstToken(nn.Module):
    """The first token of a window, a constant under causal attention: two states, (C,) each.

    It is known by its state, not by its place: right with any padding, batch, cache and chunk."""

    def __init__(self, hidden, device=None, dtype=None):
        super().__init__()
        for name in ("before", "after"):
            empty = torch.empty(hidden, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, h, out):
        "`out`, with the state `after` wherever h is the state `before`."
        before = self.before.float()
        distance = (h.float() - before).norm(dim=-1, keepdim=True)
        # below, not at: a state of zeros is nobody's
        return torch.where(distance < FIRST * before.norm(), self.after.to(out.dtype), out)


def times_matrix(
    patch: nn.Module,  # a patch: its `weight` is P transposed, (C, C)
    h: torch.Tensor,  # hidden states, (..., C)
) -> torch.Tensor:  # h @ P, in the dtype of h; the constant where h is the first token's state
    "Multiply in the patch's own precision, autocast or not, and on the patch's device."
    with torch.autocast(h.device.type, enabled=False):
        weight, dtype = patch.weight, h.dtype  # a patch in training computes it
    if weight.device.type != "meta" and weight.device != h.device:
        h = h.to(weight.device)
    with torch.autocast(h.device.type, enabled=False):
        # never into a format that only stores: a state rounded to integers is garbage
        h = h.to(weight.dtype) if weight.dtype in COMPUTES else h
        out = patch(h).to(dtype)
        first = getattr(patch, "first_token", None)
        return out if first is None else first(h, out)


def patch_input(
    layer: nn.Module,  # a decoder layer with a patch on its input
    args: tuple,  # what it is called with
    kwargs: dict,  # and by name
) -> tuple[tuple, dict]:  # the same, the hidden states multiplied
    "Forward pre-hook: the layer reads h @ P instead of h."
    if args:
        return (times_matrix(layer.linear_patch, args[0]), *args[1:]), kwargs
    h = times_matrix(layer.linear_patch, kwargs["hidden_states"])
    return args, kwargs | {"hidden_states": h}


def patch_output(
    layer: nn.Module,  # a decoder layer with a patch on its output
    args: tuple,  # what it was called with
    output: torch.Tensor | tuple,  # what it hands on: some versions hand on a tuple
) -> torch.Tensor | tuple:  # the same, the hidden states multiplied
    "Forward hook: the layer hands on h @ P instead of h."
    if isinstance(output, tuple):
        return (times_matrix(layer.linear_patch_out, output[0]), *output[1:])
    return times_matrix(layer.linear_patch_out, output)


def add_patch(
    layer: nn.Module,  # a decoder layer
    side: str,  # "input" or "output"
    hidden: int,  # C
    weight: torch.Tensor | None = None,  # P transposed, (C, C); None: empty, to be loaded
    first: tuple[torch.Tensor, torch.Tensor] | bool = False,  # see FirstToken; True: to be loaded
) -> None:
    "Register a patch on one side of a layer, with the hook that applies it."
    patch = PatchMatrix(hidden, device=None if weight is None else "meta")
    if weight is not None:
        patch.weight = nn.Parameter(weight)
    if first:
        patch.first_token = FirstToken(hidden)
    if weight is not None and first:
        for state, numbers in zip(patch.first_token.parameters(), first):
            state.data = numbers.to(weight.device, weight.dtype, copy=True)
    layer.add_module(NAMES[side], patch)
    if side == "input":
        layer.register_forward_pre_hook(patch_input, with_kwargs=True)
    else:
        layer.register_forward_hook(patch_output)


def named_patches(student):
    "(path, module) of each patch, in the order of the cuts."
    return [
        (path, module)
        for path, module in student.named_modules()
        if path.rpartition(".")[2] in NAMES.values()
    ]


# Writing: the config is sealed, so that nothing but this file reads the folder as a model.


def entry_of(config, where):
    "The dict that holds an entry of a nested config, and its name; `where` is such as 'a.b.c'."
    *parts, name = where.split(".")
    return functools.reduce(lambda values, key: values[key], parts, config), name


def describe(student, base):
    "What has to be known to build the student again: its class, its sizes, where its layers are."
    config = student.config
    try:
        text = config.get_text_config(decoder=True)
    except TypeError:  # older transformers
        text = config.get_text_config()
    within = "" if text is config else next(k for k, v in vars(config).items() if v is text) + "."
    path, patch = named_patches(student)[0]  # such as model.layers.2.linear_patch
    layers = path.rsplit(".", 2)[0]
    return {
        "model_type": config.model_type,
        "architecture": base.__name__,
        "layers": layers,
        "layers_key": within + text.attribute_map.get("num_hidden_layers", "num_hidden_layers"),
        "num_hidden_layers": len(student.get_submodule(layers)),
        "hidden_size": patch.in_features,
        "dtype": str(student.dtype).removeprefix("torch."),
        "remote": not base.__module__.startswith("transformers."),
    }


def sealed_config(config, student, base):
    "The contents of config.json, changed so that only this file reads them as a model's."
    record = config["linearpatch"]
    known = record.get("model", {})  # in memory where this file loaded the student
    model = record["model"] = describe(student, base)
    for entry, (_, patch) in zip(record["patches"], named_patches(student)):
        entry["dtype"] = str(patch.weight.dtype).removeprefix("torch.")
    if model["remote"]:  # the base model came with code, whose names are needed
        own = config.get("auto_map") or {}
        foreign = {k: v for k, v in own.items() if not v.startswith(STEM)}
        model["auto_map"] = known.get("auto_map", {}) | foreign
    part, name = entry_of(config, model["layers_key"])
    part[name] = f"{model['num_hidden_layers']} and a patch: {HINT}"
    return config | {
        "model_type": "linearpatch",
        "architectures": ["LinearPatchForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{STEM}.LinearPatchConfig",
            "AutoModelForCausalLM": f"{STEM}.LinearPatchForCausalLM",
        },
    }


def seal_folder(student, folder, base):
    "Turn a folder that the base class wrote into one that plain loaders refuse, and add this file."
    path = Path(folder) / "config.json"
    config = sealed_config(json.loads(path.read_text(encoding="utf-8")), student, base)
    teacher = config["linearpatch"].get("teacher", {}).get("name")
    homes = [getattr(student.config, "_name_or_path", ""), teacher]
    if config["linearpatch"]["model"]["remote"]:
        for home in filter(None, homes):
            for file in Path(home).glob("*.py"):  # the base model's code, where it is not there yet
                if not path.with_name(file.name).exists():
                    shutil.copy(file, folder)
    code = Path(__file__).read_text(encoding="utf-8")
    path.with_name(f"{STEM}.py").write_text(code, encoding="utf-8")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


@functools.lru_cache
def student_class(base):
    "`base`, with a `save_pretrained` that saves the patches so that they are read again."

    class Student(base):
        linearpatch_base = base

        def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
            if kwargs.pop("push_to_hub", False):
                raise ValueError(
                    "save_pretrained(push_to_hub=True) would upload before all is written: "
                    "call push_to_hub of the model, or of linearpatch"
                )
            if any(parametrize.is_parametrized(patch) for _, patch in named_patches(self)):
                raise ValueError(
                    "the patch is in training as a product of other matrices: "
                    "save the student when its training has ended"
                )
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            if is_main_process:
                seal_folder(self, save_directory, base)

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Student, name, getattr(base, name))  # transformers looks rules up by name
    return Student


def plain_class(cls):
    "The class that a student's class was made from; another class comes back as it is."
    return vars(cls).get("linearpatch_base", cls)


# Reading: the base model's own classes, with empty patches that are loaded as any other weight.


def base_class(path, model, auto):
    "The base model's class, of config or model: of transformers, or of its authors' own code."
    if model["remote"]:
        cls = get_class_from_dynamic_module(model["auto_map"][auto], path)
        cls.register_for_auto_class(auto)  # its code is saved with it
        return cls
    if auto == "AutoConfig":
        return CONFIG_MAPPING[model["model_type"]]
    return getattr(transformers, model["architecture"])


def empty_config(base, name):
    "An object of such a class, to be filled: what copies and pickles of one begin with."
    return object.__new__(config_class(base, name))


@functools.lru_cache
def config_class(base, name="LinearPatchConfig"):
    """A class like `base` that reads its own folder, sealed as it is.

    Under its own name no table of transformers pairs it with a plain model."""

    class Config(base):
        @classmethod
        def from_pretrained(cls, path, **kwargs):
            values, rest = cls.get_config_dict(path, **kwargs)
            if values.get("model_type") == "linearpatch":
                return read_config(path, values, **rest)
            return base.from_pretrained(path, **kwargs)

        def __reduce_ex__(self, protocol):
            return empty_config, (base, name), vars(self).copy()

    Config.__name__ = Config.__qualname__ = name
    # under the base's name it stands for the base, where transformers looks for the base's code
    Config.__module__ = base.__module__ if name == base.__name__ else __name__
    return Config


def read_config(path, values, **kwargs):
    "The base model's config, of a class of its own, from the contents of config.json."
    values = copy.deepcopy(values)
    model = values["linearpatch"]["model"]
    part, name = entry_of(values, model["layers_key"])
    part[name] = model["num_hidden_layers"]
    values |= {"model_type": model["model_type"], "architectures": [model["architecture"]]}
    return config_class(base_class(path, model, "AutoConfig")).from_dict(values, **kwargs)


def class_to_load(base, record):
    "A class whose models are made with the patches that `record` names, empty."
    patches, model = record["patches"], record["model"]
    keep = {NAMES[p["side"]] for p in patches if p.get("dtype") == "float32"}

    class Student(student_class(base)):
        linearpatch_base = base

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            layers = self.get_submodule(model["layers"])
            for p in patches:
                layer, first = layers[p["layer"]], p.get("first", False)
                add_patch(layer, p["side"], model["hidden_size"], first=first)
            self._keep_in_fp32_modules_strict = keep | set(self._keep_in_fp32_modules_strict or ())

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Student, name, getattr(base, name))
    return Student


def check_loaded(path, info):
    "ValueError where weights are missing, left over, or of another shape."
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = sorted(map(str, info[what]))[:3]
            raise ValueError(
                f"the weights in {path} do not fit its config.json "
                f"({what.replace('_', ' ')}: {some}): files are missing, damaged, "
                "or do not belong together; copy or download them again"
            )


def load_patched(path, config, *args, **kwargs):
    "The model with its patches, and what was loaded; ValueError where files and config disagree."
    record = config.linearpatch
    base = base_class(path, record["model"], "AutoModelForCausalLM")
    kwargs |= {
        "config": config,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    model, info = class_to_load(base, record).from_pretrained(path, *args, **kwargs)
    check_loaded(path, info)
    model.__class__ = student_class(base)
    for entry, (_, patch) in zip(record["patches"], named_patches(model)):
        # a precision of its own, coarser than the model's
        if entry["dtype"] not in ("float32", record["model"]["dtype"]):
            patch.to(getattr(torch, entry["dtype"]))
    return model, info


class LinearPatchConfig(PretrainedConfig):
    "What config.json names; reading it gives the base model's config."

    model_type = "linearpatch"

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        values, kwargs = cls.get_config_dict(path, **kwargs)
        return read_config(path, values, **kwargs)


class LinearPatchForCausalLM:
    "What config.json names; reading it gives the base model's class with patches."

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        pass

    @classmethod
    def from_pretrained(cls, path, *args, config=None, output_loading_info=False, **kwargs):
        config = config or LinearPatchConfig.from_pretrained(path)
        model, info = load_patched(path, config, *args, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        record = config.linearpatch
        base = base_class(config._name_or_path, record["model"], "AutoModelForCausalLM")
        return class_to_load(base, record)._from_config(config, **kwargs)
