"""What in a model counts its blocks: a Hugging Face config, the number a layer knows itself by."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

Counts = tuple[tuple[str, str, int | tuple[str, ...]], ...]
SIDES = ("encoder", "decoder")
DEPTHS = (  # of Hugging Face configs; those of one side count only blocks on that side
    "num_hidden_layers", "n_layer", "n_layers", "num_layers",
    "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
LISTS = ("layer_types",)  # one entry per block
NUMBERS = ("layer_idx", "layer_id", "layer_number")  # by which attention finds its cache


def counts_of(model: nn.Module, container: str, donor: str, name: str, index: int) -> Counts:
    """List what must be brought up to date when a container gets one more block.

    Args:
        model: The host.
        container: Path of the container.
        donor: Path of the block that is copied.
        name: Name of the new block in the container.
        index: Position of the new block there, from 0.
    """
    holder = model.get_submodule(container)
    found: list[tuple[str, str, int | tuple[str, ...]]] = []
    for path, config in configs(model, container):
        found += [(path, *e) for e in of_config(config, path, container, len(holder._modules), index)]
    owner, _, attribute = container.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(parent, nn.TransformerEncoder | nn.TransformerDecoder) and attribute == "layers":
        found.append((owner, "num_layers", len(holder._modules) + 1))
    new = f"{container}.{name}".lstrip(".")
    for path, module in model.get_submodule(donor).named_modules():
        for number in NUMBERS:
            if type(vars(module).get(number)) is int and vars(module)[number] == index - 1:
                found.append((f"{new}.{path}".rstrip("."), number, index))
    return tuple(found)


def configs(model: nn.Module, container: str) -> Iterator[tuple[str, object]]:
    """List the configs of the modules around a container, each once."""
    seen: set[int] = set()
    parts = container.split(".") if container else []
    for length in range(len(parts) + 1):
        path = ".".join(parts[:length])
        config = vars(model.get_submodule(path)).get("config")
        if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            yield f"{path}.config".lstrip("."), config


def of_config(
    config: object, path: str, container: str, blocks: int, index: int
) -> Iterator[tuple[str, int | tuple[str, ...]]]:
    """List the entries of a config that count the blocks of a container."""
    facts = vars(config)
    side = next((side for side in SIDES if side in container.split(".")), None)
    fitting = [n for n in DEPTHS if type(facts.get(n)) is int and facts[n] == blocks and follows(config, n)]
    fitting = [n for n in fitting if not any(s in n for s in SIDES) or (side is not None and side in n)]
    if path == "config" and any(
        "decoder" in name for name in fitting
    ):  # T5: there num_layers is the encoder's
        fitting = [name for name in fitting if "decoder" in name]
    for name in fitting:
        yield name, blocks + 1
    for name in LISTS:
        entries = facts.get(name)
        if fitting and isinstance(entries, list) and len(entries) == blocks and follows(config, name):
            yield name, (*entries[:index], entries[index - 1], *entries[index:])


def follows(config: object, name: str) -> bool:
    """Tell whether an entry of a config can be set; a frozen one counts what the model was built with."""
    try:
        setattr(config, name, getattr(config, name))
    except Exception:  # a setter of the user's own raises what it likes
        return False
    return True
