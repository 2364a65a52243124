"""Hosts with gates and heads grow through the public path; Hugging Face's tiny random models find places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.widths.gated import GatedPair
from esper.kasmina.widths.heads import HeadsPair
from tests.kasmina.zoo import CLASSES, HOSTS

STEPS = 120
CONFIG: dict[str, Any] = {
    "schedule": {"warmup": 0.02},
    "race": {"steps": 8, "candidates": 2},
    "gate": {"false_keep": 0.9, "min_gain": 0.0},
    "early": {"false_keep": 0.9},
}


def echo(examples: int) -> tuple[Tensor, Tensor]:
    """Say the first token again at every place: heads have to look back."""
    ids = torch.randint(CLASSES, (examples, 5))
    return ids, ids[:, :1].expand(-1, 5)


def echoed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's attention under vmap
@pytest.mark.parametrize(
    ("sites", "kind"), [("*up>*", GatedPair), ("*.q>*", HeadsPair)], ids=["gates", "heads"]
)
def test_gates_and_heads_grow_through_the_public_path(sites: str, kind: type[object]) -> None:
    torch.manual_seed(0)
    net = HOSTS["GPT with SwiGLU"].build()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    names = [name for name, _ in net.named_parameters()]
    sizes = {name: parameter.shape for name, parameter in net.named_parameters()}
    growth = esper.grow(net, optimizer, echoed, probe=[echo(64)], steps=STEPS, sites=sites, config=CONFIG)
    assert all(isinstance(place, kind) for place in growth.run.morphable.places.values())
    loss = torch.zeros(())
    for _ in range(STEPS):
        given = echo(32)
        optimizer.zero_grad()
        loss = echoed(net, given)
        loss.backward()
        optimizer.step()
        growth.step(given, loss)
    assert growth.finish() is net
    assert growth.plans, "nothing grew"
    grown = {name for name, parameter in net.named_parameters() if parameter.shape != sizes[name]}
    assert grown == {edit.name for plan in growth.plans for edit in plan.edits}
    assert [name for name, _ in net.named_parameters()] == names
    optimizer.zero_grad()
    echoed(net, echo(32)).backward()
    optimizer.step()
    assert bool(torch.isfinite(loss))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
HUGGING = {
    "Bert": (
        "BertModel",
        {**SMALL, "vocab_size": 20},
        ["attention.self.query>encoder.layer.0.attention.output.dense", "intermediate.dense>"],
    ),
    "ViT": ("ViTModel", {**SMALL, "image_size": 8, "patch_size": 4}, ["attention.q_proj>", "mlp.fc1>"]),
    "Llama": (
        "LlamaForCausalLM",
        {**SMALL, "vocab_size": 20, "num_key_value_heads": 2},
        ["gate_proj*layers.0.mlp.up_proj>"],
    ),
}


@pytest.mark.filterwarnings("ignore")  # another project's deprecations
@pytest.mark.parametrize("family", HUGGING)
def test_places_in_tiny_random_models_of_hugging_face(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    name, settings, expected = HUGGING[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**settings))
    inputs = {"pixel_values": torch.randn(3, 3, 8, 8)}
    if family != "ViT":
        inputs = {"input_ids": torch.randint(20, (3, 6))}
    sites = list(esper.wrap(model, inputs, blueprints=["widen"]).places)
    assert len(sites) == len(expected), sites
    assert all(part in site.replace("model.", "") for part, site in zip(expected, sites, strict=True)), sites
