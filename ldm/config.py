"""Floor 0: YAML configs with `defaults:` and overrides, dotted targets and their aliases."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm import trust
from ldm.aliases import ALIASES
from ldm.errors import InputError, did_you_mean, explain, first_line, short
from ldm.files import read_yaml_text


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the object with a dotted name, after looking it up in `ALIASES`.

    Raises `InputError` if the module or the name in it does not exist.
    """
    target = ALIASES.get(string, string)
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise InputError(f"target {string!r} is not a dotted name: expected package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing part of the target is a spelling mistake; a missing dependency gets another message.
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise InputError(
                f"target {string!r}: there is no module {error.name!r}; check the spelling in the config"
            ) from None
        raise InputError(f"target {string!r} needs the package {error.name!r}, which is not installed") from error
    if reload:
        module = importlib.reload(module)
    try:
        return getattr(module, name)
    except AttributeError:
        raise InputError(
            f"target {string!r}: module {module_name!r} has no {name!r}; check the spelling in the config"
        ) from None


def instantiate_from_config(config: Mapping | str | None, **extra: Any) -> Any:
    """Build `{target: dotted.name, params: {...}}`; `extra` is added to the parameters.

    LDM's markers `__is_first_stage__` and `__is_unconditional__` give None.
    Raises `InputError` for a missing target and for parameters that the target does not take.
    """
    if config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise InputError(f"expected a config with the key 'target', got {short(config)}")
    check_entry(config)
    target, params = get_obj_from_str(str(config["target"])), plain(config.get("params") or {})
    if not isinstance(params, Mapping):
        raise InputError(f"params of {config['target']} must be a mapping, got {short(params)}")
    params = {**params, **extra}
    required, known = parameters_of(target)
    if known is not None:
        if lacking := [name for name in required if name not in params]:
            raise InputError(f"params of {config['target']}: {', '.join(lacking)} missing")
    with explain(f"params of {config['target']}", TypeError, ValueError, ArithmeticError, RuntimeError):
        return target(**params)


def check_entry(config: Mapping, place: str = "") -> None:
    """Check a `{target, params}`: no other keys, and only arguments that the target takes.

    `place` is its dotted key. Raises `InputError` with the nearest known name.
    """
    from ldm import schema

    name, where = str(config["target"]), f"{place}." if place else ""
    beside = {"model": schema.Model, "model.params.tuning": schema.Tuning, "": schema.Model}
    beside["model.params.conditioner_config.params.emb_models"] = schema.Embedder
    beside = beside.get(re.sub(r"\.\d+$", "", place), schema.Entry).model_fields
    if unknown := next((key for key in config if key not in beside), None):
        raise InputError(f"{where}{unknown} is unknown{did_you_mean(unknown, beside)}")
    target, params = get_obj_from_str(name), plain(config.get("params") or {})
    if not isinstance(params, Mapping):
        raise InputError(f"params of {name} must be a mapping, got {short(params)}")
    known, kinds = parameters_of(target)[1], annotations_of(target)
    for key, value in params.items():
        dotted = f"{where}params.{key}: " if place else ""
        if known is not None and key not in known:
            near = did_you_mean(key, known)
            near = near if near.endswith("?") else ";"
            raise InputError(f"{dotted}params of {name}: unknown {key}{near} it takes {', '.join(known)}")
        if key in kinds and not schema.fits(value, kinds[key]) and not is_default(target, key, value):
            raise InputError(f"{dotted}params of {name}: {key} must be {schema.phrase(kinds[key])}, got {short(value)}")


def check_entries(config: Any, place: str = "") -> None:
    """`check_entry` for each `{target, params}` in a config of plain values, also nested ones.

    Targets that cannot be imported are skipped, because not every part of a config is built.
    """
    if isinstance(config, Mapping):
        if isinstance(config.get("target"), str):
            try:
                get_obj_from_str(config["target"])
            except InputError:
                pass
            else:
                check_entry(config, place)
        for key, value in config.items():
            check_entries(value, f"{place}.{key}" if place else str(key))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            check_entries(value, f"{place}.{number}")


def annotations_of(target: Callable) -> dict[str, Any]:
    """The types of a callable's parameters that are annotated and can be resolved."""
    found: dict[str, Any] = {}
    for cls in inspect.getmro(target) if inspect.isclass(target) else (target,):
        function = vars(cls).get("__init__") if inspect.isclass(cls) else cls
        if function is None:
            continue
        try:
            found = {**typing.get_type_hints(function), **found}
        except Exception:  # names that only type checkers import, or a builtin
            pass
        if not any(p.kind is p.VAR_KEYWORD for p in _signature(function)):
            break
    return found


def is_default(target: Callable, name: str, value: Any) -> bool:
    """Whether a value is the default of a callable's parameter, whatever its annotation says."""
    defaults = [p.default for p in _signature(target) if p.name == name]
    return bool(defaults) and (value is None or type(value) is type(defaults[0])) and value == defaults[0]


def _signature(function: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return []


def parameters_of(target: Callable) -> tuple[list[str], list[str] | None]:
    """The names of a callable's required parameters, and of all parameters (None: any).

    A class that passes `**more` to its parent takes the parent's parameters too, except those in its attribute `GIVEN`,
    which it passes itself.
    """
    required, known, given = [], [], set()
    for cls in _with_own_init(target) if inspect.isclass(target) else (target,):
        try:
            parameters = inspect.signature(cls).parameters.values()
        except ValueError:  # a builtin without a signature
            return [], None
        by_name = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        new = [p for p in by_name if p.name not in given and p.name not in known]
        required += [p.name for p in new if p.default is p.empty]
        known += [p.name for p in new]
        given.update(getattr(cls, "__dict__", {}).get("GIVEN", ()))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return required, known
    return [], None


def unet_params(config: Mapping) -> str:
    """The dotted key of the UNet's parameters in a config; sgm's models call the UNet the network."""
    params = (config.get("model") or {}).get("params") or {}
    return f"model.params.{'network_config' if 'network_config' in params else 'unet_config'}.params"


def _with_own_init(cls: type) -> list[type]:
    """The class and its parents in method resolution order, without those that inherit `__init__`."""
    return [one for one in inspect.getmro(cls) if "__init__" in vars(one)]


def plain(config: Any) -> Any:
    """OmegaConf containers as dicts and lists, everything else unchanged."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    with explain("the config refers to what is not in it", InterpolationResolutionError):
        return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Read a YAML config, the files named by its `defaults:` first, then `a.b.c=value` overrides.

    `defaults:` is one path or a list of paths, relative to the file that names them (as in Hydra). Later files win over
    earlier ones, and the file itself wins over all of them. Lists are replaced, mappings are merged.

    Raises `InputError` for a missing or malformed file, a circle of defaults and a malformed override.
    """
    from omegaconf import OmegaConf

    config = override(OmegaConf.create(_load_with_defaults(Path(path), seen=())), overrides)
    check(config)
    return config


def check(config: Any, source: str = "") -> None:
    """Raises `InputError`, with the dotted key, for keys and types that `ldm.schema` does not allow."""
    from omegaconf import OmegaConf

    from ldm import schema

    content = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    target = schema.select(content, "data.target")
    schema.check(content, source, ALIASES.get(target, target) if isinstance(target, str) else None)


def stored_config(path: str | Path) -> Any:
    """The config in the folder of a run. The folder may come from anywhere, so only our own targets are allowed.

    Raises `InputError` for other targets, for `defaults` and for `${...}`, before anything is imported. With
    `--trust_config` there is no check.
    """
    from omegaconf import OmegaConf

    if trust.trust_config:
        return load_config(path)
    held = _read_yaml(Path(path), "")
    way_out = "if the run is yours or you trust it, add --trust_config"
    if "defaults" in held:
        raise InputError(f"{path} refers to other files by defaults, which no run writes; {way_out}")
    if found := trust.interpolations(held):
        raise InputError(f"{path} refers to other values by {short(found[0])}, which no run writes; {way_out}")
    if foreign := trust.foreign_targets(held, ALIASES):
        raise InputError(
            f"{path} asks for {', '.join(map(short, foreign[:3]))}, which is not among the targets of ours and was not "
            f"imported: {way_out}, or --allow_family for a family of yours"
        )
    folder = Path(path).resolve().parent.parent
    if outside := trust.paths_outside(held.get("lightning"), folder):
        raise InputError(f"{path} asks to write to {short(outside[0])}, outside the folder of its run; {way_out}")
    return OmegaConf.create(held)


# configs/, models/sd-mini and examples/subjects: in an installed package, else in the checkout (see setup.py).
PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "_data" if (PACKAGE / "_data").is_dir() else PACKAGE.parent


def named_config(path: str | Path) -> Any:
    """The config that an option names: that of a run by `stored_config`, another one by `load_config`."""
    path = find_file(path)
    return stored_config(path) if path.name == "project.yaml" else load_config(path)


def find_file(path: str | Path) -> Path:
    """A relative path from the working directory or, if that does not exist, from the package's data (`SHIPPED`)."""
    path = Path(path).expanduser()
    shipped = SHIPPED / path
    return shipped if not path.exists() and shipped.exists() else path


def parse_overrides(overrides: Iterable[str]) -> Any:
    """`["model.params.reg_weight=0.5"]` as an OmegaConf tree. A leading `--` is accepted. Raises `InputError`."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # YAML 1.1 would read a time such as 00:12:00:00 as a number in base 60.
    items = [re.sub(r"=(\d+(?::\d+)+)$", r'="\1"', item.removeprefix("--")) for item in overrides]
    for item in items:
        if "=" not in item or not item.split("=")[0].replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise InputError(
                f"cannot read {item!r}: expected an override such as model.params.reg_weight=0.5 or an option of --help"
            )
    try:
        return OmegaConf.from_dotlist(items)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"cannot read the overrides {items}: {first_line(error)}") from None


def merged(*configs: Any, source: str = "") -> Any:
    """Merge configs; later ones win. Raises `InputError` if one has a list where another has a mapping."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with explain(source or "the configs do not go together", TypeError, OmegaConfBaseException):
        return OmegaConf.merge(*configs)


# Short forms of dotted keys in overrides.
SHORT = {"tuning": "model.params.tuning"}


def override(config: Any, overrides: Iterable[str]) -> Any:
    """Apply `a.b.c=value` to a config, one after the other; `a.0.b=value` changes the first entry of a list.

    Mappings are merged, other values are replaced. Raises `InputError` for an entry that a list does not have.
    """
    from ldm import schema

    config = merged({}, config)
    for item in overrides:
        name, equals, value = item.removeprefix("--").partition("=")
        first, dot, rest = name.partition(".")
        if first in SHORT and first not in config:
            name = SHORT[first] + dot + rest
        tree = parse_overrides([f"{name}{equals}{value}"])
        if first not in {*config, *schema.Config.model_fields, *SHORT} and not schema.is_own(first):
            raise InputError(f"{first} is unknown{did_you_mean(first, [*schema.Config.model_fields, *SHORT])}")
        if any(piece.isdecimal() for piece in name.split(".")):
            _put(config, name, parse_overrides([f"value={value}"]).value)
        else:
            check(tree)
            config = merged(config, tree, source=item)
    return config


def _put(config: Any, name: str, value: Any) -> None:
    """Set a dotted key that may contain numbers of list entries. Raises `InputError` if a list is too short."""
    from omegaconf import OmegaConf

    *above, last = name.split(".")
    holder = config
    for number, piece in enumerate(above):
        key = _key(holder, piece, name, above[:number])
        if OmegaConf.is_dict(holder) and holder.get(key) is None:
            holder[key] = {}
        holder = holder[key]
    key = _key(holder, last, name, above)
    old = holder[key] if OmegaConf.is_list(holder) else holder.get(key)
    holder[key] = merged(old, value) if OmegaConf.is_dict(old) and OmegaConf.is_dict(value) else value


def _key(holder: Any, piece: str, name: str, place: list[str]) -> str | int:
    """A piece of a dotted key as an index of a list or a key of a mapping."""
    from omegaconf import OmegaConf

    dotted = ".".join(place)
    if OmegaConf.is_list(holder):
        if not piece.isdecimal() or int(piece) >= len(holder):
            count = len(holder)
            raise InputError(f"cannot set {name}: {dotted} is a list of {count}: got {piece}, not 0 to {count - 1}")
        return int(piece)
    if not OmegaConf.is_dict(holder) or piece.isdecimal() and piece not in holder:
        kind = "a mapping" if OmegaConf.is_dict(holder) else short(holder)
        raise InputError(f"cannot set {name}: {dotted} is {kind}, not a list with an entry {piece}")
    return piece


def _load_with_defaults(path: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    """The content of a config over that of its defaults, as plain values; `${...}` is left as it is."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"config {path}: its defaults form a circle: {' -> '.join(p.name for p in (*seen, path))}")
    content = dict(_read_yaml(path, f" (named in the defaults of {seen[-1]})" if seen else ""))
    defaults = content.pop("defaults", None) or []
    names = [defaults] if isinstance(defaults, str) else defaults
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"config {path}: defaults must be a relative path or a list of them, got {short(names)}")
    bases = [_load_with_defaults(path.parent / name, (*seen, path)) for name in names]
    return functools.reduce(functools.partial(_laid_over, source=f"config {path}"), [*bases, content])


def _laid_over(base: dict, top: dict, source: str, place: str = "") -> dict:
    """A new mapping with the values of both; those of `top` win. It is what `merged` does, at a tenth of its time.

    Raises `InputError` if one has a list where the other has a mapping.
    """
    both = dict(base)
    for key, value in top.items():
        below, dotted = base.get(key), f"{place}{key}"
        if isinstance(below, dict | list) and isinstance(value, dict | list) and type(below) is not type(value):
            kinds = {dict: "a mapping", list: "a list"}
            raise InputError(f"{source}: {dotted} is {kinds[type(value)]}, in its defaults {kinds[type(below)]}")
        is_shared = isinstance(below, dict) and isinstance(value, dict)
        both[key] = _laid_over(below, value, source, f"{dotted}.") if is_shared else value
    return both


def _read_yaml(path: Path, named: str) -> dict[Any, Any]:
    """One file as a mapping of plain values. Do not change it: files with the same text share it.

    `named` says where the name of the file comes from, for messages.
    """
    if not path.is_file():
        raise InputError(f"config {path} does not exist{named}; the shipped ones are under configs/")
    try:
        text = read_yaml_text(path)
    except InputError as error:
        raise InputError(f"config {error}") from None
    return _parsed(text, path)


@functools.lru_cache(maxsize=256)
def _parsed(text: str, path: Path) -> dict[Any, Any]:
    """The text of a config as plain values, checked. Raises `InputError`."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        try:
            config = OmegaConf.load(io.StringIO(text))
        except OSError:  # a number or the like
            config = yaml.safe_load(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise InputError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(config):
        raise InputError(
            f"config {path} must be a mapping with keys such as model and data, got {short(plain(config))}"
        )
    content = OmegaConf.to_container(config, resolve=False)
    check(content, f"config {path}")
    return content
