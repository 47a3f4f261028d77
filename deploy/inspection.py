"""What a checkpoint, an ONNX file, a plan or a run directory holds. Nothing of it is executed, no model is built.

`inspect` gives JSON values, whose `kind` says of what; `tables` shows them on a terminal, also those of
`deploy.inspection_groups`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from safetensors import safe_open

from benchmarks.harness import numerals
from benchmarks.harness.results import load, rows
from benchmarks.harness.tables import summary
from compress import checkpoint
from compress.errors import InputError
from compress.files import sha256
from deploy import inspection_groups_views, manifest
from deploy.engine import SUFFIX as PLAN
from deploy.metadata import decode
from deploy.onnx_file import SUFFIX, onnx_specs, read_onnx
from deploy.recipe_text import read_recipe
from deploy.run_directory import RunDirectory
from deploy.tensor_spec import TensorSpec


def inspect(path: Path) -> dict[str, Any]:
    """Describe what lies at `path`, after checking its hashes.

    Raises:
        InputError: nothing is there, it is nothing of ours, or it was changed or cut off.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path} does not exist: give a checkpoint directory, an ONNX file, a plan or a run directory; with "
            "--groups also a model factory, such as torchvision:resnet50."
        )
    if path.is_file():
        if path.suffix not in (SUFFIX, PLAN):
            raise InputError(
                f"{path} is neither an ONNX file nor a plan: give one that ends in {SUFFIX} or {PLAN}, a checkpoint "
                "or a run directory."
            )
        return _onnx(path) if path.suffix == SUFFIX else _plan(path)
    if (path / checkpoint.ARCHITECTURE).exists():
        return _checkpoint(path)
    if (path / "recipe.yaml").exists():
        return _run(path)
    raise InputError(f"{path} holds neither {checkpoint.ARCHITECTURE} nor recipe.yaml: give a checkpoint or a run.")


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """What `inspect`, or `inspection_groups.inspect_groups`, found, for the terminal."""
    shown = {
        "checkpoint": _checkpoint_tables,
        "groups": inspection_groups_views.tables,
        "onnx": _onnx_tables,
        "plan": _plan_tables,
        "run": _run_tables,
    }
    return shown[found["kind"]](found)


def _checkpoint(path: Path) -> dict[str, Any]:
    architecture = checkpoint.Architecture.read(path)
    weights = path / checkpoint.WEIGHTS
    if not weights.is_file() or sha256(weights) != architecture.weights_sha256:
        raise InputError(f"{weights} is missing or was changed after it was written: restore it.")
    shapes = _shapes(weights)
    before = {part: kept.of for kept in architecture.kept for part in kept.slices}
    layers = [
        {"name": name.removesuffix(".weight"), "width": shape[0], "dense_width": before.get(f"{name}:0", shape[0])}
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) >= 2
    ]
    return {
        "kind": "checkpoint",
        "path": str(path),
        "factory": architecture.factory,
        "kwargs": architecture.kwargs,
        "image_shape": list(architecture.image_shape),
        "classes": list(architecture.classes),
        "mean": list(architecture.mean),
        "std": list(architecture.std),
        "numbers_stored": sum(map(prod, shapes.values())),
        "size_bytes": weights.stat().st_size,
        "layers": layers,
        "provenance": architecture.provenance,
        "weights_sha256": architecture.weights_sha256,
        "sha256": architecture.sha256,
    }


def _shapes(weights: Path) -> dict[str, list[int]]:
    """Shape of every tensor of a safetensors file; the tensors themselves are not read."""
    with safe_open(weights, framework="numpy") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  it is no mapping


def _onnx(path: Path) -> dict[str, Any]:
    model = read_onnx(path)
    inputs, outputs = onnx_specs(model, path)
    about = decode(model.metadata_props, str(path))
    listed = None
    if (path.parent / manifest.FILE_NAME).exists():
        listed = manifest.read(path.parent).entry(path.name) is not None
        if listed:
            manifest.verify_file(path)
    return {
        "kind": "onnx",
        "path": str(path),
        "opset": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "inputs": [str(spec) for spec in inputs],
        "outputs": [str(spec) for spec in outputs],
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "numbers_stored": sum(prod(tensor.dims) for tensor in model.graph.initializer),
        "size_bytes": path.stat().st_size,
        "metadata": about.model_dump(mode="json") if about else None,
        "in_manifest": listed,
        "sha256": sha256(path),
    }


def _plan(path: Path) -> dict[str, Any]:
    """What the manifest says of a plan: to look into it would be to execute it."""
    return {"kind": "plan", "path": str(path), **manifest.verify_file(path).model_dump(mode="json", exclude={"kind"})}


def _run(path: Path) -> dict[str, Any]:
    directory = RunDirectory(path)
    recipe = read_recipe(directory.recipe)
    checkpoints = [folder for folder in (directory.baseline, directory.pruned) if folder.is_dir()]
    results = load(directory.results) if directory.complete else None
    artifacts = manifest.verify(directory.artifacts) if (directory.artifacts / manifest.FILE_NAME).exists() else None
    return {
        "kind": "run",
        "path": str(path),
        "name": recipe.name,
        "seed": recipe.seed,
        "complete": directory.complete,
        "stages_finished": None if directory.complete else directory.finished_stages(),
        "checkpoints": [_checkpoint(folder) for folder in checkpoints],
        "artifacts": [] if artifacts is None else [entry.model_dump(mode="json") for entry in artifacts.entries],
        "results": None if results is None else rows(results),
    }


def _accuracy(found: Mapping[str, Any]) -> str:
    """A checkpoint that does not say what the figure is has top-1."""
    others = "".join(f", {name} {value:.2f} %" for name, value in found.get("others", {}).items())
    return f"{found.get('metric', 'top-1')} {found['top1']:.2f} % of {found['samples']} images{others}"


def _checkpoint_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    accuracy = found["provenance"].get("accuracy")
    facts = {
        "factory": f"{found['factory']} {json.dumps(found['kwargs'])}",
        "image": " x ".join(map(str, found["image_shape"])),
        "classes": _listed(found["classes"]),
        "mean, std": f"{found['mean']}, {found['std']}",
        "accuracy": _accuracy(accuracy) if accuracy else "not recorded",
        "numbers stored": numerals.compact(found["numbers_stored"]),
        "size": numerals.size(found["size_bytes"]),
        "provenance": json.dumps({key: value for key, value in found["provenance"].items() if key != "accuracy"}),
        "SHA-256": found["sha256"],
    }
    layers = Table(title="Output channels", title_justify="left", box=box.SIMPLE_HEAD)
    layers.add_column("layer", overflow="fold")
    for header in ("dense", "kept", ""):
        layers.add_column(header, justify="right")
    for layer in found["layers"]:
        share = f"{100 * layer['width'] / layer['dense_width']:.0f} %"
        layers.add_row(layer["name"], str(layer["dense_width"]), str(layer["width"]), share)
    return [_facts(f"Checkpoint {found['path']}", facts.items()), layers]


def _onnx_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    metadata = found["metadata"] or {}
    in_manifest = {None: "there is no manifest beside it", True: "listed, unchanged", False: "not listed"}
    facts = {
        "inputs": "; ".join(found["inputs"]),
        "outputs": "; ".join(found["outputs"]),
        "opset": ", ".join(f"{domain} {version}" for domain, version in found["opset"].items()),
        "operators": ", ".join(f"{count} {name}" for name, count in found["operators"].items()),
        "numbers stored": numerals.compact(found["numbers_stored"]),
        "size": numerals.size(found["size_bytes"]),
        "precision": _precision(metadata),
        "manifest": in_manifest[found["in_manifest"]],
        "classes": _listed(metadata.get("classes", [])),
        "mean, std": f"{metadata.get('mean', [])}, {metadata.get('std', [])}",
        "checkpoint": metadata.get("checkpoint_sha256") or "not recorded",
        "SHA-256": found["sha256"],
    }
    return [_facts(f"ONNX file {found['path']}", facts.items())]


def _plan_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    engine = found["engine"] or {}
    profiles = (
        f"{name}: {' to '.join('x'.join(map(str, shape[end])) for end in ('minimum', 'maximum'))}, "
        f"fastest at {'x'.join(map(str, shape['optimum']))}"
        for name, shape in engine.get("profiles", {}).items()
    )
    facts = {
        "inputs": "; ".join(_spec(spec) for spec in found["inputs"]),
        "outputs": "; ".join(_spec(spec) for spec in found["outputs"]),
        "precision": _precision(found),
        "TensorRT": engine.get("tensorrt_version", "not recorded"),
        "GPU": f"{engine.get('gpu', 'not recorded')}, compute capability "
        f"{'.'.join(map(str, engine.get('compute_capability', ('?',))))}",
        "profiles": "; ".join(profiles) or "not recorded",
        "settings": json.dumps(engine.get("settings", {})),
        "size": numerals.size(found["size_bytes"]),
        "built from": found["source_sha256"] or "not recorded",
        "checkpoint": found["checkpoint_sha256"] or "not recorded",
        "SHA-256": found["sha256"],
    }
    return [_facts(f"TensorRT plan {found['path']}", facts.items())]


def _precision(about: Mapping[str, Any]) -> str:
    """Number format, target and calibration of a file, from its metadata or its entry."""
    if not about:
        return "not recorded"
    target = "" if about["target"] == "any" else f" for the {about['target'].upper()}"
    quantisation = about["quantisation"]
    if quantisation is None:
        return f"{about['precision']}{target}"
    left_out = f"; in floating point: {', '.join(quantisation['excluded'])}" if quantisation["excluded"] else ""
    return (
        f"{about['precision']}{target}, {quantisation['calibration']} over {quantisation['samples']} images of "
        f"{quantisation['data']}{left_out}"
    )


def _spec(spec: Mapping[str, Any]) -> str:
    return str(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])))


def _run_tables(found: Mapping[str, Any]) -> list[RenderableType]:
    finished = ", ".join(found["stages_finished"] or []) or "none"
    facts = {
        "recipe": f"{found['name']}, seed {found['seed']}",
        "state": "complete" if found["complete"] else f"unfinished; stages finished: {finished}",
    }
    parts: list[RenderableType] = [_facts(f"Run {found['path']}", facts.items())]
    if found["complete"]:
        parts.append(summary(load(Path(found["path"]) / "results.json")))
    files = Table(title="Files", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("file", "size", "SHA-256"):
        files.add_column(header, overflow="fold")
    for item in found["checkpoints"]:
        files.add_row(item["path"], numerals.size(item["size_bytes"]), item["sha256"])
    for entry in found["artifacts"]:
        files.add_row(f"artifacts/{entry['file']}", numerals.size(entry["size_bytes"]), entry["sha256"])
    return [*parts, files]


def _facts(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts:
        table.add_row(key, value)
    return table


def _listed(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}" if names else "not recorded"
