"""Replay: make a saved result again from its own metadata, and say whether it is the same bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.diffusion.start import Init, files_of
from suite.errors import ConfigError, SuiteError
from suite.files import untrusted
from suite.files.inputs import MEDIA, check
from suite.files.untrusted import MAX_SEED, Anything, Items, Number, Section, Table, Text, Whole, check_plain, shown
from suite.host import models
from suite.host.discovery import MODALITIES, installed
from suite.host.path_options import refuse_paths, stores_used, without_stores
from suite.host.plan import Plan, make_plan
from suite.observe.report import REPORT_VERSION, versions
from suite.recipe import Recipe

if TYPE_CHECKING:
    from suite.modality import Modality

#: What a report must say so that it can be run again; the rest of it is for the reader.
REPORT = Section(
    {
        "modality": Text(100),
        "model": Text(200),
        "model_hash": Text(64),
        "prompts": Items(Text(100_000), 1),
        "seeds": Items(Whole(0, MAX_SEED), 1),
        "recipe": Table(Anything(), 100),
        "device": Text(20, r"(cpu|cuda|mps|xpu|hpu)(:[0-9]{1,2})?", "a device such as cpu or cuda:0"),
        "dtype": Text(20),
        "threads": Whole(1, 1024),
        "world": Whole(1, 65_536),
        "versions": Table(Text(200), 200),
        "plugins": Items(Section({"name": Text(10_000), "version": Text(200)}, {"facts": Table(Anything())}), 0, 100),
    },
    {
        "negative": Text(100_000),
        "options": Table(Anything(), 100),
        "start": Section({"init": Text(10_000), "sha256": Text(64), "strength": Number(0, 1)}),
    },
)


@dataclass(frozen=True)
class Record:
    """What a result says about itself: the report of its batch, and its row in it."""

    file: Path
    modality: type[Modality]
    report: Mapping[str, Any]
    index: int


@dataclass(frozen=True)
class Replayed:
    """The outcome.

    Attributes:
        identical: the new content equals the file's, bit for bit.
        warnings: what differs between then and now.
        output: where the new result was written.
    """

    identical: bool
    warnings: list[str]
    output: Path


def read(file: Path) -> Record:
    """The record in `file`.

    Raises:
        ConfigError: no such file, no modality that reads it, no metadata, or metadata that is not whole.
    """
    for part in files_of(file):
        check(part, "the result", MEDIA)
    refusals = []
    for entry in installed(MODALITIES).values():
        try:
            cls: type[Modality] = entry.load()
            if file.suffix.lower() not in cls.suffixes:
                continue
            content = cls.read_metadata(file)
        except SuiteError as error:
            refusals.append(str(error))
            continue
        except Exception as error:  # readers of damaged files fail in any way
            what = f"{type(error).__name__}: {shown(str(error))[1:-1]}"
            raise ConfigError(f"{file}: its metadata is damaged: {what}") from error
        record = _record(file, cls, content)
        if record.report["modality"] == entry.name:
            return record
        refusals.append(f"{file} is of the modality {shown(record.report['modality'])}, which is not installed")
    raise ConfigError(refusals[0] if refusals else f"{file}: no installed modality reads {file.suffix or 'this'}")


def _record(file: Path, cls: type[Modality], content: Any) -> Record:
    where = f"{file}: its metadata"
    check_plain(content, where)
    report = content.get("suite") if isinstance(content, Mapping) else None
    index = content.get("index") if isinstance(content, Mapping) else None
    if not isinstance(report, Mapping) or type(index) is not int:
        raise ConfigError(f"{where} holds no report of this suite")
    if type(version := report.get("report_version")) is not int or version != REPORT_VERSION:
        raise ConfigError(f"{file}: report version {shown(version)}, expected {REPORT_VERSION}")
    untrusted.check(report, REPORT, where)
    prompts, seeds = report["prompts"], report["seeds"]
    if len(prompts) != len(seeds) or not 0 <= index < len(prompts):
        raise ConfigError(f"{where} has {len(prompts)} prompts, {len(seeds)} seeds and row {shown(index)}")
    return Record(file, cls, report, index)


def plan_of(record: Record, model: str | None = None, trust: bool = False) -> Plan:
    """The plan that made the file.

    Args:
        model: where the model lies, if it is not a shipped one: files record names, not places.
        trust: the file is one's own, so its recipe may name paths (a grid, a calibration). Stores are never taken.

    Raises:
        ConfigError: the model is not shipped, a plugin is not installed, or any other reason of `make_plan`.
    """
    modality, name = record.report["modality"], record.report["model"]
    if model is None and name not in models.shipped():
        raise ConfigError(
            f"{record.file} was made with the model {shown(name)}, which is not shipped; add --model FOLDER"
        )
    recipe = replace(Recipe.from_dict(record.report["recipe"]), dtype=record.report["dtype"])
    recipe, _ = without_stores(recipe)
    if not trust:
        try:
            refuse_paths(recipe, f"the recipe in {record.file}")
        except ConfigError as error:
            raise ConfigError(f"{error}; if the file is your own, add --trust") from error
    return make_plan(modality, recipe, model=model or name, allow_noop=True)


def differences(record: Record, plan: Plan) -> list[str]:
    """What is not as it was, each naming both; any of it may change bits."""
    report, out = record.report, []
    _, dropped = without_stores(Recipe.from_dict(report["recipe"]))
    out += [f"{store} is left out: a replay neither reads nor writes stores of others" for store in dropped]
    out += [
        f"{name} began samples with states of a store, without which they may not be made again bit for bit"
        for name in stores_used(report["plugins"])
    ]
    declared = {option.name: option for option in record.modality.options}
    out += [
        f"--{name} {shown(value)} is left out: it names a file"
        for name, value in (report.get("options") or {}).items()
        if value is not None and name in declared and declared[name].path
    ]
    now = versions(*report["versions"])
    for package, then in report["versions"].items():
        if now.get(package) != then:
            out.append(f"{package} is {now.get(package, 'not installed')}, the file was made with {then}")
    brought = {a.entry.name: a.entry for a in plan.manager.active}
    for plugin in report["plugins"]:
        name, then = str(plugin["name"]).partition(":")[0], plugin["version"]
        entry = brought.get(name)
        if entry and entry.version != then and entry.distribution not in report["versions"]:
            out.append(f"plugin {name} is of {entry.distribution} {entry.version}, the file was made with {then}")
    if plan.folder.hash != report["model_hash"]:
        out.append(
            f"model {plan.folder.name} has weights {plan.folder.hash[:12]}, "
            f"the file was made with {report['model_hash'][:12]}"
        )
    if report["world"] != 1:
        out.append(f"this runs on 1 rank, the file was made on {report['world']}")
    return out


def init_of(record: Record, path: Path | None) -> Init | None:
    """The file with which the result began, if it did: results record its name and its hash, not its content.

    Raises:
        ConfigError: it is not given, given though there was none, or has another content.
    """
    start = record.report.get("start")
    if start is None:
        if path is not None:
            raise ConfigError(f"--init {path}: {record.file} did not begin with a file; leave it out")
        return None
    if path is None:
        raise ConfigError(f"{record.file} began with the file {shown(start['init'])}; add --init FILE")
    init = Init.of(record.modality, path, start["strength"])
    if init.sha256 != start["sha256"]:
        raise ConfigError(f"--init {path} is not the file with which {record.file} began: its content differs")
    return init


def run(record: Record, plan: Plan, output: Path, init: Init | None = None, fresh: bool = False) -> Replayed:
    """Generate the file's batch again, compare its row with the file, and write it to `output`, `fresh` or replaced."""
    import torch

    from suite.cli.job import open_engine

    report, warnings = record.report, differences(record, plan)
    device = report["device"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        warnings.append(f"this runs on the CPU, the file was made on {device}")
        device = "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(report["threads"])
    try:
        with open_engine(plan, device) as engine:
            files = {option.name for option in record.modality.options if option.path}
            options = {name: value for name, value in (report.get("options") or {}).items() if name not in files}
            negative = report.get("negative") or ""
            result = engine.generate_batch(
                report["prompts"], report["seeds"], negative=negative, options=options, init=init
            )
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        # With the file's own metadata, so that equal content gives an equal file.
        again = Path(folder) / record.file.name
        known = record.modality.read_metadata(record.file)
        result.modality.save(result.artifacts[record.index], again, known)
        identical = record.modality.same(record.file, again)
    output, *_ = result.save_one(record.index, output, fresh=fresh)
    return Replayed(identical, warnings, output)
